"""Kernels pulled and cut to low rank while they stay whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pliant.math.forms import blocks
from pliant.math.norms import penalty_gradient
from pliant.math.rank import energy_rank
from pliant.math.svd import spectral_map, spectrum
from pliant.nn.kinds import kernel


def add_nuclear(layer: Any, form: str, strength: float) -> None:
    """Add the gradient of the nuclear norm of the matrix that a form decomposes.

    Args:
        layer: its weight has a gradient or none.
        form: "output" or "spatial", which is for kernels of more than one tap.
        strength: of the norm.
    """
    weight = kernel(layer).detach()
    view, mode = _matrix(weight, form)
    pull = penalty_gradient(view, (mode,)).reshape(weight.shape)
    if layer.weight.grad is not None:
        kernel(layer, layer.weight.grad).add_(pull, alpha=strength)


@torch.no_grad()
def cut(layer: Any, form: str, energy: float) -> None:
    """Cut a kernel to the rank that keeps a share of its energy.

    Args:
        layer: its weight is changed in place.
        form: see `add_nuclear`.
        energy: the share.
    """
    weight = kernel(layer)
    view, mode = _matrix(weight, form)
    rank = energy_rank(spectrum(view, mode), energy)

    def keep(sigma: Tensor) -> Tensor:
        return torch.where(sigma >= sigma.sort(descending=True)[0][rank - 1], sigma, 0.0)

    weight.copy_(spectral_map(view, mode, keep).reshape(weight.shape))


def _matrix(weight: Tensor, form: str) -> tuple[Tensor, int]:
    """Return the view that a form decomposes, and the mode along which."""
    form = form if weight[0, 0].numel() > 1 else "output"
    return blocks(weight, form), 0 if form == "output" else 1
