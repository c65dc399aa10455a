"""The weights that read a unit: as columns, projected onto a ball, and kept at zero afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pliant.errors import TrainingError
from pliant.families.prune.scores import Groups, Scores
from pliant.math.balls import onto_l1, onto_l11, onto_l21, vanishing
from pliant.nn.kinds import in_rows, to_rows
from pliant.surgery.graph import Slot

Norm = Literal["l11", "l21", "l1"]


def readers_of(groups: Groups) -> list[str]:
    """Return the layers that read units, in the order of the groups, each once."""
    return list(
        dict.fromkeys(layer for group in groups for layer, side in group.slots if side == "in")
    )


def columns(module: Any) -> Tensor:
    """Return what reads each input channel of a layer, (channels, entries), the weight itself."""
    return _blocks(module, to_rows(module, module.weight)).flatten(0, 1).flatten(1)


@torch.no_grad()
def set_columns(module: Any, new: Tensor) -> None:
    """Put columns back into the weight of a layer, in place."""
    with in_rows(module, module.weight) as rows:
        blocks = _blocks(module, rows)
        blocks.copy_(new.view(blocks.shape))


def lost_at(model: nn.Module, groups: Groups, norm: Norm) -> dict[str, Tensor]:
    """Return for every unit the radius at which nothing reads it any more, (units,).

    As a share of each layer's own norm: the least over all columns that read it.
    """
    shares = {layer: _lost(model.get_submodule(layer), norm) for layer in readers_of(groups)}
    found = {}
    for group in groups:
        slots: Iterable[Slot] = (slot for slot in group.slots if slot[1] == "in")
        parts = [shares[slot[0]][group.rows(slot)].amin(1) for slot in slots]
        found[group.name] = torch.stack(parts).amin(0) if parts else torch.zeros(len(group.units))
    return found


def norm_of(module: Any, norm: Norm) -> float:
    """Return the norm of a layer's weight that a radius bounds."""
    weight = columns(module).detach().double()
    return float(weight.norm(dim=1).sum() if norm == "l21" else weight.abs().sum())


def project(model: nn.Module, radii: Mapping[str, float], norm: Norm) -> None:
    """Project the weights of layers onto balls, in place.

    Args:
        model: holds the layers.
        radii: of the ball of each layer, by its name.
        norm: l11 empties columns and thins out the others, l21 empties columns, l1 thins out.
    """
    onto = {"l11": onto_l11, "l21": onto_l21, "l1": _as_a_whole}[norm]
    for layer, radius in radii.items():
        module = model.get_submodule(layer)
        set_columns(module, onto(columns(module).detach().clone(), radius))


def radii_of(model: nn.Module, layers: Iterable[str], norm: Norm, share: float) -> dict[str, float]:
    """Return the radius of the ball of each layer: a share of its norm."""
    return {name: share * norm_of(model.get_submodule(name), norm) for name in layers}


def vanished(lost: Scores, radius: float, floors: Mapping[str, int]) -> dict[str, list[int]]:
    """Return the units that are lost at a radius, but for those that stay in any case.

    Args:
        lost: the radius at which each unit is: see `lost_at`.
        radius: as a share of each layer's norm.
        floors: how many units of each group stay.
    """
    found: dict[str, list[int]] = {}
    for name, shares in lost.items():
        order = (-shares).argsort(stable=True).tolist()
        order = order[: len(order) - floors[name]]
        found[name] = [unit for unit in order if shares[unit] >= radius]
    return found


def check_finite(model: nn.Module, layers: Iterable[str]) -> None:
    """Refuse weights that cannot be projected.

    Raises:
        TrainingError: those of a layer are not finite.
    """
    for name in layers:
        if not _weight(model, name).isfinite().all():
            raise TrainingError(
                f"Weights must stay finite to be projected, but those of {name} are not: lower "
                "the learning rate."
            )


def begin_anew(
    model: nn.Module,
    first: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    optimizers: Iterable[Optimizer],
) -> None:
    """Put the first tensors back, if there are any; hold zeros; forget the optimizers' state."""
    if first:
        model.load_state_dict(first)
    hold(model, masks)
    for optimizer in optimizers:
        optimizer.state.clear()


def supports(model: nn.Module, layers: Sequence[str]) -> dict[str, Tensor]:
    """Return by layer which weights are not zero."""
    return {layer: _weight(model, layer).detach() != 0 for layer in layers}


@torch.no_grad()
def hold(model: nn.Module, masks: Mapping[str, Tensor], *, gradients: bool = False) -> None:
    """Set to zero what masks say, in place: weights, or their gradients."""
    for layer, mask in masks.items():
        weight = _weight(model, layer)
        held = weight.grad if gradients else weight
        if held is not None:
            held.mul_(mask)


def _weight(model: nn.Module, layer: str) -> Tensor:
    weight: Any = model.get_submodule(layer).weight
    return weight


def _blocks(module: Any, rows: Tensor) -> Tensor:
    """View the rows of a weight as (groups, channels of a group, rows of a group, *kernel)."""
    blocks = rows.unflatten(0, (getattr(module, "groups", 1), -1))
    return blocks.transpose(1, 2)


def _lost(module: Any, norm: Norm) -> Tensor:
    weight = columns(module).detach().double().cpu()
    if norm == "l1":
        return vanishing(weight.abs().amax(1), weight)
    return vanishing(weight.abs().sum(1) if norm == "l11" else weight.norm(dim=1))


def _as_a_whole(weight: Tensor, radius: float) -> Tensor:
    return onto_l1(weight.flatten(), radius).view(weight.shape)
