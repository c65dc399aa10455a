"""The sizes of an elastic network: planned together, with factors that all of them share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise

import torch

from pliant.budget import Budget, Option
from pliant.edits import Factor, Nest
from pliant.errors import BudgetError, MethodError
from pliant.families.lowrank.factorize import Form, Layers, choices
from pliant.families.lowrank.nested import nested
from pliant.math.metric import Metric
from pliant.run import Run

MOST = 64  # sizes: each costs a plan, a calibration and a row in every table
Plan = dict[str, Factor]


def nests(
    run: Run,
    layers: Layers,
    seen: Mapping[str, Metric],
    form: Form,
    *,
    sizes: int,
    smallest: float,
    largest: float,
) -> list[Nest]:
    """Plan layers at the smallest size, then ranks at all sizes with the best forms.

    Those of the size in the middle can leave the smallest a rank of 1, and those of the smallest
    cost the others something: both are tried, and those of a size between. Plans are compared by
    what they lose at all sizes.

    Args:
        run: its budget, or without one the share ``largest`` of its parameters, is the largest
            size.
        layers: what may be factorized.
        seen: their metrics; empty for the weights alone.
        form: of the factors.
        sizes: how many.
        smallest: share of the largest that is the smallest; the next that can be met if it cannot.
        largest: share of the parameters without a budget.

    Raises:
        BudgetError: not even the largest can be met.
    """
    rows = choices(run, layers, form, seen)
    most = run.limits() or {"params": largest * run.cost.params}
    least, share = _smallest(run, rows, most, smallest)
    taken = {name: rows[name] for name in least}
    shares = torch.linspace(1.0, share, sizes, dtype=torch.float64).tolist()
    limits = [_scaled(most, part) for part in shares]
    found = [_at_all(run, taken, least, limits)]
    for size in (sizes // 2, 3 * sizes // 4):
        with suppress(BudgetError):  # the smallest size cannot have the forms of this one
            forms = least | _planned(run, taken, limits[size])
            found.append(_at_all(run, taken, forms, limits))
    scores = {row.edit: row.score for each in taken.values() for row in each if row.edit}
    best = min(found, key=lambda plans: sum(scores[e] for p in plans for e in p.values()))
    return _built(_falling(best), layers, seen)


def check_sizes(run: Run, norms: Sequence[str]) -> None:
    """Refuse a budget in milliseconds, and batch norms without inputs.

    Args:
        run: of the network.
        norms: names of batch norms whose statistics are to be re-estimated.

    Raises:
        MethodError: there are no training inputs.
        BudgetError: the budget bounds milliseconds.
    """
    if "latency" in run.limits():
        raise BudgetError(
            "elastic plans its sizes by params, macs or bytes, not by milliseconds: bound one "
            'of these, and pick a size by its latency with pliant.load(path, at="latency=...").'
        )
    if norms and not run.has_inputs:
        raise MethodError(
            f"elastic re-estimates batch norms, such as {norms[0]}, for every size when the "
            "training is over, and there are no training inputs: pass data, in a loop of "
            "your own too: pliant.start(..., data=pliant.Data(train=loader))."
        )


def _planned(run: Run, rows: dict[str, list[Option]], limits: dict[str, float]) -> Plan:
    # All of these are counts, so a whole number bounds them as well.
    budget = Budget(**{axis: max(1, int(bound)) for axis, bound in limits.items()})
    found = replace(run.planner, budget=budget).allocate(rows, rule="sum")
    return {edit.layer: edit for edit in found if isinstance(edit, Factor)}


def _at_all(
    run: Run, rows: Mapping[str, list[Option]], forms: Plan, limits: list[dict[str, float]]
) -> list[Plan]:
    """Plan all sizes with the same forms."""
    kept = {
        name: [row for row in rows[name] if row.edit and row.edit.form == edit.form]
        for name, edit in forms.items()
    }
    return [_planned(run, kept, each) for each in limits]


def _built(plans: Sequence[Plan], layers: Layers, seen: Mapping[str, Metric]) -> list[Nest]:
    """Compute the factors of all sizes."""
    edits = []
    for name, edit in plans[0].items():
        ranks = [plan[name].ranks for plan in plans]
        kernels = nested(layers[name].weight, edit.form, ranks, seen.get(name))
        edits.append(Nest(name, edit.form, sum(ranks, ()), kernels))
    return edits


def _scaled(limits: dict[str, float], share: float) -> dict[str, float]:
    return {axis: share * bound for axis, bound in limits.items()}


def _smallest(
    run: Run, rows: dict[str, list[Option]], most: dict[str, float], share: float
) -> tuple[Plan, float]:
    """Plan the smallest share of the budget that can be met, from the one asked for upwards."""
    steps = 16
    for step in range(steps + 1):
        part = share + (1 - share) * step / steps
        try:
            return _planned(run, rows, _scaled(most, part)), part
        except BudgetError:
            if step == steps:
                raise
    raise AssertionError


def _falling(plans: list[Plan]) -> list[Plan]:
    """Let no rank rise from one size to the next smaller one: that would not be nested."""
    for more, less in pairwise(plans):
        for name, edit in less.items():
            pairs = zip(edit.ranks, more[name].ranks, strict=True)
            less[name] = replace(edit, ranks=tuple(min(pair) for pair in pairs))
    return plans
