"""Options that lie within ranges."""

from __future__ import annotations

from math import inf
from typing import Any

from pliant.errors import MethodError
from pliant.registry import entry_of


def check(method: Any, **ranges: tuple[float, float]) -> None:
    """Refuse an option outside of its range.

    Args:
        method: has the options.
        ranges: the least and the largest value of each.

    Raises:
        MethodError: one lies outside.
    """
    entry = entry_of(method)
    for option, (least, most) in ranges.items():
        value = getattr(method, option)
        if not least <= value <= most:
            wanted = f"{least:g} or more" if most == inf else f"from {least:g} to {most:,g}"
            name = entry.name if entry else type(method).__name__
            raise MethodError(f"{name}: {option} must be {wanted}, not {value}.")
