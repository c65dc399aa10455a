"""What channel-pruning methods share: choose groups, plan for the budget, cut, mend the norms."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from pliant.budget import Limits
from pliant.cost import cost, layer_costs
from pliant.edits import Prune
from pliant.errors import BudgetError, MethodError, ModelError
from pliant.families.prune.channels import (
    Place,
    after,
    fewest,
    floors_of,
    in_blocks,
    leaving,
    ranking,
    up_to,
)
from pliant.latency.clock import AIM, Clock
from pliant.run import Run
from pliant.surgery.batchnorm import absorb, recalibrate
from pliant.surgery.graph import Group
from pliant.surgery.prove import cuttable, edits_of, ignore, prove
from pliant.surgery.select import readable


@dataclass(frozen=True)
class Rounds:
    """How many channels leave, and when.

    Args:
        share: of the channels that leaves, without a budget.
        least: share of each group that stays in any case.
        rounds: number of cuts.
        during: share of the training over which they are spread; the first is at once.
    """

    share: float
    least: float
    rounds: int
    during: float

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise MethodError(f"The share of channels to remove lies in 0..1, not {self.share}.")
        if not 0 <= self.least <= 1:
            raise MethodError(f"least is a share of the channels in 0..1, not {self.least}.")
        if not 1 <= self.rounds <= MOST_ROUNDS:
            raise MethodError(f"rounds must lie in 1..{MOST_ROUNDS}, not {self.rounds}.")
        if not 0 <= self.during <= 1:
            raise MethodError(f"during is a share of the training in 0..1, not {self.during}.")

    def due(self, progress: float) -> int:
        """Return how many cuts are to be made when this share of the training is over."""
        if progress >= self.during:
            return self.rounds
        return min(self.rounds, 1 + int(progress * self.rounds / self.during + 1e-9))

    def step_share(self, done: int, *, final: bool) -> float:
        """Return the share of the channels left after so many cuts that the next one removes."""
        left = 1 - self.share * done / self.rounds
        after = 1 - self.share * (1 if final else (done + 1) / self.rounds)
        return 1 - after / left


MOST_ROUNDS = 8  # each adds edits to the file
LEAVING = 256  # samples that say what leaving channels give on average
SETTLING = 2048  # samples from which batch norms are re-estimated
LOOK = 512  # samples for the same in a copy that is only looked at


def subjects(run: Run, only: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[Group]:
    """Return the groups of channels that may leave, and record why others may not.

    A group is left out if one of the layers that make its channels is not to be touched.

    Raises:
        ModelError: there are none.
        MethodError: a name pattern matches no layer.
    """
    chosen, unwanted = readable(run.model, only=only, exclude=exclude)
    groups, reasons = cuttable(run.model, run.example)
    good = []
    for group in groups:
        barred = [unwanted[layer] for layer, _ in group.makers if layer not in chosen]
        if not barred:
            good.append(group)
        for layer, side in group.slots if barred else ():
            if side != "in":
                reasons[layer] = barred[0]
    touched = {layer for group in good for layer, _ in group.slots}
    for layer, reason in reasons.items():
        if layer not in touched:
            run.keep(layer, reason)
    if not good:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:3])
        raise ModelError(
            "The model has no channels that can be removed: it needs two layers in a row, of "
            f"which the first may be narrower ({why or 'it has no layers with channels'})."
        )
    return good


def plan(
    run: Run, groups: Sequence[Group], places: Sequence[Place], share: float, limits: Limits
) -> list[Prune]:
    """Plan a cut: the first of a ranking leave, as few as the limits allow, or a share without.

    Args:
        run: its model is to be cut.
        groups: of channels that may leave.
        places: their units, ranked.
        share: of the channels that leaves, if there are no limits.
        limits: of the budget, or a part of the way there.

    Raises:
        BudgetError: the limits cannot be met; the message names what is reachable.
    """
    chosen = within(run, groups, places, limits) if limits else up_to(places, share)
    return edits_of(run.model, groups, leaving(chosen))


def within(
    run: Run, groups: Sequence[Group], places: Sequence[Place], limits: Limits
) -> list[Place]:
    """Return the first places of a ranking whose leaving meets limits, as few as it takes.

    Numbers are counted exactly. Milliseconds are measured: of the network built whole without the
    channels, which then leave by blocks, since kernels are fast at multiples of some step.

    Raises:
        BudgetError: even without all of them a limit is missed; or the network takes too long
            without all of them, or longer than the dense one.
    """
    clock = run.clock if "latency" in limits else None
    blocks = _blocks(clock, groups, places) if clock else [[place] for place in places]

    def without(count: int) -> list[Prune]:
        return edits_of(run.model, groups, leaving(place for b in blocks[:count] for place in b))

    count = _counted(run, without, len(blocks), limits)
    if clock is not None:
        count = _measured(run, clock, without, count, len(blocks), limits["latency"])
    return [place for block in blocks[:count] for place in block]


Without = Callable[[int], list[Prune]]
"""Gives the edits that remove so many of the first places of a ranking."""


def _counted(run: Run, without: Without, most: int, limits: Limits) -> int:
    """Return the fewest places without which all that can be counted is within limits."""
    now, rows = cost(run.model, run.example), layer_costs(run.model, run.example)
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
    """Return the fewest places without which the network, built and measured whole, is in time.

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


