"""What a call of `compress` was given: refused where it cannot be, copied and kept apart."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from pliant.cost import check_model, device_of, twin
from pliant.drivers import checkpoint
from pliant.drivers.lock import owned
from pliant.errors import ModelError
from pliant.method import Method


def place_of(model: nn.Module) -> torch.device:
    """Say where a model is, after refusing what is no model, or cannot be compressed."""
    check_model(model)
    return device_of(model)


def patterns(method: Method) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the name patterns of the layers that a method takes and leaves."""
    return getattr(method, "only", ()), getattr(method, "exclude", ())


def copied(model: nn.Module) -> nn.Module:
    """Copy a network, or say why it cannot be."""
    try:
        return twin(model)
    except Exception as error:  # a model's own attributes may refuse in any way
        raise ModelError(
            f"{type(model).__name__} must be copied before it is compressed, and cannot "
            f"({type(error).__name__}: {error}); remove what copy.deepcopy fails on."
        ) from error


@contextmanager
def written_alone(folder: Path | None, *, resume: bool) -> Iterator[None]:
    """Keep others out of the folder of checkpoints, and clear it of those of earlier runs.

    Of several processes that train together the first one does.
    """
    if folder is None or int(os.environ.get("RANK", 0)):
        yield
        return
    with owned(folder):
        if not resume:
            checkpoint.forget(folder)
        yield
