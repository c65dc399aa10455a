"""What a network is looked at with: a split of the data, its inputs, the logits they give."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pliant.cost import Example, call
from pliant.data import Data, unpack
from pliant.data.splits import Split
from pliant.errors import DataError, ModelError

SUMS_TO_ONE = 1e-4  # how far sums of probabilities may be from 1
BATCH = 32  # samples of one forward call, of which whole maps are held


def shown(data: Data) -> Split:
    """Return the split to look at: test, or validation or training where there is none.

    Raises:
        DataError: there is no split at all.
    """
    splits: tuple[Split, ...] = ("test", "val", "train")
    for split in splits:
        if data.has(split):
            return split
    raise DataError("A network is looked at on inputs, but the data have none: give some.")


@dataclass(frozen=True, eq=False)
class Samples:
    """Inputs that are looked at.

    Args:
        inputs: (samples, channels, *positions), at least two.
        labels: classes (samples,), None where there are none.
    """

    inputs: Tensor
    labels: Tensor | None

    def batches(self) -> Iterator[Tensor]:
        """Yield the inputs of one forward call after the other."""
        return iter(self.inputs.split(BATCH))


def first(data: Data, most: int) -> Samples:
    """Return the first inputs of the split to look at.

    Raises:
        DataError: they are not one tensor of real numbers with positions, or there is only one.
    """
    found, labels, count = [], [], 0
    for batch in data.batches(shown(data), BATCH):
        given, classes = unpack(batch)
        values = list(given.values() if isinstance(given, Mapping) else given)
        fits = len(values) == 1 and isinstance(values[0], Tensor) and values[0].dim() > 2
        if isinstance(given, Mapping) or not fits or not values[0].is_floating_point():
            raise DataError(
                "Positions are looked at in one tensor (samples, channels, ...) of real numbers, "
                f"but {', '.join(_described(value) for value in values) or 'nothing'} came."
            )
        found.append(values[0][: most - count])
        labels.append(classes[: most - count] if isinstance(classes, Tensor) else None)
        count += len(found[-1])
        if count >= most:
            break
    if count < 2:
        raise DataError(f"At least 2 inputs must be looked at, but {count} came.")
    known = [one for one in labels if one is not None and one.dim() == 1]
    whole = len(known) == len(found) and not known[0].is_floating_point()
    return Samples(torch.cat(found), torch.cat(known) if whole else None)


def _described(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else str(type(value))


def labelled(
    data: Data, split: Split, batch: int, *, seed: int | None = None
) -> Iterator[tuple[Example, Tensor]]:
    """Yield inputs and class labels of a split, batch by batch.

    Args:
        data: with labels.
        split: of it.
        batch: samples; a loader has its own.
        seed: of a shuffled order; None for the order in which they lie.

    Raises:
        DataError: there are no labels, or they are no classes.
    """
    for part in data.batches(split, batch, seed=seed or 0, shuffle=seed is not None):
        inputs, labels = unpack(part)
        if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dim() != 1:
            raise DataError(
                f"This needs the class of every input, whole numbers, but the {split} split gives "
                f"{'none' if labels is None else 'something else'}: give pairs (inputs, labels)."
            )
        yield inputs, labels.long()


def logits(model: nn.Module, inputs: Example) -> Tensor:
    """Return a row of finite class scores for each input, in the mode that the model is in.

    Raises:
        ModelError: the model fails, gives no such rows, or gives probabilities.
    """
    found: Any = call(model, inputs)
    named = found.get("logits") if isinstance(found, Mapping) else getattr(found, "logits", found)
    if not isinstance(named, Tensor) or named.dim() != 2:
        raise ModelError(
            "The model must give a row of logits for each input, a tensor (inputs, classes) or "
            f"something with logits, not {type(found).__name__}."
        )
    return named


def check_logits(scores: Tensor) -> None:
    """Refuse scores in which small differences are lost, or that are none.

    Raises:
        ModelError: a single output, half precision, NaN or infinity, or probabilities.
    """
    if scores.shape[1] < 2:
        raise ModelError("The model must give at least 2 outputs for each input, but gives 1.")
    if scores.dtype in (torch.float16, torch.bfloat16):
        raise ModelError(
            f"Small differences drown in {scores.dtype}: convert the model with model.float()."
        )
    if not torch.isfinite(scores).all():
        raise ModelError("The model's outputs must be finite, but some are NaN or infinity.")
    if (scores >= 0).all() and ((scores.sum(1) - 1).abs() < SUMS_TO_ONE).all():
        raise ModelError(
            "The model gives probabilities, whose sum no noise can move: take its outputs before "
            "the softmax."
        )
