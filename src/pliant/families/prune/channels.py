"""The pattern of whole channels: which may leave a network, how they leave, what mends it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from pliant.cost import Example, twin
from pliant.edits import Prune
from pliant.errors import nothing_for
from pliant.run import ROUTED, Run
from pliant.surgery.batchnorm import absorb, recalibrate
from pliant.surgery.graph import Group
from pliant.surgery.prove import cuttable, ignore
from pliant.surgery.select import readable

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
    left = unwanted | reasons
    run.keep_all({layer: reason for layer, reason in left.items() if layer not in touched})
    if not good:
        needs = "it needs two layers in a row, of which the first may be narrower"
        what = f"channels that can be removed: {needs}"
        raise nothing_for(what, reasons, "it has no layers with channels")
    return good


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