def _blocks(clock: Clock, groups: Sequence[Group], places: Sequence[Place]) -> list[list[Place]]:
    """Gather places so that what stays of a group is a multiple of the target's step."""
    sizes = {group.name: len(group.units) for group in groups}
    steps = {name: clock.table.step_within(size) for name, size in sizes.items()}
    return in_blocks(places, sizes, steps)


def uniform_shares(
    run: Run, groups: Sequence[Group], share: float, *, least: float
) -> dict[str, float]:
    """Return the share of the units of every group that leaves: ``share``, or for the budget.

    For a budget it is the same for all, but for one unit or block more or less. Which units leave
    makes no difference to the cost, so it can be known before they are chosen.

    Raises:
        BudgetError: the budget cannot be met.
    """
    limits = run.limits()
    if not limits:
        return {group.name: share for group in groups}
    scores = {group.name: torch.zeros(len(group.units)) for group in groups}
    places = ranking(scores, "local", floors_of(groups, least))
    gone = leaving(within(run, groups, places, limits))
    return {g.name: len(gone.get(g.name, ())) / len(g.units) for g in groups}


Rank = Callable[[Run, Sequence[Group], Mapping[str, int]], list[Place]]
"""Ranks the units of groups, given how many of each stay at least."""


def cut_in_rounds(
    run: Run,
    rank: Rank,
    asked: Rounds,
    *,
    only: Sequence[str] = (),
    exclude: Sequence[str] = (),
    last: bool = False,
) -> None:
    """Make the cuts that are due: at once, or in rounds between which the network trains.

    Each round goes an equal part of the way, in cost where there is a budget and in channels
    otherwise. Groups and their ranking are those of the network as it is then.

    Args:
        run: keeps in its state how many rounds were made.
        rank: gives the units that may leave, the least worth first.
        asked: how much leaves, and when.
        only: name patterns of the layers to consider.
        exclude: name patterns of the layers to leave alone.
        last: no training follows, so go all the way now.
    """
    due = asked.rounds if last or not run.steps else asked.due(run.step / run.steps)
    while run.state.setdefault("rounds", 0) < due:
        done = run.state["rounds"]
        final = last or not run.steps or done + 1 == asked.rounds
        groups = subjects(run, only, exclude)
        floors = run.state.setdefault("floors", floors_of(groups, asked.least))
        places = rank(run, groups, floors)
        limits = on_the_way(run, run.limits(), 1.0 if final else 1 / (asked.rounds - done))
        edits = plan(run, groups, places, asked.step_share(done, final=final), limits)
        cut(run, edits, mend=final)
        run.state["rounds"] = asked.rounds if final else done + 1
        _keep_whole(run, groups, edits)


def on_the_way(run: Run, limits: Limits, part: float) -> Limits:
    """Return bounds that lie a part of the way from what the network costs now to limits."""
    if part == 1:
        return limits
    now = cost(run.model, run.example)
    if run.clock is not None and "latency" in limits:
        now = replace(now, latency_ms=run.clock.weigh(run.model, ())[0])
    return {
        axis: bound + max(0.0, getattr(now, axis) - bound) * (1 - part)
        for axis, bound in limits.items()
    }


def _keep_whole(run: Run, groups: Sequence[Group], edits: Sequence[Prune]) -> None:
    changed = {edit.layer for edit in (*run.edits, *edits)}
    for group in groups:
        for layer, _ in group.slots:
            if layer not in changed:
                run.keep(layer, "its channels are worth more than others")


def cut(run: Run, edits: Sequence[Prune], *, mend: bool = True) -> None:
    """Remove channels from the network, once it is proven that it runs without them.

    Args:
        run: its model is changed, its optimizer keeps the state of all that stays.
        edits: a plan.
        mend: afterwards put what the channels gave on average into the biases of the layers
            that read them, and re-estimate batch norms, where there is data.

    Raises:
        EditError: the network does not run without these channels.
    """
    if not edits:
        return
    prove(run.model, run.example, edits)
    known = mend and run.data is not None and run.data.has("train")
    if known:
        absorb(run.model, _unread(edits), run.inputs(LEAVING))
    run.apply(*edits)
    if known:
        recalibrate(run.model, run.inputs(SETTLING))


def silenced(run: Run, edits: Sequence[Prune]) -> nn.Module:
    """Copy the network so that nothing reads the channels that edits would remove, and mend it.

    The copy computes what `cut` would make of the network, in the shapes of before.
    """
    model = copy.deepcopy(run.model)
    if edits:
        absorb(model, _unread(edits), run.inputs(LEAVING))
        ignore(model, edits)
        recalibrate(model, run.inputs(LOOK))
    return model


def _unread(edits: Sequence[Prune]) -> dict[str, tuple[int, ...]]:
    return {edit.layer: edit.removed() for edit in edits if edit.side == "in"}
