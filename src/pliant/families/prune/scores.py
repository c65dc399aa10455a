"""How important units are: by their weights, by the scales of their batch norms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pliant.errors import ModelError, TrainingError
from pliant.nn.kinds import to_rows
from pliant.run import Run
from pliant.surgery.graph import Group

Groups = Sequence[Group]

Scores = Mapping[str, Tensor]
"""For every group by name the importance of each of its units; those of the least leave first."""

Rows = Mapping[str, Tensor]
"""Where units are: by layer, a row of indices into its first axis for every unit."""

UNSCALED = "no batch norm scales its channels"


def importance(
    model: nn.Module,
    group: Group,
    *,
    of: Literal["weight", "batchnorm"] = "weight",
    order: int = 2,
) -> Tensor:
    """Return how large the weights of each unit are, (units,) in float64.

    Of all layers that a unit passes through, those that make its channels count, or the batch
    norms. The mean over all their weights makes groups of many and of few layers comparable.

    Args:
        model: holds the weights.
        group: of channels.
        of: the filters that make the channels, or the scales of the batch norms they pass.
        order: 1 for the mean magnitude, 2 for the root of the mean square.
    """
    rows = rows_of(group) if of == "weight" else _scales(model, group)
    return magnitudes(model, rows, order=order)


def rows_of(group: Group) -> dict[str, Tensor]:
    """Return which rows of weights make the channels of each unit, by layer."""
    return {slot[0]: group.rows(slot) for slot in group.makers}


def vectors(model: nn.Module, rows: Rows) -> Tensor:
    """Return all weights of each unit in a row, (units, weights) in float64 on the CPU."""
    parts = []
    for layer, indices in rows.items():
        module: Any = model.get_submodule(layer)
        weight = to_rows(module, module.weight.detach())
        taken = weight[indices.flatten().to(weight.device)]
        parts.append(taken.double().cpu().reshape(len(indices), -1))
    return torch.cat(parts, 1)


def magnitudes(model: nn.Module, rows: Rows, *, order: int = 2) -> Tensor:
    """Return the mean magnitude (or root mean square) of the weights of each unit, (units,)."""
    weights = vectors(model, rows)
    norms = torch.linalg.vector_norm(weights, order, dim=1)
    return norms / weights.shape[1] ** (1 / order)


def relative(scores: Scores) -> dict[str, Tensor]:
    """Return scores in units of the mean of their group, to compare layers that differ in scale."""
    return {name: values / values.mean().clamp_min(1e-12) for name, values in scores.items()}


def weakest(scores: Tensor, count: int) -> Tensor:
    """Return the indices of the smallest scores; ties go to the first.

    Raises:
        TrainingError: a score is not finite, so it has no place in an order.
    """
    if not torch.isfinite(scores).all():
        raise TrainingError(
            "Weights must stay finite to be ranked, but a norm is not: lower the learning rate."
        )
    return torch.argsort(scores, stable=True)[:count]


# ---------------------------------------------------------------- batch norms


def batchnorms(model: nn.Module) -> list[_BatchNorm]:
    """Return the batch norms of a network that have scales."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.affine]


def scaled(run: Run, groups: Groups) -> list[Group]:
    """Return the groups whose channels a batch norm scales, and record that others stay.

    Raises:
        ModelError: there are none.
    """
    chosen = []
    for group in groups:
        if _scales(run.model, group):
            chosen.append(group)
            continue
        for layer, _ in group.makers:
            run.keep(layer, UNSCALED)
    if not chosen:
        raise ModelError(
            "The model has no batch norm behind channels that can leave, so there are no scales "
            "to go by: take magnitude, which looks at filters."
        )
    return chosen


def _scales(model: nn.Module, group: Group) -> dict[str, Tensor]:
    """Return which scales of batch norms belong to each unit, by layer."""
    known = {id(norm) for norm in batchnorms(model)}
    return {
        slot[0]: group.rows(slot)
        for slot in group.slots
        if id(model.get_submodule(slot[0])) in known
    }
