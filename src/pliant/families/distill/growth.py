"""Networks that begin narrow and get channels while they train, the older weights held fast."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pliant.cost import call, evaluating, twin
from pliant.data.sources import moved
from pliant.data.splits import Split
from pliant.edits import Edit, Prune, Widen, replay
from pliant.edits.widen import NEW
from pliant.errors import EditError, nothing_for
from pliant.run import Run
from pliant.surgery.batchnorm import absorb, recalibrate
from pliant.surgery.graph import Group, Slot
from pliant.surgery.prove import cuttable, edits_of, unproven
from pliant.surgery.widen import widened

FEWEST = 2  # channels of a layer that can still be told apart, so that it can grow again
CALIBRATED = 512  # samples from which the batch norms of a candidate are re-estimated


def narrow(run: Run, share: float) -> None:
    """Leave every layer a share of its channels, those of the largest filters.

    What leaves gives on average goes into biases, where there are data, and batch norms follow.

    Raises:
        ModelError: no layer of the network can lose channels.
    """
    run.unwrap()
    groups, reasons = cuttable(run.model, run.example)
    run.keep_all(reasons)
    if not groups:
        what = "layer that could be narrower: it needs two layers in a row"
        raise nothing_for(what, reasons, "it has no layers with channels")
    leaving = {}
    for group in groups:
        kept = max(FEWEST, math.ceil(share * len(group.units) - 1e-9))
        order = _energies(run.model, group).argsort(stable=True).tolist()
        leaving[group.name] = sorted(order[: max(0, len(order) - kept)])
    failing = unproven(run.model, run.example, groups, leaving)
    edits = edits_of(run.model, [g for g in groups if g.name not in failing], leaving)
    if run.has_inputs:
        unread = {edit.layer: edit.removed() for edit in edits if edit.side == "in"}
        absorb(run.model, unread, run.inputs(CALIBRATED))
    run.apply(*edits)
    run.recalibrate()


def _energies(model: nn.Module, group: Group) -> Tensor:
    """The sum of squares of all weights that make each unit."""
    total = torch.zeros(len(group.units), dtype=torch.float64)
    for slot in group.makers:
        module: Any = model.get_submodule(slot[0])
        weight: Tensor = module.weight.detach()
        squares = weight.double().flatten(1).square().sum(1).cpu()
        total += squares[group.rows(slot)].sum(1)
    return total


def plants(run: Run, channels: int, seed: int) -> list[Widen]:
    """Return the edits that add new channels to every layer that may have them in the budget.

    Each layer alone is tried: what the network costs with all of them is not asked.

    Args:
        run: of the network as it is.
        channels: that come to each layer.
        seed: of the new filters.
    """
    groups, _ = cuttable(run.model, run.example)
    coming: dict[str, list[int]] = {}
    for group in groups:
        new = {group.name: [NEW] * channels}
        try:
            edits = widened(run.model, run.example, groups, new)
        except EditError:  # it can grow only with others
            continue
        if _affordable(run, edits):
            coming |= new
    return widened(run.model, run.example, groups, coming, seed=seed) if coming else []


def _affordable(run: Run, edits: Sequence[Widen]) -> bool:
    limits = run.limits()
    if not limits:
        return True
    tried = run.rehearsal()
    tried.apply(*edits)
    now = tried.planner.now()
    return all(getattr(now, axis) <= bound for axis, bound in limits.items() if axis != "latency")


def planted(model: nn.Module, edits: Sequence[Widen]) -> dict[str, Tensor]:
    """Say which numbers of every parameter are new once edits are made, as masks by name.

    Args:
        model: as it is before; not touched.
        edits: that add new channels.
    """
    blank = {n: torch.full_like(p, math.nan) for n, p in model.named_parameters() if _real(p)}
    return {name: ~value.isnan() for name, value in carried(model, blank, edits).items()}


def carried(
    model: nn.Module, values: Mapping[str, Tensor], edits: Iterable[Edit]
) -> dict[str, Tensor]:
    """Return what edits would make of parameters that hold other values.

    Args:
        model: not touched.
        values: in the place of parameters, by name.
        edits: of the model.
    """
    other = twin(model)
    with torch.no_grad():
        for name, value in values.items():
            other.get_parameter(name).copy_(value)
    replay(other, edits)
    return {name: p.detach() for name, p in other.named_parameters() if _real(p)}


def _real(parameter: Tensor) -> bool:
    return parameter.is_floating_point()


def candidates(run: Run, edits: Sequence[Widen]) -> dict[str, list[Prune]]:
    """Return, for each layer that got new channels, the edits that take all others out again.

    Args:
        run: of the network with all new channels.
        edits: that brought them.

    Returns:
        Edits by the name of a group of channels; under "" those that take out all.
    """
    places = {
        (e.layer, e.side): {place for place, old in enumerate(e.source) if old == NEW}
        for e in edits
    }
    groups, _ = cuttable(run.model, run.example)
    new = {
        group.name: [n for n, unit in enumerate(group.units) if unit[0][0] in places[slot]]
        for group in groups
        if (slot := group.slots[0]) in places
    }
    new = {name: units for name, units in new.items() if units}
    return {
        name: edits_of(run.model, groups, {n: units for n, units in new.items() if n != name})
        for name in ("", *new)
    }


def joined(edits: Sequence[Widen], cuts: Sequence[Prune]) -> list[Widen]:
    """Return the edits that bring only those new channels which cuts leave."""
    kept: dict[Slot, tuple[int, ...]] = {(cut.layer, cut.side): cut.keep for cut in cuts}
    rows = [
        replace(e, source=tuple(e.source[n] for n in kept.get((e.layer, e.side), range(e.to))))
        for e in edits
    ]
    return [edit for edit in rows if edit.to > edit.of]


def judged(run: Run, cuts: Sequence[Prune], samples: int) -> tuple[float, int]:
    """Return the loss of the task on validation data without some channels, and the parameters.

    The run's network stays as it is.

    Args:
        run: with data.
        cuts: made on a copy, whose batch norms are re-estimated then.
        samples: of the validation split, or of the training split where there is none.
    """
    model = twin(run.model)
    replay(model, cuts)
    recalibrate(model, run.inputs(CALIBRATED))
    assert run.data is not None
    device = next(model.parameters()).device
    total, seen = 0.0, 0
    split: Split = "val" if run.data.has("val") else "train"
    with evaluating(model), torch.no_grad():
        for batch in run.data.batches(split, 256):
            batch = moved(batch, device)
            output = call(model, run.inputs_of(batch))
            count = len(run.class_scores(output))
            total += float(run.task_loss(output, batch)) * count
            seen += count
            if seen >= samples:
                break
    return total / max(1, seen), sum(p.numel() for p in model.parameters())


def most_gained(known: Mapping[str, tuple[float, int]], *, per_parameter: bool) -> str:
    """Name the candidate that lowers the loss most, "" if none does.

    Args:
        known: of every candidate the loss and the number of parameters; under "" without any.
        per_parameter: divide what is gained by the parameters that come.

    >>> known = {"": (1.0, 100), "a": (0.8, 110), "b": (0.5, 200)}
    >>> most_gained(known, per_parameter=False), most_gained(known, per_parameter=True)
    ('b', 'a')
    """
    loss, size = known[""]
    gains = {
        name: (loss - found) / (count - size if per_parameter else 1)
        for name, (found, count) in known.items()
        if name
    }
    best = max(gains, key=lambda name: gains[name])
    return best if gains[best] > 0 else ""
