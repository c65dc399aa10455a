"""Shortcuts in regions: behind every residual block other channels may stay.

A region is what one block gives, up to the sum of the next. Tensors between blocks keep their
width, zero where a channel has left, so the sum of a block takes what its branch still makes at
its place, and any shortcut goes on working: an identity, a projection, one that pads channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pliant.cost import Example, call, twin
from pliant.edits import Edit, Insert, Prune
from pliant.edits.sides import CONVS
from pliant.errors import EditError
from pliant.nn.filters import WEIGHTED
from pliant.observe.watch import capture
from pliant.run import Run
from pliant.surgery.graph import Group, Slot
from pliant.surgery.passes import first_sample, randomized
from pliant.surgery.prove import Leaving, differs, edits_of, ignore

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Region:
    """What one block gives.

    Args:
        block: its name.
        group: its channels, each a unit: what makes them in the block, and who reads them.
        ends: the last layer of each branch of the block, before the sum.
        readers: the layers of the next block that read it.
    """

    block: str
    group: Group
    ends: tuple[str, ...]
    readers: tuple[str, ...]


def regions(model: nn.Module, example: Example, groups: Sequence[Group]) -> list[Region]:
    """Return the regions of a network, in its order.

    Args:
        model: any module.
        example: the inputs of one forward call.
        groups: of channels that may leave it, as they are tied by sums.
    """
    seen: dict[str, tuple[Any, Any]] = {}

    def see(name: str, given: Any, output: Any) -> None:
        seen.pop(name, None)
        seen[name] = given, output  # in the order in which calls ended

    names = [name for name, _ in model.named_modules() if name]
    one = first_sample(example, model)  # asked beforehand: asking calls the model too
    with capture(model, names, see):
        call(model, one)
    blocks = [name for name in seen if _is_block(model, name)]
    found = []
    for block in blocks:
        makers = _makers(model, block, seen, groups)
        if not makers:
            continue
        output = seen[block][1]
        following = [name for name in blocks if seen[name][0] is output]
        readers = [
            layer
            for layer in seen
            if any(layer.startswith(f"{name}.") for name in following)
            and type(model.get_submodule(layer)) in CONVS
            and model.get_submodule(layer).groups == 1
            and seen[layer][0] is output
        ]
        slots = (*makers, *((layer, "in") for layer in readers))
        units = tuple(((channel,),) * len(slots) for channel in range(output.shape[1]))
        ends = tuple(_ends(makers, list(seen)))
        found.append(Region(block, Group(block, slots, units), ends, tuple(readers)))
    return found


def others(groups: Sequence[Group], found: Sequence[Region]) -> list[Group]:
    """Return the groups whose channels are in no region."""
    taken = {slot for region in found for slot in region.group.slots if slot[1] != "in"}
    return [group for group in groups if not taken & {*group.slots}]


def with_regions(run: Run, groups: Sequence[Group]) -> tuple[list[Group], list[Region]]:
    """Return all groups, those of regions first, and the regions; note which layers stay."""
    found = regions(run.model, run.example, groups)
    inside = {layer for region in found for layer, _ in region.group.slots}
    for group in groups:
        for layer, _ in group.slots:
            if inside & {name for name, _ in group.makers} and layer not in inside:
                run.keep(layer, "only what blocks give to a shortcut leaves it")
    return [*(region.group for region in found), *others(groups, found)], found


def slimmed(
    model: nn.Module, groups: Sequence[Group], leaving: Leaving, found: Sequence[Region]
) -> list[Edit]:
    """Return the edits that remove units, those of regions with all that keeps sums whole.

    Args:
        model: as it is.
        groups: those of the regions among them.
        leaving: the units that leave, by group.
        found: the regions.
    """
    inside, behind = list[Edit](edits_of(model, groups, leaving)), list[Edit]()
    for region in found:
        width = len(region.group.units)
        gone = {*leaving.get(region.group.name, ())}
        stay = {"places": tuple(channel for channel in range(width) if channel not in gone)}
        if not gone:
            continue
        inside += [Insert(layer, "gather", stay, 0) for layer in region.readers]
        inside += [Insert(layer, "scatter", {**stay, "of": width}) for layer in region.ends]
        behind.append(Insert(region.block, "gather", stay))
        behind.append(Insert(region.block, "scatter", {**stay, "of": width}))
    return [*inside, *behind]


def prove_slimmed(
    model: nn.Module,
    example: Example,
    groups: Sequence[Group],
    leaving: Leaving,
    found: Sequence[Region],
) -> None:
    """Make sure that the slim network computes what the whole one does with zeros in its regions.

    Raises:
        EditError: it fails in forward, or computes something else.
    """
    random = randomized(model)
    whole = masked(random, groups, leaving, found)
    if problem := differs(whole, example, random, slimmed(model, groups, leaving, found)):
        raise EditError(f"These channels cannot be removed: without them {problem}.")


def masked(
    model: nn.Module, groups: Sequence[Group], leaving: Leaving, found: Sequence[Region]
) -> nn.Module:
    """Copy a network so that regions are zero, and nothing reads other units, where units left."""
    whole, names = twin(model), {region.group.name for region in found}
    inner = {name: units for name, units in leaving.items() if name not in names}
    ignore(whole, edits_of(whole, groups, inner))
    for region in found:
        mask = torch.ones(len(region.group.units))
        mask[list(leaving.get(region.group.name, ()))] = 0
        whole.get_submodule(region.block).register_forward_hook(_masking(mask))
    return whole


def unread(edits: Sequence[Edit], found: Sequence[Region]) -> dict[str, tuple[int, ...]]:
    """Return which input channels leave of layers that read no region."""
    readers = {layer for region in found for layer in region.readers}
    return {
        edit.layer: edit.removed()
        for edit in edits
        if isinstance(edit, Prune) and edit.side == "in" and edit.layer not in readers
    }


def _masking(mask: Tensor) -> Any:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * mask.to(output).view(-1, *[1] * (output.dim() - 2))

    return hook


def _is_block(model: nn.Module, name: str) -> bool:
    """Say whether a module is an innermost one with a forward of its own that holds layers."""
    module = model.get_submodule(name)
    inner = [part for part in module.modules() if part is not module]
    own = not isinstance(module, (*_CONTAINERS, *WEIGHTED))
    return (
        own
        and any(isinstance(part, WEIGHTED) for part in inner)
        and not any(
            not isinstance(part, _CONTAINERS) and any(True for _ in part.children())
            for part in inner
        )
    )


def _makers(
    model: nn.Module, block: str, seen: dict[str, tuple[Any, Any]], groups: Sequence[Group]
) -> list[Slot]:
    """The sides of layers in a block that make the channels of its sum; none if it has no sum."""
    given, output = seen[block]
    layers = [
        n for n in seen if n.startswith(f"{block}.") and type(model.get_submodule(n)) in CONVS
    ]
    if not isinstance(output, Tensor) or output.dim() < 3 or not layers:
        return []
    last = (layers[-1], "out")
    tied = [group for group in groups if last in group.slots]
    outside = any(
        side == "out" and not layer.startswith(f"{block}.")
        for group in tied
        for layer, side in group.slots
    )
    slots = dict.fromkeys(
        slot
        for group in tied
        for slot in group.slots
        if slot[1] != "in" and slot[0].startswith(f"{block}.")
    )
    wide = all(_channels(model, slot) == output.shape[1] for slot in slots)
    summed = outside or sum(side == "out" for _, side in slots) > 1
    return list(slots) if slots and wide and summed else []


def _channels(model: nn.Module, slot: Slot) -> int:
    module: Any = model.get_submodule(slot[0])
    return int(module.out_channels if slot[1] == "out" else module.num_features)


def _ends(makers: Sequence[Slot], order: Sequence[str]) -> Iterator[str]:
    """Of the makers of each branch the last one: a norm, or the convolution if it has none."""
    called = sorted((layer for layer, _ in makers), key=order.index)
    sides = dict(makers)
    for place, layer in enumerate(called):
        after = called[place + 1] if place + 1 < len(called) else None
        if after is None or sides[after] == "out":
            yield layer
