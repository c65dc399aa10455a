"""The singular values of kernels, and the ranks that hold their energy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pliant.math.rank import energy_rank
from pliant.math.svd import spectrum
from pliant.nn.kinds import kernel
from pliant.nn.layers import Factorizable


def spectra(weight: Tensor) -> dict[str, Tensor]:
    """Return the singular values of the input and the output unfolding of a kernel."""
    return {"in": spectrum(weight.detach(), 1), "out": spectrum(weight.detach(), 0)}


def row(layers: Mapping[str, Factorizable], p: float) -> dict[str, Any]:
    """Return the spectra of layers and their ranks at energy ``p`` as plain data, for a history.

    Args:
        layers: by name.
        p: share of the energy that a rank must hold.
    """
    values = {name: spectra(kernel(module)) for name, module in layers.items()}
    return {
        "spectra": {
            name: {side: s.tolist() for side, s in sides.items()} for name, sides in values.items()
        },
        "ranks": {
            name: [energy_rank(s, p) for s in sides.values()] for name, sides in values.items()
        },
    }
