"""What units have been worth lately: a decayed sum of their effects, and who is masked by it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pliant.cost import Example, call
from pliant.families.prune.allocate import counted_limits, within
from pliant.families.prune.gates import Gates, effects
from pliant.families.prune.ranking import ranking
from pliant.families.prune.scores import Groups, Scores, weakest
from pliant.observe.moments import surprise
from pliant.run import Run

MILESTONES = (0.5, 0.75, 0.95)  # shares of the training at which less is forgotten
BATCH = 64  # samples whose activations are held at once, without training
STEP = 0.1  # by which the decay rises at all of them but the last


def decay_at(progress: float, first: float) -> float:
    """Return the factor of old utilities at a part of the training; at last nothing is forgotten.

    >>> [round(decay_at(share, 0.6), 2) for share in (0.0, 0.5, 0.8, 0.95)]
    [0.6, 0.7, 0.8, 1.0]
    """
    passed = sum(progress >= milestone for milestone in MILESTONES)
    return 1.0 if passed == len(MILESTONES) else min(1.0, first + STEP * passed)


def utility(
    old: Tensor, effects: Sequence[Tensor], mask: Tensor, sizes: Mapping[str, int], decay: float
) -> Tensor:
    """Return the utilities after one step, (units,); those of masked units stay as they are.

    Args:
        old: the utilities before.
        effects: of every sample on the loss, (samples, units) each: see `Gates.take`. Where they
            are zero throughout a group, or not finite, nothing changes in it.
        mask: False for units that took no part.
        sizes: units of each group, in a row.
        decay: factor of the old utilities.
    """
    means = sum((effect.double().abs().sum(0) for effect in effects), torch.zeros_like(old))
    means = averaged(means) * mask
    new = []
    for value, mean, on in zip(
        *(each.split([*sizes.values()]) for each in (old, means, mask)), strict=True
    ):
        most = mean.max()
        known = bool(most.isfinite()) and bool(most > 0)
        new.append(torch.where(on, decay * value + mean / most, value) if known else value)
    return torch.cat(new)


def averaged(values: Tensor) -> Tensor:
    """Average over all processes that train together, so that all decide alike."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
        values = values / torch.distributed.get_world_size()
    return values


def masks(scores: Scores, floors: Mapping[str, int], count: int) -> Tensor:
    """Return which units take part, (units,) bool: all but so many of the smallest scores.

    Args:
        scores: of all units, by group; ties are masked in their order.
        floors: how many units of each group take part in any case.
        count: how many are masked, if the floors allow.
    """
    values, free = [], []
    for name, group in scores.items():
        order = weakest(group, len(group))
        may = torch.zeros(len(group), dtype=torch.bool)
        may[order[: len(group) - floors[name]]] = True
        values.append(group)
        free.append(may)
    barred = torch.cat(values).masked_fill(~torch.cat(free), torch.inf)
    taking = torch.ones(len(barred), dtype=torch.bool)
    taking[barred.argsort(stable=True)[: min(count, int(torch.cat(free).sum()))]] = False
    return taking


def looked_up(run: Run, groups: Groups, samples: int, decay: float) -> Tensor:
    """Return utilities without training, from labels that the network draws itself, (units,).

    Args:
        run: with the network and training inputs.
        groups: of channels.
        samples: training inputs to look at.
        decay: factor of old utilities.
    """
    sizes = {group.name: len(group.units) for group in groups}
    known = torch.zeros(sum(sizes.values())).double()
    gates, batches = Gates(run.model, groups), run.inputs(samples, batch=BATCH)

    def loss(inputs: Example) -> Tensor:
        return surprise(call(run.model, inputs), run.generator)

    for seen in effects(run.model, gates, batches, loss):
        known = utility(known, seen, known >= 0, sizes, decay)
    return known


def choose(run: Run, gates: Gates, ratio: float, *, anew: bool) -> None:
    """Choose who takes part in the next step; count anew how many do not, if asked.

    Args:
        run: its state holds utilities, floors, the mask and how many are masked.
        gates: of all units.
        ratio: share that is masked, without a budget.
        anew: count as few as the budget asks now.
    """
    scores, floors = gates.split(run.state["utility"]), run.state["floors"]
    if anew:
        run.state["masked"] = math.floor(ratio * len(gates.values) + 1e-9)
        if limits := counted_limits(run):
            ranked = ranking(scores, "global", floors)
            run.state["masked"] = len(within(run, gates.groups, ranked, limits))
    run.state["mask"] = masks(scores, floors, run.state["masked"])
    gates.values = run.state["mask"].float()
