"""The pattern of whole channels: which may leave a network, how they leave, what mends it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

from torch import nn

from pliant.cost import Example
from pliant.edits import Prune
from pliant.errors import ModelError
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
    groups, reasons = cuttable(run.model, run.example, routed(run))
    good = []
    for group in groups:
        barred = [unwanted[layer] for layer, _ in group.makers if layer not in chosen]
        if not barred:
            good.append(group)
        for layer, side in group.slots if barred else ():
            if side != "in":
                reasons[layer] = barred[0]
    touched = {layer for group in good for layer, _ in group.slots}
    for layer, reason in (unwanted | reasons).items():
        if layer not in touched:
            run.keep(layer, reason)
    if not good:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:3])
        raise ModelError(
            "The model has no channels that can be removed: it needs two layers in a row, of "
            f"which the first may be narrower ({why or 'it has no layers with channels'})."
        )
    return good


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
    run.apply(*edits)
    if recalibrate:
        run.recalibrate()


def silenced(run: Run, edits: Sequence[Prune]) -> nn.Module:
    """Copy the network so that nothing reads the channels that edits would remove.

    The copy computes what `remove` would make of the network, in the shapes of before.
    """
    model = copy.deepcopy(run.model)
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
