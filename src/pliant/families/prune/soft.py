"""Soft pruning: units are weakened in place, never frozen, and may recover before they leave."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pliant.families.prune.scores import Groups, Rows, rows_of, weakest
from pliant.nn.kinds import in_rows
from pliant.nn.layers import Factorizable

Decay = Literal["exponential", "linear", "constant"]

FULL_FROM = 0.95  # share of the epochs from which the whole ratio is pruned
VANISHED = 1e-4  # factors below this are 0

# ---------------------------------------------------------------- how much, and when


def ramp_at(epoch: int, epochs: float, ramp: float) -> float:
    """Return the part of the ratio that is weakened after an epoch: it rises to 1 asymptotically.

    Args:
        epoch: counted from 0.
        epochs: of the whole training.
        ramp: share of the training in which three quarters are reached; 0 for 1 at once.
    """
    if not ramp or epoch >= FULL_FROM * epochs:
        return 1.0
    return 1 - math.exp(-math.log(4) * epoch / (ramp * epochs))


def factor_at(
    epoch: int, epochs: float, first: float, last: float, decay: Decay, zero_from: float
) -> float:
    """Return the factor by which units are multiplied after an epoch: it falls from 1 to 0.

    Args:
        epoch: counted from 0.
        epochs: of the whole training.
        first: factor at the beginning.
        last: factor wanted at the end of an exponential decay.
        decay: how it falls.
        zero_from: share of the epochs from which it is 0.
    """
    if epoch >= zero_from * epochs:
        return 0.0
    if decay == "exponential" and first:
        first *= math.exp(math.log(last / (first + 0.01 * last)) * epoch / epochs)
    elif decay == "linear":
        first *= max(0.0, 1 - epoch / max(1.0, epochs - 1))
    return min(first, 1.0) if first >= VANISHED else 0.0


# ---------------------------------------------------------------- what


def kinds(groups: Groups) -> dict[str, dict[str, dict[str, Tensor]]]:
    """Return by group where the ``filters`` of its units are, and the ``norms`` behind them."""
    return {
        "filters": {group.name: rows_of(group) for group in groups},
        "norms": {
            group.name: {slot[0]: group.rows(slot) for slot in group.slots if slot[1] == "channels"}
            for group in groups
        },
    }


def alone(filters: Mapping[str, Rows], layers: Mapping[str, Factorizable]) -> dict[str, Rows]:
    """Return where the filters of other convolutions are, each a unit of its own.

    Args:
        filters: of the groups, whose layers are left out.
        layers: to consider, by name.
    """
    grouped = {layer for rows in filters.values() for layer in rows}
    sizes = {name: layer.weight.shape for name, layer in layers.items()}
    return {
        f"{name} alone": {name: torch.arange(size[0])[:, None]}
        for name, size in sizes.items()
        if name not in grouped and len(size) > 2
    }


def chosen(
    groups: Groups,
    ratios: Mapping[str, float],
    layers: Mapping[str, Factorizable],
    ratio: float,
) -> dict[str, Any]:
    """Return where ``filters`` and ``norms`` of units are, and the ``ratios`` at which they fade.

    Args:
        groups: whose units fade.
        ratios: of groups.
        layers: whose filters fade too, one by one, where they are in no group.
        ratio: of those without one, if there are no groups.
    """
    found: dict[str, Any] = kinds(groups)
    found["filters"] |= alone(found["filters"], layers)
    most = max(ratios.values(), default=ratio)
    return {**found, "ratios": {name: ratios.get(name, most) for name in found["filters"]}}


# ---------------------------------------------------------------- how


@torch.no_grad()
def fade(module: nn.Module, tensor: Tensor, rows: Tensor, factor: float) -> None:
    """Multiply rows of a tensor of a layer, in place, by a factor."""
    index = rows.flatten().to(tensor.device)
    with in_rows(module, tensor) as own:
        own[index] = own[index] * factor


@torch.no_grad()
def fade_small(tensor: Tensor, count: int, factor: float) -> None:
    """Multiply the smallest entries of a tensor, in place, by a factor."""
    chosen = weakest(tensor.detach().abs().flatten(), count)
    flags = torch.zeros(tensor.numel(), dtype=torch.bool, device=tensor.device)
    flags[chosen] = True
    tensor.copy_(torch.where(flags.view(tensor.shape), tensor * factor, tensor))


def fade_weights(model: nn.Module, layers: Iterable[str], share: float, factor: float) -> None:
    """Multiply a share of the weights of each layer, in place, the smallest, by a factor."""
    for layer in layers:
        weight: Any = model.get_submodule(layer).weight
        fade_small(weight, math.floor(weight.numel() * share + 1e-9), factor)


def fade_groups(
    model: nn.Module,
    filters: Mapping[str, Rows],
    norms: Mapping[str, Rows],
    units: Mapping[str, Sequence[int]],
    factor: float,
) -> None:
    """Multiply the filters of some units of each group, and their norms, by a factor."""
    for name, some in units.items():
        fade_units(model, filters[name], some, factor)
        fade_units(model, norms.get(name, {}), some, factor, ("weight", "bias"))


def fade_units(
    model: nn.Module,
    rows: Rows,
    units: Sequence[int],
    factor: float,
    names: Sequence[str] = ("weight",),
) -> None:
    """Multiply what belongs to some units, in place, by a factor.

    Args:
        model: holds the tensors.
        rows: of all units, by layer.
        units: the numbers of those that fade.
        factor: 0 silences them.
        names: of the tensors of each layer; what a layer does not have is left out.
    """
    for layer, indices in rows.items():
        for name in names:
            module = model.get_submodule(layer)
            tensor = getattr(module, name)
            if tensor is not None:
                fade(module, tensor, indices[list(units)], factor)
