"""Checks of options that several solvers share, before any work is done."""

from __future__ import annotations

from typing import Any

from pliant.errors import MethodError

MOST_GROWTH = 10.0  # of mu in one iteration


def positive(name: str, method: Any, *options: str) -> None:
    """Refuse options that are not above zero.

    Args:
        name: of the method, for the sentence.
        method: holds the options.
        options: their names.

    Raises:
        MethodError: one of them is zero, negative or no number.
    """
    for option in options:
        if not getattr(method, option) > 0:
            raise MethodError(
                f"{name}: {option} must be positive, not {getattr(method, option)}: raise it."
            )


def check_pace(name: str, method: Any) -> None:
    """Refuse iterations that never begin or never settle.

    Raises:
        MethodError: `iterations`, `growth` or `tolerance` is out of range.
    """
    positive(name, method, "tolerance")
    if method.iterations < 1 or not 1 < method.growth <= MOST_GROWTH:
        raise MethodError(
            f"{name}: iterations must be 1 or more, and growth above 1 and at most "
            f"{MOST_GROWTH:g}, since with a constant mu the iteration may cycle; they are "
            f"{method.iterations} and {method.growth}."
        )
