"""Spends a ratio or a budget on ranked units: as few leave as it takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from pliant.budget import Limits
from pliant.cost import Cost, LayerCost
from pliant.edits import Prune
from pliant.edits.sides import every_side
from pliant.errors import BudgetError
from pliant.families.prune.ranking import (
    Unit,
    by_group,
    floors_of,
    in_blocks,
    ranking,
    up_to,
)
from pliant.families.prune.scores import Scores, weakest
from pliant.latency.clock import AIM, Clock
from pliant.run import Run
from pliant.surgery.graph import Group
from pliant.surgery.prove import edits_at, edits_of, gone_by_slot


@dataclass(frozen=True)
class Goal:
    """How far one cut goes.

    Args:
        ratio: share of the units now there that leaves, if there are no limits.
        limits: of the budget, or a part of the way there.
    """

    ratio: float
    limits: Limits = field(default_factory=dict)


def allocate(
    run: Run, groups: Sequence[Group], ranked: Sequence[Unit], goal: Goal
) -> dict[str, list[int]]:
    """Return which units leave, by group: the first of a ranking, as few as the goal allows.

    Raises:
        BudgetError: the limits cannot be met; the message names what is reachable.
    """
    if goal.limits:
        return by_group(within(run, groups, ranked, goal.limits))
    return by_group(up_to(ranked, goal.ratio))


def in_passes(
    run: Run,
    groups: Sequence[Group],
    goal: Goal,
    passes: int,
    ranked: Callable[[Sequence[Unit], int], Sequence[Unit]],
) -> dict[str, list[int]]:
    """Return which units leave, by group, where they are ranked anew several times on the way.

    Args:
        run: of the network.
        groups: of channels.
        goal: how far to go; each pass goes an equal part of the way.
        passes: how many.
        ranked: gives a ranking for those that are gone, which come first, and the pass, from 1.

    Raises:
        BudgetError: the limits cannot be met; the message names what is reachable.
    """
    gone: list[Unit] = []
    limits = counted_limits(run) if goal.limits else {}
    units: Sequence[Unit] = ()
    for done in range(1, passes + 1):
        units = ranked(gone, done)
        part = done / passes
        if not limits:
            gone = up_to(units, part * goal.ratio)
            continue
        try:
            gone = within(run, groups, units, on_the_way(run, limits, part))
        except BudgetError:  # the cut itself will say what cannot be met
            break
    return allocate(run, groups, units, goal)


def by_ratios(scores: Scores, ratios: Mapping[str, float], *, least: float) -> dict[str, list[int]]:
    """Return which units leave where every group has a ratio of its own: those of least importance.

    Args:
        scores: of all units.
        ratios: share of the units of each group that leaves.
        least: share that stays in any case; one unit always does.
    """
    leaving = {}
    for name, values in scores.items():
        most = len(values) - max(1, math.ceil(least * len(values) - 1e-9))
        count = math.floor(len(values) * ratios[name] + 1e-9)
        leaving[name] = weakest(values, min(most, count)).tolist()
    return leaving


def within(run: Run, groups: Sequence[Group], ranked: Sequence[Unit], limits: Limits) -> list[Unit]:
    """Return the first units of a ranking whose leaving meets limits, as few as it takes.

    Numbers are counted exactly. Milliseconds are measured: of the network built whole without the
    channels, which then leave by blocks, since kernels are fast at multiples of some step.

    Raises:
        BudgetError: even without all of them a limit is missed; or the network takes too long
            without all of them, or longer than the dense one.
    """
    clock = run.clock if "latency" in limits else None
    blocks = _blocks(clock, groups, ranked) if clock else [[unit] for unit in ranked]

    def without(count: int) -> list[Prune]:
        units = (unit for block in blocks[:count] for unit in block)
        return edits_of(run.model, groups, by_group(units))

    count = _counted(run, without, len(blocks), limits)
    if clock is not None:
        count = _measured(run, clock, without, count, len(blocks), limits["latency"])
    return [unit for block in blocks[:count] for unit in block]


Without = Callable[[int], list[Prune]]
"""Gives the edits that remove so many of the first units of a ranking."""


def _counted(run: Run, without: Without, most: int, limits: Limits) -> int:
    """Return the fewest units without which all that can be counted is within limits."""
    now, rows = run.planner.now(), run.planner.rows()
    bounds = {axis: bound for axis, bound in limits.items() if axis != "latency"}

    def missed(count: int) -> dict[str, float]:
        left = after(now, rows, without(count))
        return {a: getattr(left, a) for a, bound in bounds.items() if getattr(left, a) > bound}

    count = fewest(most, lambda count: not missed(count))
    if count is None:
        named = " and ".join(
            f"{axis}={bounds[axis]:,.0f} (the least reachable is {least:,})"
            for axis, least in missed(most).items()
        )
        raise BudgetError(
            f"The budget {named} cannot be met by the channels that may leave: allow more, lower "
            "the floor of the layers, or let the method touch more of them."
        )
    return count


def _measured(run: Run, clock: Clock, without: Without, least: int, most: int, limit: float) -> int:
    """Return the fewest units without which the network, built and measured whole, is in time.

    Times need not fall with the channels: what counts is that the cut returned was measured.
    """
    dense, times = clock.timing.median_ms, list[float]()
    if dense <= limit and not least and not run.edits:
        return 0
    allowed = min(limit, dense)

    def fits(count: int) -> bool:
        ms, slower = clock.weigh(run.model, without(count))
        times.append(ms)
        spare = count < most and limit < dense  # more can leave: two measurements are never equal
        return not slower and ms <= (AIM * allowed if spare else allowed)

    count = fewest(most, fits, least=least)
    if count is None:
        raise clock.missed(limit, min(times))
    return count


def fewest(most: int, fits: Callable[[int], bool], *, least: int = 0) -> int | None:
    """Return the fewest first units of a ranking that fit, None if not even all of them do.

    By bisection. The number returned was itself tried, so it fits however irregular ``fits`` is.

    Args:
        most: how many units there are.
        fits: whether the network does without so many of them.
        least: how many leave in any case.
    """
    if not fits(most):
        return None
    low, high = least, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return high


def _blocks(clock: Clock, groups: Sequence[Group], ranked: Sequence[Unit]) -> list[list[Unit]]:
    """Gather units so that what stays of a group is a multiple of the target's step."""
    sizes = {group.name: len(group.units) for group in groups}
    steps = {name: clock.table.step_within(size) for name, size in sizes.items()}
    return in_blocks(ranked, sizes, steps)


