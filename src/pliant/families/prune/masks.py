"""Soft masks: units of a network are weakened in place, never frozen, and may recover."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pliant.errors import TrainingError

Filters = Mapping[str, Tensor]
"""The rows of weights that make a kind of channels: by layer, a row of indices for every unit."""


def unit_norms(model: nn.Module, filters: Filters, *, order: float = 2.0) -> Tensor:
    """Return the norm of all filters of each unit, (units,).

    Args:
        model: holds the weights.
        filters: the rows of each unit.
        order: 2 for the Euclidean norm, 1 for the sum of magnitudes.
    """
    powers: list[Tensor] = []
    for layer, rows in filters.items():
        module: Any = model.get_submodule(layer)
        flat = module.weight.detach().double().flatten(1)
        norms = torch.linalg.vector_norm(flat, order, dim=1).cpu() ** order
        powers.append(norms[rows.cpu()].sum(1))
    total: Tensor = torch.stack(powers).sum(0)
    return total ** (1 / order)


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


@torch.no_grad()
def fade(tensor: Tensor, rows: Tensor, factor: float) -> None:
    """Multiply rows of a tensor, in place, by a factor."""
    index = rows.flatten().to(tensor.device)
    tensor[index] = tensor[index] * factor


@torch.no_grad()
def fade_small(tensor: Tensor, count: int, factor: float) -> None:
    """Multiply the smallest entries of a tensor, in place, by a factor."""
    chosen = weakest(tensor.detach().abs().flatten(), count)
    flags = torch.zeros(tensor.numel(), dtype=torch.bool, device=tensor.device)
    flags[chosen] = True
    tensor.copy_(torch.where(flags.view(tensor.shape), tensor * factor, tensor))
