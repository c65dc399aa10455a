"""When, within a search, something happens that is not done at every step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pliant.cost import Cost
from pliant.errors import BudgetError, MethodError
from pliant.run import Run
from pliant.surgery.batchnorm import recalibrate

SETTLING = 2048  # samples from which batch norms are re-estimated at the end of a search


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


def check_schedule(method: str, run: Run, start: float, search: float) -> None:
    """Refuse a schedule that leads nowhere, and a search without a budget to end at.

    Raises:
        MethodError: it ends before it starts.
        BudgetError: there is no budget.
    """
    if start >= search:
        raise MethodError(f"{method}: start must be below search, not {start} and {search}.")
    if not run.limits():
        raise BudgetError(
            f"{method} plans ranks for a budget, and there is none: bound params, macs or bytes."
        )


def falling(dense: Cost, bounds: Mapping[str, float], left: float) -> dict[str, float]:
    """Return what a network may cost while a share of the way to its bounds is left.

    Args:
        dense: what it cost at first.
        bounds: what it may cost at the end.
        left: the share, 1 at first and 0 at the end.
    """
    return {
        axis: bound + left * max(0.0, getattr(dense, axis) - bound)
        for axis, bound in bounds.items()
    }


def end_search(run: Run, dense: Iterable[str]) -> None:
    """Say of the layers that stay dense why, and estimate batch norms anew."""
    for name in dense:
        run.keep(name, "no factorized form at the rank it needs is smaller")
    if run.has_inputs:
        recalibrate(run.model, run.inputs(SETTLING))
