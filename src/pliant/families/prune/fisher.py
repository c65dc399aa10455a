"""What units are worth to the loss: the Fisher information of a mask on them, without labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from pliant.cost import Example, call
from pliant.observe.gradients import differentiated
from pliant.observe.moments import surprise
from pliant.observe.watch import record_gradients, samples, with_first
from pliant.surgery.graph import Group

Read = tuple[str, Tensor, GradientEdge]
"""A layer, what it read, and where gradients by that arrive."""


def group_fisher(
    model: nn.Module,
    groups: Sequence[Group],
    batches: Iterable[Example],
    generator: torch.Generator,
    loss: Callable[[int, Any], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return by how much the loss rises without each unit, to second order: (units,) per group.

    One mask m multiplies the channels of a unit wherever a layer reads them, so its gradient is
    the sum over all of these layers; without the unit the loss rises by half of the mean of
    (dL/dm)^2 (Liu et al., "Group Fisher Pruning", ICML 2021). What a unit gives on average counts
    for nothing here: biases and batch norms make up for it after a cut.

    Args:
        model: in eval mode meanwhile, and afterwards as it was.
        groups: of channels.
        batches: inputs of forward calls, samples on the first axis.
        generator: draws labels from the network's own predictions.
        loss: function of a batch's number and its output, summed over samples, whose gradients
            count instead.
    """
    totals = {g.name: torch.zeros(len(g.units), dtype=torch.float64) for g in groups}
    readers, count = readers_of_units(groups), 0
    with reading(model, readers) as seen:
        for number, batch in enumerate(batches):
            seen.clear()
            result, size = call(model, batch), samples(batch)
            pain = surprise(result, generator) if loss is None else loss(number, result)
            sums = {name: torch.zeros(size, len(total)) for name, total in totals.items()}
            for layer, pull in pulls(model, pain, seen):
                for name, rows in readers[layer]:
                    own = pull[:, rows.flatten()].unflatten(1, rows.shape).sum(2)
                    if len(own) == size:
                        sums[name] += own
                    else:  # rows that were routed here, of samples that are not known
                        totals[name] += own.double().square().sum(0)
            for name, total in totals.items():
                total += sums[name].double().square().sum(0)
            count += size
    return {name: total / (2 * max(1, count)) for name, total in totals.items()}


def readers_of_units(groups: Iterable[Group]) -> dict[str, list[tuple[str, Tensor]]]:
    """Say for every layer which units it reads at which channels, by group."""
    found: dict[str, list[tuple[str, Tensor]]] = {}
    for group in groups:
        for slot in group.slots:
            if slot[1] == "in":
                found.setdefault(slot[0], []).append((group.name, group.rows(slot)))
    return found


def pulls(
    model: nn.Module,
    loss: Tensor,
    seen: Iterable[Read],
    *,
    centred: bool = True,
    again: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the gradient of the loss by a mask on every channel of every input read.

    Args:
        model: that was called.
        loss: a number.
        seen: what `reading` noted in this call.
        centred: leave out what a channel gives on average.
        again: whether gradients of another loss of the same call will be asked for.
    """
    found = list(seen)
    if not found:  # none of them was called, as experts may be
        return
    layers, values, edges = zip(*found, strict=True)
    with differentiated(model):
        gradients: Sequence[Tensor | None] = torch.autograd.grad(
            loss, edges, allow_unused=True, retain_graph=again
        )
    for layer, value, gradient in zip(layers, values, gradients, strict=True):
        if gradient is None or not value.numel():
            continue
        axis = -1 if isinstance(model.get_submodule(layer), nn.Linear) else 1
        value, gradient = (
            each.float().movedim(axis, -1).reshape(len(each), -1, each.shape[axis])
            for each in (value, gradient)
        )
        value = value - value.mean((0, 1)) if centred else value
        yield layer, (value * gradient).sum(1).cpu()


@contextmanager
def reading(model: nn.Module, layers: Iterable[str]) -> Iterator[list[Read]]:
    """Note what layers read, each at a node of its own: gradients there came through it alone."""
    seen: list[Read] = []

    def hook(name: str) -> Callable[..., Any]:
        def note(read: Tensor) -> Tensor:
            # The sum with a zero that wants gradients: they arrive even if all weights are frozen.
            given = read + torch.zeros((), dtype=read.dtype, requires_grad=True).to(read)
            seen.append((name, given.detach(), get_gradient_edge(given)))
            return given

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            record_gradients(module, args)
            return with_first(args, kwargs, note)

        return before

    flags = {module: module.training for module in model.modules()}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(hook(name), with_kwargs=True)
        for name in layers
    ]
    try:
        with torch.enable_grad():
            model.eval()
            yield seen
    finally:
        for handle in handles:
            handle.remove()
        for module, flag in flags.items():
            module.training = flag
