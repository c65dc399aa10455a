"""Groups of channels of which equally many must leave: halves of a chunk, and what meets by shape.

Nothing of one of them arrives at another, so marks do not show that they belong together: a
layer's output is cut in halves wherever its middle is, or zeros are made in the shape of a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from pliant.surgery.graph import Group, Slot

Fails = Callable[[Sequence[Group], Mapping[str, Sequence[int]]], bool]
"""Whether a network fails when these units of these groups leave."""


def evened(groups: Sequence[Group], fails: Fails) -> tuple[list[Group], list[Group]]:
    """Tie groups that can leave only in equal numbers.

    Args:
        groups: any of whose units may leave if equally many leave from all groups.
        fails: tries it.

    Returns:
        Groups of which any numbers may leave, units of tied ones side by side, and those that
        could be tied to no other.
    """
    if not _bound(groups, fails):
        return list(groups), []
    bound = [group for group in groups if fails([group], {group.name: some_of(group, 1)})]
    found, lost, left = {g.name: g for g in groups if g not in bound}, [], list(bound)
    while left:
        first, *others = left
        tied = _partners(first, [o for o in others if len(o.units) == len(first.units)], fails)
        if len(tied) > 1:
            found[first.name] = merged(tied)
        else:
            lost.append(first)
        left = [group for group in left if group not in tied]
    names = [group.name for group in groups]
    whole = sorted(found.values(), key=lambda group: names.index(group.name))
    if _bound(whole, fails):
        return [g for g in groups if g not in bound], bound
    return whole, lost


def _partners(first: Group, others: Sequence[Group], fails: Fails) -> list[Group]:
    """The fewest groups that can leave in equal numbers with a first one, which comes first."""

    def fail(some: Sequence[Group]) -> bool:
        return fails(some, {group.name: some_of(first, 1) for group in some})

    tied = [first, *others]
    if not others or fail(tied):
        return [first]
    for group in others:
        fewer = [other for other in tied if other is not group]
        if len(fewer) > 1 and not fail(fewer):
            tied = fewer
    return tied


def merged(groups: Sequence[Group]) -> Group:
    """Return one group whose units are those of several, in order, side by side."""
    slots: list[Slot] = list(dict.fromkeys(slot for group in groups for slot in group.slots))
    units = []
    for row in zip(*(group.units for group in groups), strict=True):
        channels: dict[Slot, list[int]] = {slot: [] for slot in slots}
        for group, unit in zip(groups, row, strict=True):
            for slot, places in zip(group.slots, unit, strict=True):
                channels[slot] += places
        units.append(tuple(tuple(sorted(channels[slot])) for slot in slots))
    return Group(groups[0].name, tuple(slots), tuple(units))


def _bound(groups: Sequence[Group], fails: Fails) -> bool:
    """Try other numbers of units, and others of them, in groups that are side by side."""
    return any(
        fails(groups, {g.name: some_of(g, place + shift) for place, g in enumerate(groups)})
        for shift in (0, 1)
    )


def some_of(group: Group, place: int) -> list[int]:
    """Some of the units, none of a few at times: another share, from another one on, by place."""
    size = len(group.units)
    return [(place + unit) % size for unit in range(size * (1, 3, 5)[place % 3] // 6)]
