"""What leaves with channels in milliseconds, layer by layer, from the table of a target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from pliant.cost import LayerCost
from pliant.edits import Prune
from pliant.families.prune.scores import Groups
from pliant.latency.builds import edited
from pliant.latency.clock import Clock
from pliant.latency.table import input_shape
from pliant.run import Run
from pliant.surgery.prove import edits_of


def estimated(run: Run, edits: Sequence[Prune]) -> float:
    """Return the milliseconds of the network with some channels less, as a sum over its layers.

    What it takes beside its layers counts as fixed. Every width is measured once on the target,
    and kept in its table; sums ignore what layers do to one another, so they are no promise.

    Args:
        run: with a clock.
        edits: a cut.
    """
    assert run.clock is not None
    rows, total = run.planner.rows(), run.clock.timing.median_ms
    if run.edits:
        total = run.clock.weigh(run.model, ())[0]
    own: dict[str, list[Prune]] = {}
    for edit in edits:
        if edit.layer in rows:
            own.setdefault(edit.layer, []).append(edit)
    for name, cuts in own.items():
        layer = run.model.get_submodule(name)
        total -= run.clock.of_layer(run.model, name, rows[name]) * (
            1 - _share(run.clock, layer, rows[name], cuts)
        )
    return total


def _share(clock: Clock, layer: nn.Module, cost: LayerCost, cuts: Sequence[Prune]) -> float:
    """The part of a layer's time that is left; a narrower layer is taken to be no slower."""
    narrow: Any = layer
    batch, after = clock.target.batch, cost
    for cut in cuts:
        narrow, after = edited(narrow, cut), cut.predict(after)
    whole = clock.table.time(layer, input_shape(layer, cost, batch))
    return min(1.0, clock.table.time(narrow, input_shape(narrow, after, batch)) / whole)


def saved_ms(run: Run, groups: Groups) -> dict[str, float]:
    """Return what leaves with one unit of each group, in milliseconds.

    Times fall in steps: a unit counts by a whole step of the target, or two, or four, as many as
    it takes until something is saved.
    """
    assert run.clock is not None
    whole, found = estimated(run, ()), dict[str, float]()
    for group in groups:
        count = run.clock.table.step_within(len(group.units))
        saved = 0.0
        while saved <= 0 and count < len(group.units):
            edits = edits_of(run.model, [group], {group.name: range(count)})
            saved, count = (whole - estimated(run, edits)) / count, 2 * count
        found[group.name] = max(saved, 1e-9 * whole)
    return found
