"""The pattern of whole channels: which may leave a network, how they leave, what mends it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from pliant.cost import Example, twin
from pliant.edits import Prune
from pliant.edits.sides import sides
from pliant.errors import EditError, nothing_for
from pliant.run import ROUTED, Run
from pliant.surgery.batchnorm import absorb, recalibrate
from pliant.surgery.graph import Group
from pliant.surgery.prove import WITHOUT, cuttable, ignore, norms_cut
from pliant.surgery.select import readable

OVER_ALL = "it takes its statistics over all of its channels, so these stay"
OTHERS = "{} keeps its channels: they leave convolutions, Linear layers and norms of channels only"
FEWER = "it takes its statistics over fewer channels now, which changes what it gives"

ABSORBED = 256  # samples that say what leaving channels give on average
REHEARSED = 512  # samples from which batch norms are re-estimated in a copy that is only tried


def removable(run: Run, only: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[Group]:
    """Return the groups of channels that may leave, and record why others may not.

    A group is left out if one of the layers that make its channels is not to be touched.

    Raises:
        ModelError: there are none.
        MethodError: a name pattern matches no layer.
    """
    run.unwrap()
    chosen, unwanted = readable(run.model, only=only, exclude=exclude, every=True)
    groups, reasons = _found(run)
    good = []
    for group in groups:
        barred = [unwanted[layer] for layer, _ in group.makers if layer not in chosen]
        if not barred:
            good.append(group)
        for layer, side in group.slots if barred else ():
            if side != "in":
                reasons[layer] = barred[0]
    touched = {layer for group in good for layer, _ in group.slots}
    left = _others(run.model) | unwanted | reasons
    run.keep_all({layer: reason for layer, reason in left.items() if layer not in touched})
    if not good:
        needs = "it needs two layers in a row, of which the first may be narrower"
        what = f"channels that can be removed: {needs}"
        raise nothing_for(what, unwanted | reasons, "it has no layers with channels")
    return good


def _others(model: nn.Module) -> dict[str, str]:
    """Say of layers without sides that can be cut why their channels stay."""
    found = {}
    for name, module in model.named_modules():
        if not any(True for _ in module.parameters(recurse=False)) or sides(module):
            continue
        kind = type(module).__name__
        if "norm" in kind.lower():
            found[name] = OVER_ALL
        elif type(module).__module__.startswith("torch."):
            found[name] = OTHERS.format(kind)
    return found


@dataclass
class Found:
    """The groups that were found last, so that not every cut has to find and prove them anew.

    Args:
        groups: of the network.
        reasons: why others are none.
        shapes: of the network they were found in; another one has other groups.
    """

    groups: list[Group]
    reasons: dict[str, str]
    shapes: tuple[Any, ...]

    def of(self, model: nn.Module) -> bool:
        """Say whether a network is still the one they were found in."""
        return self.shapes == _shapes(model)

    def remove(self) -> None:
        """Forget them."""
        self.groups, self.shapes = [], ()


def _found(run: Run) -> tuple[list[Group], dict[str, str]]:
    """The groups of the network as it is, and why others are none."""
    known = run.aside.all(Found)
    found = known[0] if known else run.aside.put(Found([], {}, ()))
    if not found.of(run.model):
        found.groups, found.reasons = cuttable(run.model, run.example, routed(run))
        found.shapes = _shapes(run.model)
    return list(found.groups), dict(found.reasons)


def leave_out(run: Run, groups: Sequence[Group], failing: Mapping[str, str]) -> list[Group]:
    """Return the groups without those that cannot leave, and record why these do not.

    Args:
        run: later cuts do not find them again.
        groups: of channels.
        failing: what happens without some units, by the name of their group.

    Raises:
        EditError: no group is left.
    """
    left = [group for group in groups if group.name not in failing]
    if not left:
        first = next(iter(failing.values()))
        raise EditError(f"These channels cannot be removed: without them {first}.")
    stay = {layer for group in left for layer, _ in group.slots}
    for group in groups:
        for layer, side in group.slots if group.name in failing else ():
            if side != "in" and layer not in stay:
                run.keep(layer, f"{WITHOUT} {failing[group.name]}")
    for found in run.aside.all(Found):
        found.groups = [group for group in found.groups if group.name not in failing]
    return left


def _shapes(model: nn.Module) -> tuple[Any, ...]:
    return tuple(
        (name, type(module), *(tuple(p.shape) for p in module.parameters(recurse=False)))
        for name, module in model.named_modules()
    )


def after_cut(groups: Sequence[Group], edits: Sequence[Prune]) -> list[Group]:
    """Return what a cut leaves of groups, at its new places.

    Returns:
        The groups that would be found in the cut network, or nothing where they must be: with a
        single unit left, channels may come together anew.
    """
    places = {(e.layer, e.side): {old: new for new, old in enumerate(e.keep)} for e in edits}
    left = []
    for group in groups:
        maps = [places.get(slot) for slot in group.slots]
        units = [
            tuple(
                tuple(channels) if new is None else tuple(new[c] for c in channels if c in new)
                for channels, new in zip(unit, maps, strict=True)
            )
            for unit in group.units
        ]
        stay = tuple(unit for unit in units if all(unit))
        if len(stay) < 2:
            return []
        left.append(replace(group, units=stay))
    return left


def routed(run: Run) -> Iterator[Example]:
    """Yield inputs that may call layers which the example does not reach, if they are asked for."""
    if run.has_inputs:
        yield from run.inputs(ROUTED)


def remove(run: Run, edits: Sequence[Prune], *, recalibrate: bool = True) -> None:
    """Remove channels for good; prove the edits first.

    Args:
        run: its model is changed, its optimizer keeps the state of all that stays.
        edits: a cut.
        recalibrate: put what the channels gave on average into the biases of the layers that
            read them, and re-estimate batch norms afterwards, where there is data.
    """
    if not edits:
        return
    if recalibrate and run.has_inputs:
        absorb(run.model, _unread(edits), run.inputs(ABSORBED))
    known = run.aside.all(Found)
    left = after_cut(known[0].groups, edits) if known and known[0].of(run.model) else []
    if norms := norms_cut(run.model, edits):
        run.note(warnings=dict.fromkeys(norms, FEWER))
    run.apply(*edits)
    for found in known:
        found.groups, found.shapes = left, _shapes(run.model) if left else ()
    if recalibrate:
        run.recalibrate()


def silenced(run: Run, edits: Sequence[Prune]) -> nn.Module:
    """Copy the network so that nothing reads the channels that edits would remove.

    The copy computes what `remove` would make of the network, in the shapes of before.
    """
    model = twin(run.model)
    if edits:
        absorb(model, _unread(edits), run.inputs(ABSORBED))
        ignore(model, edits)
        recalibrate(model, run.inputs(REHEARSED))
    return model


def keep_whole(run: Run, groups: Sequence[Group]) -> None:
    """Record of the layers that no edit has changed that their channels are worth more."""
    changed = {edit.layer for edit in run.edits}
    for group in groups:
        for layer, _ in group.slots:
            if layer not in changed:
                run.keep(layer, "its channels are worth more than others")


def _unread(edits: Sequence[Prune]) -> dict[str, tuple[int, ...]]:
    return {edit.layer: edit.removed() for edit in edits if edit.side == "in"}
