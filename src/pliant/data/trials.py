"""Whether an item is one sample or a batch: asked of its label, and of the network."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pliant.cost import Example, call, evaluating, tensors
from pliant.data.sources import unpack
from pliant.data.together import listed, together
from pliant.errors import PliantError
from pliant.math.alone import forked
from pliant.observe.outputs import answers

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_SEQUENCES: tuple[type[nn.Module], ...] = (
    nn.RNNBase,
    nn.MultiheadAttention,
    nn.Transformer,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)


@dataclass(frozen=True)
class Trial:
    """What a network did with inputs.

    Attributes:
        unbatched: a layer that can do without a batch axis got none.
        rows: the first axis of its first answer, None where it has none.
    """

    unbatched: bool
    rows: int | None


def runs(model: nn.Module, example: Example) -> Trial | None:
    """Run a network on inputs; None if it fails."""
    unbatched: list[bool] = []

    def look(module: nn.Module, args: Any) -> None:
        if args and isinstance(args[0], Tensor):
            axes = 2 if isinstance(module, _SEQUENCES) else len(module.kernel_size) + 1  # type: ignore[arg-type]
            unbatched.append(args[0].dim() == axes)

    try:
        with ExitStack() as hooks, evaluating(model), torch.no_grad():
            hooks.enter_context(forked())
            for module in model.modules():
                if isinstance(module, (*_SEQUENCES, *_CONVOLUTIONS)):
                    hooks.callback(module.register_forward_pre_hook(look).remove)
            output = call(model, example)
    except Exception:  # a network may object to its inputs in any way
        return None
    return Trial(any(unbatched), _rows(output))


def trial_of(
    model: nn.Module, collate: Callable[[list[Any]], Any], items: list[Any]
) -> Trial | None:
    """Run a network on samples that are put together first; None if that, or the network, fails."""
    try:
        return runs(model, unpack(collate(items))[0])
    except Exception:  # the items cannot be put together so
        return None


def are_samples(model: nn.Module, item: Any) -> bool:
    """Say whether an item is one sample, and not a batch."""
    inputs, labels = unpack(item)
    as_batch, as_sample = runs(model, inputs), trial_of(model, together, [item])
    if as_batch is None:
        return as_sample is not None or trial_of(model, listed, [item]) is not None
    if as_sample is None:
        return False
    first = next(tensors(inputs), None)
    if as_batch.unbatched or first is None or first.dim() < 2 or _is_one(labels):
        return True
    return as_sample.rows == 1 and as_batch.rows != len(first)


def _is_one(labels: Any) -> bool:
    """Say whether a label is a single number, or one word: that of one sample."""
    single = isinstance(labels, Tensor) and not labels.dim()
    return single or isinstance(labels, bool | int | float | str) or getattr(labels, "ndim", 1) == 0


def _rows(output: Any) -> int | None:
    try:
        first = answers(output)[0]
    except PliantError:
        return None
    return len(first) if first.dim() else None
