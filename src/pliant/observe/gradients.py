"""Gradients of other people's networks, some of which have none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from pliant.errors import ModelError

CHANGED = "modified by an inplace operation"
"""What autograd says where a forward has overwritten what gradients need."""


@contextmanager
def differentiated(model: nn.Module) -> Iterator[None]:
    """Say in a sentence why gradients of a network cannot be computed, where they are asked for.

    Raises:
        ModelError: autograd fails: the network overwrites what its gradients need, for example.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        line = str(error).strip().partition("\n")[0].partition(": ")[0]
        hint = "write `x = x + y` where its forward has `x += y`, or the like, or "
        raise ModelError(
            f"{type(model).__name__} must have gradients here, which its forward rules out "
            f"({line[:160]}): {hint if CHANGED in line else ''}take a method, or options of this "
            "one, without training and without gradients."
        ) from error
