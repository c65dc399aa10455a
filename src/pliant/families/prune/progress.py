"""Pruning step by step in mid-training: how many units are weak, how far weights have moved."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from pliant.edits import Edit, Prune
from pliant.families.prune.channels import keep_whole, leave_out, remove
from pliant.families.prune.scores import Groups, Rows, Scores, importance, rows_of, weakest
from pliant.families.prune.soft import fade
from pliant.nn.kinds import in_rows, to_rows
from pliant.run import Run
from pliant.surgery.graph import Group
from pliant.surgery.prove import Leaving, edits_of, unproven

Course = Literal["exponential", "linear"]
Criterion = Literal["path", "net", "sum"]

RESET = ("weight", "bias")
STATISTICS = ("running_mean", "running_var")


def remaining(whole: int, ratio: float, cut: int, cuts: int, course: Course) -> float:
    """Return how many units are to be left after a cut; ``whole * (1 - ratio)`` after the last.

    Args:
        whole: units before the first cut.
        ratio: share of them that leaves with all cuts, below 1.
        cut: number of this cut, from 1.
        cuts: how many there are.
        course: "exponential": every cut takes the same share; "linear": the same number.

    >>> [round(remaining(64, 0.75, cut, 2, "exponential")) for cut in (0, 1, 2)]
    [64, 32, 16]
    """
    if course == "linear":
        return whole * (1 - ratio * cut / cuts)
    return whole * math.exp(math.log(1 - ratio) * cut / cuts)


def weak(now: int, left: float, least: int) -> int:
    """Return how many units are weak: those beyond what is to be left, rounded down."""
    return max(0, min(now - least, math.floor(now - left + 1e-9)))


def listened(groups: Groups) -> dict[str, dict[str, Tensor]]:
    """Return where the filters of units are, by group and layer."""
    return {group.name: rows_of(group) for group in groups}


@torch.no_grad()
def add_gradients(model: nn.Module, layers: Iterable[str], sums: Any, criterion: Criterion) -> None:
    """Add the gradients of one step to sums by layer, in place.

    Of "path" the l1 norm of each filter's gradient is added, (filters,); else the gradient itself.
    """
    for layer in layers:
        gradient = model.get_parameter(f"{layer}.weight").grad
        if gradient is not None and gradient.isfinite().all():
            own = to_rows(model.get_submodule(layer), gradient).flatten(1)
            own = own.abs().sum(1) if criterion == "path" else own
            sums[layer] = sums.get(layer, 0) + own.detach().float().cpu()


def moved(sums: Mapping[str, Tensor], rows: Rows, criterion: Criterion) -> Tensor | None:
    """Return how far the filters of each unit were pulled, (units,); None where it is not known."""
    parts = []
    for layer, indices in rows.items():
        if layer in sums and len(sums[layer]) > int(indices.max()):
            own = sums[layer].double()
            if criterion != "path":
                own = own.abs().sum(1) if criterion == "net" else own.sum(1).abs()
            parts.append(own[indices].sum(1))
    return torch.stack(parts).sum(0) if parts else None


def reset(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    group: Group,
    units: Sequence[int],
    *,
    norms: bool,
) -> None:
    """Zero the filters of some units, in place, and what optimizers know of them.

    Args:
        model: holds the tensors.
        optimizers: whose state is of the model's parameters.
        group: of the units.
        units: their numbers.
        norms: zero their batch norms too, statistics included.
    """
    places: list[tuple[str, Tensor, tuple[str, ...]]] = [
        (layer, rows, RESET) for layer, rows in rows_of(group).items()
    ]
    for slot in group.slots if norms else ():
        if isinstance(model.get_submodule(slot[0]), _BatchNorm):
            places.append((slot[0], group.rows(slot), (*RESET, *STATISTICS)))
    for layer, rows, names in places:
        for name in names:
            tensor = getattr(model.get_submodule(layer), name, None)
            for each in () if tensor is None else (tensor, *_states(optimizers, tensor)):
                fade(model.get_submodule(layer), each, rows[list(units)], 0.0)


def _states(optimizers: Sequence[Optimizer], tensor: Tensor) -> list[Tensor]:
    """All that optimizers keep of a parameter in its shape."""
    found = [each.state[tensor] for each in optimizers if tensor in each.state]
    values = [value for state in found for value in state.values()]
    return [v for v in values if isinstance(v, Tensor) and v.shape == tensor.shape]


@torch.no_grad()
def calm(model: nn.Module, rows: Mapping[str, Rows], fresh: Mapping[str, Sequence[int]]) -> None:
    """Shorten the gradients of filters that are zero to the median of the others, in place.

    A batch norm divides by next to nothing there: their first gradient is hundreds of times as
    long as those of others.
    """
    for name, units in fresh.items():
        for layer, indices in rows.get(name, {}).items():
            gradient = model.get_parameter(f"{layer}.weight").grad
            if gradient is None or not units:
                continue
            index = indices[list(units)].flatten().to(gradient.device)
            with in_rows(model.get_submodule(layer), gradient) as own:
                norms = own.flatten(1).norm(dim=1)
                others = torch.ones_like(norms, dtype=torch.bool)
                others[index] = False
                most = norms[others].median() if others.any() else norms.median()
                factor = (most / norms[index].clamp_min(1e-30)).clamp_max(1)
                own[index] = own[index] * factor.view(-1, *[1] * (own.dim() - 1))


def pulled(run: Run, groups: Groups, criterion: Criterion) -> dict[str, Tensor]:
    """Return how far each unit was pulled since the last cut; where nobody knows, its norm."""
    found = {}
    for group in groups:
        own = moved(run.state["sums"], run.state["rows"].get(group.name, {}), criterion)
        known = own is not None and len(own) == len(group.units)
        found[group.name] = own if own is not None and known else importance(run.model, group)
    return found


def weak_units(
    run: Run, scores: Scores, way: tuple[int, int, Course], hard: float
) -> dict[str, list[int]]:
    """Return the weak units that leave, and note those that become zero (``fresh``).

    Args:
        run: its state says how many units there were, and how many are to leave.
        scores: of the units that are left.
        way: number of this cut, how many there are, and how the number of units falls.
        hard: share of the weak units that leaves.
    """
    state, leaving = run.state, dict[str, list[int]]()
    for name, values in scores.items():
        left = remaining(state["whole"][name], state["ratios"][name], *way)
        found = weakest(values, weak(len(values), left, state["floors"][name])).tolist()
        count = int(hard * len(found))
        leaving[name], state["fresh"][name] = found[:count], found[count:]
    return leaving


def take(run: Run, groups: Groups, leaving: Leaving, *, norms: bool, last: bool) -> None:
    """Zero the units that are to begin anew, take out those that leave, and merge the cuts.

    Args:
        run: its state says which become zero (``fresh``).
        groups: of channels.
        leaving: the units of each that leave.
        norms: zero batch norms too.
        last: no cut follows.
    """
    for group in groups:
        reset(run.model, run.optimizers, group, run.state["fresh"][group.name], norms=norms)
    if failing := unproven(run.model, run.example, groups, leaving):
        groups = leave_out(run, groups, failing)
    edits = edits_of(run.model, groups, leaving)
    remove(run, edits, recalibrate=last)
    run.restate(merged(run.edits))
    if last:
        keep_whole(run, groups)


def moved_up(
    units: Mapping[str, Sequence[int]], gone: Mapping[str, Sequence[int]]
) -> dict[str, list[int]]:
    """Return the numbers that units have once others of their group have left.

    >>> moved_up({"a": [0, 3]}, {"a": [1, 2]})
    {'a': [0, 1]}
    """
    return {
        name: [unit - sum(other < unit for other in gone.get(name, ())) for unit in some]
        for name, some in units.items()
    }


def merged(edits: Iterable[Edit]) -> list[Edit]:
    """Return edits in which cuts of one side of a layer that follow one another are one.

    >>> one, other = Prune("a", "out", (0, 2, 3), 4), Prune("a", "out", (0, 2), 3)
    >>> merged([one, other])
    [Prune(layer='a', side='out', keep=(0, 3), of=4)]
    """
    found: list[Edit] = []
    places = dict[tuple[str, str], int]()
    for edit in edits:
        if not isinstance(edit, Prune):
            places.clear()
            found.append(edit)
            continue
        place = places.setdefault((edit.layer, edit.side), len(found))
        if place == len(found):
            found.append(edit)
            continue
        first: Any = found[place]
        keep = tuple(first.keep[channel] for channel in edit.keep)
        found[place] = replace(edit, keep=keep, of=first.of)
    return found
