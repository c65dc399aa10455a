"""Whether a network and its example hold numbers that anything can be computed from."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pliant.cost import Example, tensors
from pliant.errors import DataError, ModelError


def check_weights(model: nn.Module) -> None:
    """Refuse a network with a parameter that is not finite, or a buffer that holds NaN.

    Raises:
        ModelError: there is one; the first is named.
    """
    named = [*model.named_parameters(), *model.named_buffers()]
    broken = next((name for name, tensor in named if not _sound(tensor)), None)
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
    if not all(_sound(tensor) and bool((tensor < math.inf).all()) for tensor in found):
        raise DataError(
            f"An example must be finite, but the one of shape {shapes} holds NaN or infinity: "
            "pass inputs as the network will see them."
        )


def _sound(tensor: Tensor) -> bool:
    """Parameters must be finite; elsewhere a mask, or a least value so far, may be infinite."""
    if nn.parameter.is_lazy(tensor) or not tensor.is_floating_point():
        return True
    if tensor.is_meta or tensor.layout != torch.strided or tensor.element_size() < 2:
        return True  # without numbers, or of kinds that cannot be compared
    if isinstance(tensor, nn.Parameter):
        return bool(torch.isfinite(tensor).all())
    return not bool(torch.isnan(tensor).any())