# ---------------------------------------------------------------- before units are scored


def uniform_ratios(
    run: Run, groups: Sequence[Group], ratio: float, *, least: float
) -> dict[str, float]:
    """Return the share of the units of every group that leaves: ``ratio``, or for the budget.

    For a budget it is the same for all, but for one unit or block more or less. Which units leave
    makes no difference to the cost, so it can be known before they are chosen.

    Raises:
        BudgetError: the budget cannot be met.
    """
    limits = run.limits()
    if not limits:
        return {group.name: ratio for group in groups}
    gone = by_group(within(run, groups, _unscored(groups, least), limits))
    return {g.name: len(gone.get(g.name, ())) / len(g.units) for g in groups}


def check_reachable(run: Run, groups: Sequence[Group], *, least: float) -> None:
    """Refuse a budget that is missed even if all units leave that may; milliseconds come later.

    Raises:
        BudgetError: the message names what is reachable.
    """
    limits = {axis: bound for axis, bound in run.limits().items() if axis != "latency"}
    if limits:
        within(run, groups, _unscored(groups, least), limits)


def _unscored(groups: Sequence[Group], least: float) -> list[Unit]:
    scores = {group.name: torch.zeros(len(group.units)) for group in groups}
    return ranking(scores, "local", floors_of(groups, least))


# ---------------------------------------------------------------- costs


def on_the_way(run: Run, limits: Limits, part: float) -> Limits:
    """Return bounds that lie a part of the way from what the network costs now to limits."""
    if part == 1:
        return limits
    now = run.planner.now()
    if run.clock is not None and "latency" in limits:
        now = replace(now, latency_ms=run.clock.weigh(run.model, ())[0])
    return {
        axis: bound + max(0.0, getattr(now, axis) - bound) * (1 - part)
        for axis, bound in limits.items()
    }


def counted_limits(run: Run) -> dict[str, float]:
    """Return the limits of the budget as numbers to count: see `counted`."""
    return counted(run, run.limits())


def counted(run: Run, limits: Limits) -> dict[str, float]:
    """Return limits as numbers to count; milliseconds fall about as multiply-accumulates do."""
    limits = dict(limits)
    if "latency" in limits:
        macs = limits.pop("latency") / max(run.cost.latency, 1e-12) * run.cost.macs
        limits["macs"] = min(macs, limits.get("macs", macs))
    return limits


def savings(
    run: Run, groups: Sequence[Group], gone: Sequence[Unit], axes: Sequence[str]
) -> dict[str, float]:
    """Return what leaves with one more unit of each group, as a share of the network.

    Args:
        run: its model is still whole.
        groups: of channels.
        gone: the units that leave in any case.
        axes: what is counted, each alike; all units save the same if there are none.
    """
    now, rows = run.planner.now(), run.planner.rows()
    members, saved = by_group(gone), dict[str, float]()
    modules, left = dict(run.model.named_modules()), gone_by_slot(groups, members)
    for group in groups:  # of each the layers that it passes, and no others
        mine = set(members.get(group.name, ()))
        one = next(unit for unit in range(len(group.units)) if unit not in mine)
        layers = {layer: modules[layer] for layer, _ in group.slots}
        here = after(now, rows, edits_at(layers, left))
        more = gone_by_slot([group], {group.name: [one]})
        for slot in [(n, side) for n, module in layers.items() for side in every_side(module)]:
            if slot in left:
                more[slot] = left[slot] | more.get(slot, set())
        there = after(now, rows, edits_at(layers, more))
        share = sum((getattr(here, a) - getattr(there, a)) / getattr(now, a) for a in axes)
        saved[group.name] = max(share, 1e-12) if axes else 1.0
    return saved


def after(now: Cost, rows: Mapping[str, LayerCost], edits: Iterable[Prune]) -> Cost:
    """Return what a network costs when edits are made, exactly, without making them.

    Args:
        now: its cost.
        rows: the cost of its layers.
        edits: a cut.
    """
    new: dict[str, LayerCost] = {}
    buffers = 0
    for edit in edits:
        if edit.layer in rows:  # a layer without parameters has no row
            new[edit.layer] = edit.predict(new.get(edit.layer, rows[edit.layer]))
        elif edit.each:
            buffers += edit.each[1] * len(edit.removed())
    return Cost(
        params=now.params + sum(row.params - rows[name].params for name, row in new.items()),
        macs=now.macs + sum(row.macs - rows[name].macs for name, row in new.items()),
        bytes=now.bytes - buffers + sum(r.bytes - rows[name].bytes for name, r in new.items()),
    )
