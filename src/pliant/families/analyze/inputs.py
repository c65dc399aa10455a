"""What a network is looked at with: a split of the data, its inputs, the logits they give."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pliant.cost import Example, call
from pliant.data import Data, unpack
from pliant.data.splits import Split
from pliant.errors import DataError, ModelError

SUMS_TO_ONE = 1e-4  # how far sums of probabilities may be from 1


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


def labelled(data: Data, split: Split, batch: int) -> Iterator[tuple[Example, Tensor]]:
    """Yield inputs and class labels of a split, batch by batch.

    Raises:
        DataError: there are no labels, or they are no classes.
    """
    for part in data.batches(split, batch):
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
    try:
        found: Any = call(model, inputs)
    except Exception as error:  # a model may fail in any way
        raise ModelError(
            f"The model fails in forward on these inputs ({type(error).__name__}: {error}); check "
            "that model and data fit."
        ) from error
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
