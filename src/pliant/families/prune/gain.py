"""What the outputs lose of their information without a unit: gates of 1 on what layers read.

The divergence between the classes predicted with a unit and without it has no slope at a gate of
1, so the least that says anything is its second order, half the Fisher information of the gate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pliant.cost import Example, call, evaluating
from pliant.families.prune.fisher import pulls, readers_of_units, reading
from pliant.families.prune.scores import Groups
from pliant.observe.moments import surprise
from pliant.observe.outputs import logits
from pliant.observe.watch import samples, with_first
from pliant.surgery.graph import Group
from pliant.surgery.passes import slow_attention

Form = Literal["fisher", "exact", "entropy"]

ENUMERATED = 10  # classes up to which none is drawn


def gains(
    model: nn.Module,
    groups: Groups,
    batches: Sequence[Example],
    form: Form,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Return the information that every unit gives to the outputs, (units,) by group, in nats.

    Args:
        model: in eval mode meanwhile.
        groups: of channels; one gate is on all that reads a unit.
        batches: inputs of forward calls.
        form: "fisher": to second order; "exact": the divergence without the unit; "entropy": by
            how much the predictions get less certain without it, which may be below 0.
        generator: draws labels from predictions of more than ten classes.
    """
    if form == "fisher":
        return fisher(model, groups, batches, generator)
    totals = {group.name: torch.zeros(len(group.units)).double() for group in groups}
    with evaluating(model), torch.no_grad(), slow_attention():
        before = [_log(call(model, batch)) for batch in batches]
        for group in groups:
            for unit in range(len(group.units)):
                with gated(model, group, unit, 0.0):
                    after = [_log(call(model, batch)) for batch in batches]
                rows = zip(before, after, strict=True)
                totals[group.name][unit] = sum(_lost(*row, form) for row in rows)
    count = sum(map(samples, batches))
    return {name: total / max(1, count) for name, total in totals.items()}


def fisher(
    model: nn.Module, groups: Groups, batches: Sequence[Example], generator: torch.Generator
) -> dict[str, Tensor]:
    """Return half of the Fisher information of a gate on every unit, (units,) by group.

    Of up to ten classes every one counts by its probability; of more one is drawn.
    """
    totals = {group.name: torch.zeros(len(group.units)).double() for group in groups}
    readers, count = readers_of_units(groups), 0
    with reading(model, readers) as seen:
        for batch in batches:
            seen.clear()
            output, size = call(model, batch), samples(batch)
            for loss, weights, again in _losses(output, generator):
                own = _by_unit(pulls(model, loss, seen, centred=False, again=again), readers, size)
                for name, sums in own.items():
                    totals[name] += (weights[:, None] * sums.square()).sum(0)
            count += size
    return {name: total / (2 * max(1, count)) for name, total in totals.items()}


@contextmanager
def gated(model: nn.Module, group: Group, unit: int, gate: float) -> Iterator[None]:
    """Multiply one unit, wherever layers read it, inside of the block."""

    def hook(name: str, channels: Sequence[int]) -> Callable[..., Any]:
        axis = -1 if isinstance(model.get_submodule(name), nn.Linear) else 1

        def weaken(read: Tensor) -> Tensor:
            index = torch.tensor(channels, device=read.device)
            return read.clone().index_copy_(axis, index, gate * read.index_select(axis, index))

        return lambda module, args, kwargs: with_first(args, kwargs, weaken)

    places = zip(group.slots, group.units[unit], strict=True)
    read = [(slot[0], channels) for slot, channels in places if slot[1] == "in"]
    handles = [
        model.get_submodule(n).register_forward_pre_hook(hook(n, c), with_kwargs=True)
        for n, c in read
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _log(output: Any) -> Tensor:
    return logits(output).double().log_softmax(1)


def _lost(before: Tensor, after: Tensor, form: Form) -> float:
    if form == "exact":
        return float((before.exp() * (before - after)).sum())
    return float((before.exp() * before).sum() - (after.exp() * after).sum())


def _losses(output: Any, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Yield losses summed over samples, the weight of each sample, and whether more follow."""
    scores = logits(output)
    classes = scores.shape[1] if scores.dim() == 2 else 0
    if not 1 < classes <= ENUMERATED:
        yield surprise(output, generator), torch.ones(len(scores)).double(), False
        return
    log = scores.float().log_softmax(1)
    for label in range(classes):
        weights = log[:, label].detach().exp().double().cpu()
        yield -log[:, label].sum(), weights, label + 1 < classes


def _by_unit(
    found: Iterator[tuple[str, Tensor]],
    readers: Mapping[str, Sequence[tuple[str, Tensor]]],
    size: int,
) -> dict[str, Tensor]:
    """Add up the gradients of all readers of a unit, (samples, units) by group."""
    sums = dict[str, Tensor]()
    for layer, pull in found:
        for name, rows in readers[layer]:
            own = pull[:, rows.flatten()].unflatten(1, rows.shape).sum(2).double()
            if len(own) != size:  # rows of which the samples are not known: as one for each
                own = own.square().sum(0).div(size).sqrt().expand(size, -1)
            sums[name] = sums.get(name, 0) + own
    return sums
