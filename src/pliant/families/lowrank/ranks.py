"""Ranks that fall and rise while a network trains in its factors, within one budget for all layers.

A network is planned as if it were dense again: every row of factors stands for its product. What
a direction is worth to the loss then says which ranks a layer is to have. The new factors are
those of the product, with the momentum that they would have had.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.budget import Budget, Option
from pliant.cost import call, evaluating
from pliant.data import unpack
from pliant.data.sources import moved
from pliant.edits import Edit, Factor, Rerank
from pliant.edits.rerank import Turn
from pliant.families.lowrank.factorize import BATCH, Form, Layers, choices
from pliant.families.lowrank.options import with_kernels
from pliant.math import forms
from pliant.math.metric import Metric
from pliant.nn import factorized as rows_of
from pliant.nn import layers as places
from pliant.observe.gradients import differentiated
from pliant.observe.outputs import logits
from pliant.observe.watch import samples as size_of
from pliant.run import Run


def dense_again(run: Run, split: Mapping[str, str], names: Sequence[str]) -> tuple[Run, Layers]:
    """Return a run of a copy of the network in which every row of factors is one layer again.

    Args:
        run: it stays as it is.
        split: the form of every layer that is a row now.
        names: the layers that are wanted.
    """
    again = run.rehearsal()
    again.edits.clear()
    model = again.model
    for name, form in split.items():
        row = model.get_submodule(name)
        assert isinstance(row, nn.Sequential)
        places.replace(model, name, rows_of.dense(row, form))
    layers = {name: model.get_submodule(name) for name in names}
    return again, layers  # type: ignore[return-value]


def plan_ranks(
    run: Run,
    layers: Layers,
    seen: Mapping[str, Metric],
    form: Form,
    split: Mapping[str, str],
    limits: Mapping[str, float],
    last: Mapping[str, float],
) -> list[Factor]:
    """Plan form and ranks of all layers for limits.

    A layer that is split keeps its form. One that is dense takes the form that it would have in
    the end, or stays dense for now.

    Args:
        run: of the network that is dense again.
        layers: its layers.
        seen: what they read and how much their outputs matter; empty for the weights alone.
        form: what the dense ones may become.
        split: the form of every layer that is a row now.
        limits: what the network may cost now, by axis.
        last: what it may cost in the end.

    Raises:
        BudgetError: the limits cannot be met.
    """
    options = choices(run, layers, form, seen)
    for name, kind in split.items():
        if name not in layers:
            continue
        own = forms_only(choices(run, {name: layers[name]}, kind, seen)[name], kind)  # type: ignore[arg-type]
        options[name] = own
    rule = {"rule": "sum" if seen else "max"}
    final = {edit.layer: edit.form for edit in _allocated(run, options, last, **rule)}
    if limits == last:
        return _allocated(run, options, last, **rule)
    kept = {
        name: [row for row in rows if row.edit is None or row.edit.form == final.get(name)]
        for name, rows in options.items()
    }
    return _allocated(run, kept, limits, **rule)


def changes(
    edits: Sequence[Factor],
    run: Run,
    layers: Layers,
    seen: Mapping[str, Metric],
    split: Mapping[str, str],
    *,
    grow: float,
    wanted: Mapping[str, Tensor],
) -> list[Edit]:
    """Return what makes planned ranks of the network as it is.

    Args:
        edits: the plan.
        run: of the network itself, in which layers of ``split`` are rows.
        layers: all of them as dense layers.
        seen: metrics to factorize in.
        split: the form of every layer that is a row now.
        grow: share of its ranks that each row gets on top, to be tried.
        wanted: the gradients of the loss by the dense kernels, of which new components read the
            strongest directions; they begin at zero. Layers without one get none.
    """
    found: list[Edit] = []
    for edit in with_kernels(edits, layers, seen):
        weight = layers[edit.layer].weight.detach()
        kernels = list(edit.kernels or forms.decompose(weight, edit.form, edit.ranks))
        before = None
        if edit.layer in split:
            row: Any = run.model.get_submodule(edit.layer)
            before = [child.weight.detach() for child in row]
        turns = None if before is None else _turns(before, kernels)
        if grow and edit.layer in wanted:
            kernels, turns = _grown(kernels, turns, wanted[edit.layer], edit, grow)
        ranks = tuple(len(kernel) for kernel in kernels[:-1])
        if before is None:
            found.append(Factor(edit.layer, edit.form, ranks, tuple(kernels)))
        else:
            found.append(Rerank(edit.layer, edit.form, ranks, tuple(kernels), turns))
    return found


def forms_of(found: Sequence[Edit]) -> dict[str, str]:
    """Return the forms of the rows of factors that edits make or change."""
    return {edit.layer: edit.form for edit in found if isinstance(edit, Factor | Rerank)}


def gradients(run: Run, layers: Layers, count: int, *, seed: int) -> dict[str, Tensor]:
    """Return the mean gradient of the loss by each kernel, over labelled training samples.

    Empty where nobody named the task and labels are not one class for each sample; frozen layers
    have none.
    """
    weights = {n: layer.weight for n, layer in layers.items() if layer.weight.requires_grad}
    if run.data is None or not run.has_inputs or not count or not weights:
        return {}
    done = 0
    found = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    with evaluating(run.model):
        for batch in run.data.batches("train", BATCH, seed=run.seed + seed, shuffle=True):
            loss = _summed(run, batch)
            if loss is None:
                return {}
            with differentiated(run.model):
                pulls = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            for name, pull in zip(weights, pulls, strict=True):
                found[name] += 0 if pull is None else pull
            done += size_of(unpack(batch)[0])
            if done >= count:
                break
    return {name: pull / max(1, done) for name, pull in found.items()}


def _summed(run: Run, batch: Any) -> Tensor | None:
    """Return the loss of a batch, summed over its samples; None where there is none."""
    inputs, labels = unpack(batch)
    task = run.task
    if task is not None:
        if task.loss is None or task.trains or labels is None:
            return None
        output = call(run.model, task.inputs(batch))
        there = moved(batch, next(run.model.parameters()).device)
        return task.total(output, there) * size_of(inputs)
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dim() != 1:
        return None
    scores = logits(call(run.model, inputs)).float()
    if scores.dim() != 2 or len(scores) != len(labels) or scores.shape[1] < 2:
        return None
    return F.cross_entropy(scores, labels.to(scores.device), reduction="sum")


def forms_only(options: Sequence[Option], form: str) -> list[Option]:
    """Return the options of one form; all of them where it has none that is smaller."""
    own = [row for row in options if row.edit is not None and row.edit.form == form]
    return own or list(options)


def _allocated(
    run: Run, options: Mapping[str, list[Option]], limits: Mapping[str, float], *, rule: str
) -> list[Factor]:
    budget = Budget(**{axis: max(1, int(bound)) for axis, bound in limits.items()})
    found = replace(run.planner, budget=budget).allocate(options, rule=rule)  # type: ignore[arg-type]
    return [edit for edit in found if isinstance(edit, Factor)]


def _turns(before: Sequence[Tensor], after: Sequence[Tensor]) -> tuple[Turn, ...]:
    """For every inner side what makes the new components out of the old ones: see `Rerank`."""
    found = []
    for side in range(len(after) - 1):
        old, new = (_halves(kernels, side) for kernels in (before, after))
        reads = new[0] @ torch.linalg.pinv(old[0])
        read = torch.linalg.pinv(old[1]) @ new[1]
        found.append((reads.float(), read.float()))
    return tuple(found)


def _halves(kernels: Sequence[Tensor], side: int) -> tuple[Tensor, Tensor]:
    """What is before and behind an inner side, as (rank, columns) and (rows, rank)."""
    parts = [kernel.double() for kernel in kernels]
    if len(parts) == 2:
        left, right = parts
    elif side == 0:
        core, last = parts[1], parts[2].flatten(1)
        left, right = parts[0], torch.einsum("tq,qr...->tr...", last, core)
    else:
        left = torch.einsum("qr...,rs->qs...", parts[1], parts[0].flatten(1))
        right = parts[2]
    return left.flatten(1), right.transpose(0, 1).flatten(1).T


def _grown(
    kernels: Sequence[Tensor],
    turns: tuple[Turn, ...] | None,
    gradient: Tensor,
    edit: Factor,
    share: float,
) -> tuple[list[Tensor], tuple[Turn, ...] | None]:
    """Add components that read where the loss pulls the dense kernel; their effect begins at 0."""
    most = forms.max_ranks(tuple(gradient.shape), edit.form)
    more = tuple(
        min(max(1, round(share * rank)), top - rank)
        for rank, top in zip(edit.ranks, most, strict=True)
    )
    if min(more) < 1:
        return list(kernels), turns
    extra = forms.decompose(gradient, edit.form, more, sweeps=1)
    first = torch.cat([kernels[0], _scaled(extra[0], kernels[0], dim=1)])
    found = [first]
    for kernel, new in zip(kernels[1:-1], extra[1:-1], strict=True):
        wide = torch.cat([kernel, kernel.new_zeros(len(kernel), more[0], *kernel.shape[2:])], 1)
        found.append(torch.cat([wide, wide.new_zeros(len(new), *wide.shape[1:])]))
    last = kernels[-1]
    new = last.new_zeros(len(last), more[-1], *last.shape[2:])
    if len(kernels) == 3:
        new = _scaled(extra[-1].transpose(0, 1), last.transpose(0, 1), dim=1).transpose(0, 1)
    found.append(torch.cat([last, new], 1))
    if turns is None:
        return found, None
    padded = [
        (F.pad(p, (0, 0, 0, add)), F.pad(q, (0, add)))
        for (p, q), add in zip(turns, more, strict=True)
    ]
    return found, tuple(padded)


def _scaled(new: Tensor, old: Tensor, dim: int) -> Tensor:
    """Give new components (rows) the mean norm of the old ones."""
    flat, mean = new.flatten(dim), old.flatten(dim).norm(dim=1).mean()
    return (flat * (mean / flat.norm(dim=1, keepdim=True).clamp_min(1e-30))).reshape(new.shape)
