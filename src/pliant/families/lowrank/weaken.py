"""Ranks weakened or tightened by one share until they meet a budget."""

from __future__ import annotations

from collections.abc import Mapping

from pliant.budget import Limits, Option
from pliant.cost import LayerCost
from pliant.edits import Factor
from pliant.errors import BudgetError
from pliant.families.lowrank.factorize import Layers
from pliant.math.forms import max_ranks
from pliant.nn.factorized import Factorizable
from pliant.nn.kinds import kernel
from pliant.run import Run

STEPS = 200  # of the scale that weakens or tightens the estimates towards a budget
Estimates = Mapping[str, tuple[int, ...]]


def weakened(run: Run, layers: Layers, estimates: Estimates, form: str = "tucker2") -> list[Factor]:
    """Return the estimated ranks, or those at the highest scale that fits the budget.

    Scale 1 is full rank, 0 the estimates and -1 rank one, everywhere by the same share. A layer
    that would become no smaller is left out.

    Args:
        run: without limits the estimates are taken as they are.
        layers: what may be factorized.
        estimates: ranks by layer, in the order of their form.
        form: of kernels; a matrix takes svd.

    Raises:
        BudgetError: not even rank one everywhere is small enough.
    """
    costs = run.planner.rows()
    if not run.limits():
        return _at(0.0, layers, costs, estimates, form)

    def best(limits: Limits) -> list[Factor]:
        def tried(place: int) -> tuple[list[Factor], bool]:
            edits = _at(2 * place / STEPS - 1, layers, costs, estimates, form)
            return _tried(run, edits, limits)

        low, high = 0, STEPS
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if tried(middle)[1] else (low, middle - 1)
        edits, fits = tried(low)
        if not fits:
            raise BudgetError(
                "The budget cannot be met by factorizing at rank one: ask for more, or let the "
                "method touch more layers."
            )
        return edits

    return run.planner.settle(best)  # type: ignore[arg-type,return-value]


def form_of(module: Factorizable, form: str = "tucker2") -> str:
    """Return svd for a matrix and the form that is asked for a kernel."""
    return "svd" if kernel(module)[0, 0].numel() == 1 else form


def _at(
    scale: float,
    layers: Layers,
    costs: Mapping[str, LayerCost],
    estimates: Estimates,
    kind: str,
) -> list[Factor]:
    """Ranks between one (scale -1), the estimate (0) and full (1); only where it is smaller."""
    edits = []
    for name, module in layers.items():
        form = form_of(module, kind)
        most = max_ranks(kernel(module).shape, form)
        ranks = tuple(
            round(rank + scale * (top - rank)) if scale > 0 else max(1, round(rank * (1 + scale)))
            for rank, top in zip(estimates[name], most, strict=True)
        )
        edit = Factor(name, form, ranks)
        if edit.predict(costs[name]).params < costs[name].params:
            edits.append(edit)
    return edits


def _tried(run: Run, edits: list[Factor], limits: Limits) -> tuple[list[Factor], bool]:
    """The edits that are worth it on the target, if there is one, and whether they fit."""
    costs = run.planner.rows()
    options = {
        edit.layer: [
            Option(0.0, costs[edit.layer]),
            Option(1.0, edit.predict(costs[edit.layer]), edit),
        ]
        for edit in edits
    }
    priced, fixed = run.planner.priced(options)
    taken = [rows[-1] for rows in priced.values()]
    fits = all(
        getattr(fixed, axis) + sum(getattr(row.cost, axis) for row in taken) <= bound
        for axis, bound in limits.items()
    )
    return [row.edit for row in taken if row.edit is not None], fits
