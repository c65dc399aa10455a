"""Plans which channels leave: scores, rankings, floors and budgets, each apart from the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

import torch
from torch import Tensor, nn

from pliant.cost import Cost, LayerCost
from pliant.edits.prune import Prune
from pliant.families.prune.masks import unit_norms, weakest
from pliant.surgery.graph import Group

Scope = Literal["global", "local"]
Scores = Mapping[str, Tensor]
"""For every group by name how much each of its units is worth."""


@dataclass(frozen=True)
class Place:
    """One unit in a ranking.

    Args:
        level: the share of channels (of its group, or of all) that leave with it, at most 1.
        group: the name of its group.
        unit: its number there.
    """

    level: float
    group: str
    unit: int


# ---------------------------------------------------------------- scores


def filter_norms(model: nn.Module, group: Group, *, order: float = 2.0) -> Tensor:
    """Return the norm of the filters that make the channels of each unit, all of them together.

    Args:
        model: holds the weights.
        group: of channels.
        order: 2 for the Euclidean norm, 1 for the sum of magnitudes.
    """
    return unit_norms(model, filters_of(group), order=order)


def filters_of(group: Group) -> dict[str, Tensor]:
    """Return the rows of weights that make the channels of each unit, by layer."""
    return {slot[0]: group.rows(slot) for slot in group.makers}


def random_scores(group: Group, generator: torch.Generator) -> Tensor:
    """Return a random number for every unit."""
    return torch.rand(len(group.units), generator=generator, dtype=torch.float64)


def relative(scores: Scores) -> dict[str, Tensor]:
    """Return scores in units of the mean of their group, to compare layers that differ in scale."""
    return {name: values / values.mean().clamp_min(1e-12) for name, values in scores.items()}


# ---------------------------------------------------------------- rankings


def ranking(scores: Scores, scope: Scope, floors: Mapping[str, int] | None = None) -> list[Place]:
    """Order the units that may leave, the least worth first; ties stay in the order of the model.

    Args:
        scores: of all units.
        scope: ``local`` takes the same share from every group; ``global`` compares all units, by
            their scores as they are.
        floors: how many units of a group stay at least; one always does.

    Raises:
        TrainingError: a score is not finite.
    """
    places = []
    for name, values in scores.items():
        count = len(values)
        order = weakest(values, count).tolist()
        most = count - max(1, (floors or {}).get(name, 1))
        for rank, unit in enumerate(order[: max(0, most)]):
            level = (rank + 1) / count if scope == "local" else float(values[unit])
            places.append(Place(level, name, unit))
    places.sort(key=lambda place: place.level)
    if scope == "local":
        return places
    return numbered(places, sum(len(values) for values in scores.values()))


def numbered(places: Iterable[Place], total: int) -> list[Place]:
    """Return places in this order, with levels as shares of so many units in all."""
    return [Place((i + 1) / total, p.group, p.unit) for i, p in enumerate(places)]


def up_to(places: Sequence[Place], share: float) -> list[Place]:
    """Return the places up to a share of the channels: of every group, or of all."""
    return [place for place in places if place.level <= share + 1e-9]


def in_blocks(
    places: Sequence[Place], sizes: Mapping[str, int], steps: Mapping[str, int]
) -> list[list[Place]]:
    """Gather places into blocks that leave whole, so that each group keeps multiples of its step.

    Blocks are ordered by the mean level of their units. Units that fill no block stay.

    Args:
        places: a ranking.
        sizes: how many units each group has.
        steps: by group; with steps of 1 every unit is a block, and the ranking stays as it is.
    """
    own: dict[str, list[Place]] = {}
    for place in places:
        own.setdefault(place.group, []).append(place)
    blocks = []
    for name, members in own.items():
        start, end = 0, sizes[name] % steps[name] or steps[name]
        while end <= len(members):
            blocks.append(members[start:end])
            start, end = end, end + steps[name]
    return sorted(blocks, key=lambda block: fmean(place.level for place in block))


def leaving(places: Iterable[Place]) -> dict[str, list[int]]:
    """Return the units that leave, by group."""
    found: dict[str, list[int]] = {}
    for place in places:
        found.setdefault(place.group, []).append(place.unit)
    return found


def floors_of(groups: Iterable[Group], least: float) -> dict[str, int]:
    """Return how many units of each group stay if a share of them must."""
    return {group.name: max(1, math.ceil(least * len(group.units) - 1e-9)) for group in groups}


# ---------------------------------------------------------------- budgets


def after(now: Cost, rows: Mapping[str, LayerCost], edits: Iterable[Prune]) -> Cost:
    """Return what a network costs when edits are made, exactly, without making them.

    Args:
        now: its cost.
        rows: the cost of its layers.
        edits: a cut.
    """
    new: dict[str, LayerCost] = {}
    for edit in edits:
        if edit.layer in rows:  # a layer without parameters has no row
            new[edit.layer] = edit.predict(new.get(edit.layer, rows[edit.layer]))
    return Cost(
        params=now.params + sum(row.params - rows[name].params for name, row in new.items()),
        macs=now.macs + sum(row.macs - rows[name].macs for name, row in new.items()),
        bytes=now.bytes + sum(row.bytes - rows[name].bytes for name, row in new.items()),
    )


def fewest(most: int, fits: Callable[[int], bool], *, least: int = 0) -> int | None:
    """Return the fewest first places of a ranking that fit, None if not even all of them do.

    By bisection. The number returned was itself tried, so it fits however irregular ``fits`` is.

    Args:
        most: how many places there are.
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
