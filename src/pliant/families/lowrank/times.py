"""When, within a search, something happens that is not done at every step."""

from __future__ import annotations

from pliant.errors import MethodError


def check_interval(method: str, interval: int) -> None:
    """Refuse an interval that is no number of steps.

    Raises:
        MethodError: it is below 1.
    """
    if interval < 1:
        raise MethodError(f"{method}: interval must be at least 1 step, not {interval}.")


def due(step: int, pace: int, search: int, times: int) -> bool:
    """Say whether one of so many moments, evenly spread over a search, falls on this step.

    Args:
        step: that has just been taken, from 1.
        pace: the moments fall on multiples of so many steps only.
        search: steps of the whole search.
        times: how many moments, the one at the end of the search included.
    """
    before, now = ((step - less) * times // max(1, search) for less in (pace, 0))
    return step % pace == 0 and before < now
