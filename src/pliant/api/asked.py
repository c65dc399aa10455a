"""What a call of `compress` was given: refused where it cannot be, copied and kept apart."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pliant.budget import Budget
from pliant.cost import check_held, check_open, device_of, twin
from pliant.drivers import checkpoint
from pliant.drivers.lock import owned
from pliant.errors import BudgetError, ModelError
from pliant.method import Method


def budget_of(budget: Budget | str | None) -> Budget | None:
    """Read a budget."""
    if budget is None or isinstance(budget, Budget | str):
        return Budget.parse(budget) if isinstance(budget, str) else budget
    raise BudgetError(
        f"A budget must be a Budget, text such as 'params=0.3', or None, not {budget!r}."
    )


def place_of(model: Any) -> torch.device:
    """Say where a model is, after refusing what is no model."""
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"The model must be a torch.nn.Module, not {type(model).__name__}; "
            "pliant.zoo.build makes one from a name."
        )
    check_open(model)
    check_held(model)
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
