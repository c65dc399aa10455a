"""Chooses layers by kind and by name."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from pliant.errors import MethodError
from pliant.nn.filters import WEIGHTED


def weighted(
    model: nn.Module, only: Sequence[str] = (), exclude: Sequence[str] = ()
) -> dict[str, nn.Module]:
    """Return the convolutions and linear layers whose names fit.

    Args:
        model: any module.
        only: shell patterns of names to take; none means all.
        exclude: shell patterns of names to leave out.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, WEIGHTED)
        and (not only or matches(name, only))
        and not matches(name, exclude)
    }


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Say whether a name fits one of several shell patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def check_patterns(model: nn.Module, patterns: Sequence[str]) -> None:
    """Refuse a pattern that no convolution or linear layer fits.

    Raises:
        MethodError: a pattern matches nothing.
    """
    names = list(weighted(model))
    for pattern in patterns:
        if not any(matches(name, (pattern,)) for name in names):
            raise MethodError(
                f"The layer pattern {pattern!r} matches none of the model's layers: "
                f"they are {', '.join(names[:8])}{' and more' if len(names) > 8 else ''}."
            )
