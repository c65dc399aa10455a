"""Which channels must leave together, found by marking channels and seeing where they arrive.

Every channel of a layer's output gets a code and is made not-a-number in those samples of a
batch that its code names. One forward pass carries the marks through whatever stands between
layers: sums, concatenations, padding, slices, reshapes, pooling, gates. Where the next layers
read, the pattern of marks over the batch says which channel has arrived at which input. No
operation has to be known by name; one that mixes all channels (a softmax or a normalization over
them) marks them all, and they stay. Where a network does not let such numbers through (it checks
that they are finite, or makes distributions of them), marked values are moved instead, up and
down, and compared with those of a sample without marks. Nothing found here counts before
``pliant.surgery.prove`` has proven it on a copy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pliant.cost import Example
from pliant.edits.sides import is_tensor, tensor_of
from pliant.errors import ModelError
from pliant.nn.layers import shared_weights
from pliant.observe.readers import readers
from pliant.surgery.marks import Slot
from pliant.surgery.passes import first_sample
from pliant.surgery.probe import MOVES, Probe, spread
from pliant.surgery.select import READ, readable

MIXED = "{} takes its statistics over all of its channels: without some the others would change"
MEET = "all of its channels meet in one place, so none can leave alone"
SINGLE = "it has a single channel"


@dataclass(frozen=True)
class Group:
    """Channels of one kind: those of each unit must leave together, units leave one by one.

    Args:
        name: of the first layer that makes these channels; a number tells apart several groups
            of one layer, whose channels go different ways.
        slots: the sides of layers that the channels pass, in the order of the model.
        units: for each unit and each slot, the indices of its channels there.
    """

    name: str
    slots: tuple[Slot, ...]
    units: tuple[tuple[tuple[int, ...], ...], ...]

    def rows(self, slot: Slot) -> Tensor:
        """Return the indices in one slot as a matrix, a row for every unit."""
        place = self.slots.index(slot)
        return torch.tensor([unit[place] for unit in self.units])

    @property
    def makers(self) -> tuple[Slot, ...]:
        """The slots whose weights make the channels: outputs, and depthwise convolutions aside."""
        return tuple(slot for slot in self.slots if slot[1] == "out")


def trace(
    model: nn.Module,
    example: Example,
    others: Sequence[Example] = (),
    *,
    marks: Sequence[float] = (math.nan,),
    heads: Mapping[int, int] | None = None,
    apart: bool = False,
    brief: bool = False,
    seen: dict[str, dict[str, Any]] | None = None,
) -> tuple[list[Group], dict[str, str]]:
    """Find the groups of channels that may leave a network, and why other layers keep theirs.

    The model is not touched. Needs a forward pass for every few layers, on some copies of one
    sample; convolutions and linear layers themselves compute one sample only.

    Args:
        model: any module.
        example: the inputs of one forward call, samples on the first axis.
        others: further ones, for layers to which not every sample is routed.
        marks: not-a-number, or `MOVES`, which pass where a network takes such numbers out.
        heads: where the heads that an axis of channels is cut into leave whole, their width by
            the size of the axis.
        apart: whether norms over all channels are taken as if each channel were by itself.
        brief: whether passes may end when they see nothing new; `seen` is told so by "short".
        seen: gets what another trace may find more by, as arguments: "heads" where an axis is cut
            into heads, "marks" where not-a-number may have been taken out on its way.

    Returns:
        The groups in the order of the model, not proven yet, and for every layer none of whose
        outputs are in a group the reason.

    Raises:
        ModelError: the network answers with no tensor that marks could arrive in.
    """
    try:
        probe = spread(model, [example, *others], marks, heads, apart, brief)
    except ModelError as error:
        if error.__cause__ is None:
            raise
        # a model may object to such numbers in any way
        probe = spread(model, [example, *others], MOVES, heads, apart)
    if seen is not None:
        seen |= {"heads": {"heads": probe.headed}} if probe.headed else {}
        seen |= {"marks": {"marks": MOVES}} if probe.lossy else {}
        seen |= {"short": {}} if probe.brief.short else {}
    _pin_unreadable(model, example, probe)
    probe.tie_groups()
    return _groups(probe), _reasons(probe)


# ---------------------------------------------------------------- groups


def _pin_unreadable(model: nn.Module, example: Example, probe: Probe) -> None:
    """Keep the channels of layers whose tensors cannot be cut."""
    _, reasons = readable(model, every=True)
    tied = dict[str, str]()
    for name, reader in readers(model, first_sample(example, model)).items():
        reasons.setdefault(name, READ.format(reader))
    for names in shared_weights(model).values():
        for name in names:
            other = next(n for n in names if n != name)
            tied[name] = f"its weight is tied to {other}"
            reasons.setdefault(name.rpartition(".")[0], tied[name])
    for (name, side), size in probe.sizes.items():
        if is_tensor(side):
            reason = tied.get(f"{name}.{tensor_of(side)[0]}".lstrip("."))
        else:
            reason = reasons.get(name)
        if reason:
            probe.pin((name, side), range(size), reason)


def _groups(probe: Probe) -> list[Group]:
    pinned = {probe.union.find(channel) for channel in probe.pins}
    members: dict[int, dict[Slot, list[int]]] = {}
    for slot, size in probe.sizes.items():
        for channel in range(size):
            root = probe.union.find(probe.first[slot] + channel)
            if root not in pinned:
                members.setdefault(root, {}).setdefault(slot, []).append(channel)
    families: dict[tuple[tuple[Slot, int], ...], list[tuple[tuple[int, ...], ...]]] = {}
    for slots in members.values():
        if any(side == "out" for _, side in slots):
            kind = tuple((slot, len(channels)) for slot, channels in slots.items())
            families.setdefault(kind, []).append(tuple(map(tuple, slots.values())))
    return _named(
        [
            (tuple(slot for slot, _ in kind), units)
            for kind, units in families.items()
            if len(units) > 1
        ]
    )


def _named(found: Sequence[tuple[tuple[Slot, ...], Sequence[Any]]]) -> list[Group]:
    groups, seen = [], dict[str, int]()
    for slots, units in found:
        name = next(name for name, side in slots if side == "out")
        seen[name] = seen.get(name, 0) + 1
        own = name if seen[name] == 1 else f"{name}:{seen[name]}"
        groups.append(Group(own, slots, tuple(units)))
    return groups


def _reasons(probe: Probe) -> dict[str, str]:
    """Say for every layer why its channels stay, if nothing else is found out about them."""
    pins: dict[int, tuple[str, str]] = {}
    for channel, pin in probe.pins.items():
        pins.setdefault(probe.union.find(channel), pin)
    reasons, mixed = {}, {probe.union.find(c): name for c, name in probe.mixed.items()}
    for (name, side), size in probe.sizes.items():
        if side == "in" or is_tensor(side):
            continue
        roots = [probe.union.find(probe.first[name, side] + i) for i in range(size)]
        norm = next((MIXED.format(mixed[root]) for root in roots if root in mixed), MEET)
        layer, why = next((pins[root] for root in roots if root in pins), (name, norm))
        reasons[name] = why if layer == name else f"it shares channels with {layer}: {why}"
        if size < 2:
            reasons[name] = SINGLE
    return reasons
