"""Turns channels that come into edits, and proves on a copy that the network computes the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from pliant.cost import Example
from pliant.edits.sides import sides
from pliant.edits.widen import NEW, Widen, inserted
from pliant.errors import EditError
from pliant.surgery.graph import Group, Slot
from pliant.surgery.prove import prove_same

Coming = Mapping[str, Sequence[int]]
"""For every group by name, the units that come: the number of the unit to copy, or -1 for new."""


def widened(
    model: nn.Module,
    example: Example,
    groups: Iterable[Group],
    coming: Coming,
    *,
    spread: float = 0.0,
    seed: int = 0,
) -> list[Widen]:
    """Return the edits that add units to groups of channels, proven to change no output.

    Units come behind those of their group, in all layers that their channels pass.

    Args:
        model: not touched.
        example: the inputs of one forward call.
        groups: of ``pliant.surgery.graph.trace`` or ``pliant.surgery.prove.cuttable``.
        coming: what comes to which group.
        spread: see `Widen`.
        seed: see `Widen`.

    Raises:
        EditError: a group is not there or has no such unit, or the wider network fails in forward
            or computes something else.
    """
    known = {group.name: group for group in groups}
    after: dict[Slot, dict[int, tuple[int, ...]]] = {}
    for name, units in coming.items():
        group = _group(known, name, units)
        for slot in group.slots:
            after.setdefault(slot, {}).update(_behind(group.rows(slot), units))
    edits = [
        Widen(name, side, inserted(size, after[name, side]), size, spread, seed)
        for name, module in model.named_modules()
        for side, size in sides(module).items()
        if (name, side) in after
    ]
    prove_same(model, example, edits, "These channels cannot come")
    return edits


def _group(known: Mapping[str, Group], name: str, units: Sequence[int]) -> Group:
    if name not in known:
        raise EditError(
            f"There is no group of channels {name!r} that can become wider: the network has "
            f"{', '.join(known) or 'none'}."
        )
    most = len(known[name].units)
    if not all(NEW <= unit < most for unit in units):
        raise EditError(f"Units to copy in {name} lie in 0..{most - 1}, or are -1 for new ones.")
    return known[name]


def _behind(rows: Tensor, units: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """Name the channels that come, by the old channel that they stand behind.

    A unit may have channels in several places: one in every group of a convolution, as many as
    there are positions behind a flattening, one in each part of a concatenation. Places whose
    ranges overlap are one, behind whose last channel new units lie one after the other.

    Args:
        rows: channels of the group in one slot, a row for every unit.
        units: what comes.
    """
    places: list[Tensor] = []
    for column in rows[:, rows.min(0).values.argsort()].T:
        if places and int(column.min()) < int(places[-1].max()):
            places[-1] = torch.cat([places[-1], column[:, None]], 1)
        else:
            places.append(column[:, None])
    found = {}
    for own in places:
        copies = [own[unit].tolist() if unit != NEW else [NEW] * own.shape[1] for unit in units]
        found[int(own.max())] = tuple(channel for copy in copies for channel in copy)
    return found
