"""Whether a network and its example hold numbers that anything can be computed from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn

from pliant.cost import Example, tensors
from pliant.errors import DataError, ModelError, TrainingError


def check_weights(model: nn.Module) -> None:
    """Refuse a network with a parameter or a statistic that is not finite, or NaN in a buffer.

    Raises:
        ModelError: there is one; the first is named.
    """
    if (broken := _broken(model)) is not None:
        raise ModelError(
            f"Weights must be finite, but {broken} of {type(model).__name__} holds NaN or "
            "infinity: load a checkpoint from before the training went wrong."
        )


def check_left(model: nn.Module, method: str) -> None:
    """Refuse the weights that a method leaves, if one is not finite.

    Args:
        model: as it is when its compression is over; at the beginning all was finite.
        method: named in the refusal.

    Raises:
        TrainingError: there is one; the first is named.
    """
    if (broken := _broken(model)) is not None:
        raise TrainingError(
            f"{method} left {broken} with NaN or infinity, though the network came with finite "
            "weights: they, the inputs or the learning rate are too large to compute with; scale "
            "them down, or train more gently."
        )


@contextmanager
def in_words(method: str) -> Iterator[None]:
    """Say in a sentence where a method cannot compute with the numbers that it meets.

    Args:
        method: named in the sentence.

    Raises:
        TrainingError: a decomposition fails, or something is divided by zero or overflows.
    """
    try:
        yield
    except (torch.linalg.LinAlgError, ArithmeticError) as error:
        why = str(error).strip().splitlines() or [type(error).__name__]
        raise TrainingError(
            f"{method} cannot compute with the weights and features that it meets "
            f"({why[0].rstrip('.')}): they must be finite and of ordinary size; lower the learning "
            "rate, scale the inputs, or choose milder options."
        ) from error


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


def _broken(model: nn.Module) -> str | None:
    """Name the first parameter or buffer that holds what it must not."""
    weights = (name for name, each in model.named_parameters() if not _all(torch.isfinite, each))
    buffers = (name for name, each in model.named_buffers() if not _all(_rule(name), each))
    return next(chain(weights, buffers), None)


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
