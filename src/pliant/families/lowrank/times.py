"""When, within a search, something happens that is not done at every step."""

from __future__ import annotations

from pliant.errors import BudgetError, MethodError
from pliant.run import Run


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


def check_schedule(
    method: str, run: Run, start: float, search: float, plans: int, power: float
) -> None:
    """Refuse a schedule that leads nowhere, and a search without a budget to end at.

    Raises:
        MethodError: a share, a number or the power is out of its range.
        BudgetError: there is no budget.
    """
    if not 0 <= start < search <= 1 or plans < 1 or not power > 0:
        raise MethodError(
            f"{method}: 0 <= start < search <= 1, at least one plan and a power above 0 were "
            f"expected, not start={start}, search={search}, plans={plans}, power={power}."
        )
    if not run.limits():
        raise BudgetError(
            f"{method} plans ranks for a budget, and there is none: bound params, macs or bytes."
        )
