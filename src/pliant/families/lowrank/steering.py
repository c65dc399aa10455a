"""Steers the strength of a penalty so that ranks reach the budget as the search ends."""

from __future__ import annotations

from pliant.edits import Factor
from pliant.errors import MethodError
from pliant.families.lowrank.factorize import Layers
from pliant.math.rank import energy_rank
from pliant.math.svd import spectrum
from pliant.nn.kinds import kernel
from pliant.run import Run

START = 0.01  # strength with which the controller begins
PACE = 1.25  # by which the controller changes the strength at one interval


def counted(run: Run) -> dict[str, float]:
    """Return the bounds that can be followed in training: all but milliseconds, measured ones."""
    return {axis: bound for axis, bound in run.limits().items() if axis != "latency"}


def check_steering(method: str, run: Run, alpha: float | None) -> None:
    """Refuse to find a strength where there is no budget to find it for.

    Raises:
        MethodError: no bound can be followed in training.
    """
    if alpha is None and run.steps and not counted(run):
        raise MethodError(
            f"{method}(alpha=None) finds its strength for a budget of params, macs or bytes, and "
            "there is none: bound one of them, or give alpha a number."
        )


def steered(run: Run, layers: Layers, alpha: float, p: float, search: int) -> float:
    """Raise a strength while ranks at energy p lag behind a line to the budget; else lower it.

    Args:
        run: with a budget.
        layers: what is still dense and searched.
        alpha: the strength now.
        p: energy kept.
        search: steps of the whole search.
    """
    left, now = 1 - min(1.0, run.step / max(1, search)), _reach(run, layers, p)
    lags = any(
        now[axis] > bound + left * (getattr(run.cost, axis) - bound)
        for axis, bound in counted(run).items()
    )
    return alpha * (PACE if lags else 1 / PACE)


def _reach(run: Run, layers: Layers, p: float) -> dict[str, int]:
    """What the whole network would cost if it were factorized at energy p now, by axis."""
    now, rows = run.planner.now(), run.planner.rows()
    reach = {axis: getattr(now, axis) for axis in counted(run)}
    for name, module in layers.items():
        weight = kernel(module).detach()
        ranks = [energy_rank(spectrum(weight, mode), p) for mode in (1, 0)]
        form = "tucker2" if weight[0, 0].numel() > 1 else "svd"
        edit = Factor(name, form, tuple(ranks if form == "tucker2" else ranks[:1]))
        after = edit.predict(rows[name])
        for axis in reach:
            reach[axis] -= max(0, getattr(rows[name], axis) - getattr(after, axis))
    return reach
