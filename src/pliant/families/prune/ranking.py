"""Puts units in the order in which they leave: of all groups together, or of each by itself."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from pliant.families.prune.scores import Scores, weakest
from pliant.surgery.graph import Group

Scope = Literal["global", "local"]


@dataclass(frozen=True)
class Unit:
    """One unit in a ranking.

    Args:
        level: the share of units (of its group, or of all) that leave with it, at most 1.
        group: the name of its group.
        index: its number there.
    """

    level: float
    group: str
    index: int


def ranking(scores: Scores, scope: Scope, floors: Mapping[str, int] | None = None) -> list[Unit]:
    """Order the units that may leave, the least important first; ties stay in the model's order.

    Args:
        scores: of all units.
        scope: ``local`` takes the same share from every group; ``global`` compares all units, by
            their scores as they are.
        floors: how many units of a group stay at least; one always does.

    Raises:
        TrainingError: a score is not finite.
    """
    units = []
    for name, values in scores.items():
        count = len(values)
        order = weakest(values, count).tolist()
        most = count - max(1, (floors or {}).get(name, 1))
        for rank, index in enumerate(order[: max(0, most)]):
            level = (rank + 1) / count if scope == "local" else float(values[index])
            units.append(Unit(level, name, index))
    units.sort(key=lambda unit: unit.level)
    if scope == "local":
        return units
    total = sum(len(values) for values in scores.values())
    return [Unit((i + 1) / total, unit.group, unit.index) for i, unit in enumerate(units)]


def up_to(ranked: Iterable[Unit], ratio: float) -> list[Unit]:
    """Return the units up to a share: of every group, or of all."""
    return [unit for unit in ranked if unit.level <= ratio + 1e-9]


def in_blocks(
    ranked: Iterable[Unit], sizes: Mapping[str, int], steps: Mapping[str, int]
) -> list[list[Unit]]:
    """Gather units into blocks that leave whole, so that each group keeps multiples of its step.

    Blocks are ordered by the mean level of their units. Units that fill no block stay.

    Args:
        ranked: units in order.
        sizes: how many units each group has.
        steps: by group; with steps of 1 every unit is a block, and the ranking stays as it is.
    """
    own: dict[str, list[Unit]] = {}
    for unit in ranked:
        own.setdefault(unit.group, []).append(unit)
    blocks = []
    for name, members in own.items():
        start, end = 0, sizes[name] % steps[name] or steps[name]
        while end <= len(members):
            blocks.append(members[start:end])
            start, end = end, end + steps[name]
    return sorted(blocks, key=lambda block: fmean(unit.level for unit in block))


def by_group(units: Iterable[Unit]) -> dict[str, list[int]]:
    """Return the numbers of units, by group."""
    members: dict[str, list[int]] = {}
    for unit in units:
        members.setdefault(unit.group, []).append(unit.index)
    return members


def floors_of(groups: Iterable[Group], least: float) -> dict[str, int]:
    """Return how many units of each group stay if a share of them must."""
    return {group.name: max(1, math.ceil(least * len(group.units) - 1e-9)) for group in groups}
