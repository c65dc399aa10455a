"""Whether a network and its example hold numbers that anything can be computed from."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import chain

import torch
from torch import Tensor, nn

from pliant.cost import Example, tensors
from pliant.errors import DataError, ModelError


def check_weights(model: nn.Module) -> None:
    """Refuse a network with a parameter or a statistic that is not finite, or NaN in a buffer.

    Raises:
        ModelError: there is one; the first is named.
    """
    weights = (name for name, each in model.named_parameters() if not _all(torch.isfinite, each))
    buffers = (name for name, each in model.named_buffers() if not _all(_rule(name), each))
    broken = next(chain(weights, buffers), None)
    if broken is not None:
        raise ModelError(
            f"Weights must be finite, but {broken} of {type(model).__name__} holds NaN or "
            "infinity: load a checkpoint from before the training went wrong."
        )


def check_example(example: Example) -> None:
    """Refuse an example without a row, or with numbers that nothing can be computed from.

    Raises:
        DataError: its first tensor has no row, or one holds NaN or infinity.
    """
    found = list(tensors(example))
    shapes = ", ".join(str(tuple(tensor.shape)) for tensor in found)
    if found and found[0].dim() and not len(found[0]):
        raise DataError(
            f"An example must have at least one row, but its shape is {shapes}: pass the inputs "
            "of one sample or more."
        )
    if not all(_all(_bounded, tensor) for tensor in found):
        raise DataError(
            f"An example must be finite, but the one of shape {shapes} holds NaN or infinity: "
            "pass inputs as the network will see them."
        )


def _rule(buffer: str) -> Callable[[Tensor], Tensor]:
    """Statistics must be finite; a mask, or the least of what was seen so far, may be infinite."""
    return torch.isfinite if "running_" in buffer else lambda values: ~torch.isnan(values)


def _bounded(inputs: Tensor) -> Tensor:
    """An input may hold minus infinity: a mask that is added to scores."""
    return inputs < math.inf


def _all(holds: Callable[[Tensor], Tensor], tensor: Tensor) -> bool:
    """Whether it holds of all numbers; tensors without, or of eight bits, are not looked at."""
    if nn.parameter.is_lazy(tensor) or not tensor.is_floating_point() or tensor.is_meta:
        return True
    if tensor.layout != torch.strided or tensor.element_size() < 2:
        return True
    return bool(holds(tensor).all())
