"""How much a change of a kernel matters: second moments of what a layer reads and of what follows.

A change E of a kernel, as a matrix (T, S*prod(kernel)), raises the loss by about tr(G E C E^T) / 2
with C the second moments of the layer's input patches and G those of the loss's gradient by its
outputs (K-FAC: Martens and Grosse, ICML 2015, eq. 1-6). With G left out it is the error of the
layer's own output; with both left out the error of its weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pliant.math import forms
from pliant.math.moments import channel_moments, dampen
from pliant.math.svd import norm_shares

SENSITIVITY_DAMPING = 0.1
"""Share of the mean eigenvalue added to G: it is estimated from few gradients."""

SETTLING = 1200  # patch columns up to which forms without a closed solution sweep to the end
BRIEF = 2  # sweeps beyond
WHOLE = 5000  # patch columns up to which they use whole patches, and not channels alone


@dataclass(frozen=True, eq=False)
class Metric:
    """What a layer reads and how much its outputs matter.

    Args:
        inputs: C, (S*prod(kernel),) * 2, the mean over samples and positions.
        outputs: G, (T, T), the mean over samples of the sum over positions (as if the gradients
            of different positions were uncorrelated); None if the outputs count alike.
    """

    inputs: Tensor
    outputs: Tensor | None = None

    def enter(self, weight: Tensor) -> Tensor:
        """Scale a kernel's outputs so that plain errors of the result are sensitivities."""
        return weight if self.outputs is None else _mix(weight, self._roots[0])

    def leave(self, kernel: Tensor) -> Tensor:
        """Undo ``enter`` on the last kernel of a factorization."""
        return kernel if self.outputs is None else _mix(kernel, self._roots[1])

    def energy(self, weight: Tensor) -> float:
        """Return what losing the whole kernel would cost: tr(G W C W^T)."""
        flat = self.enter(weight).flatten(1).double()
        return float((flat @ self.inputs.double() * flat).sum())

    def decompose(
        self,
        weight: Tensor,
        form: str,
        ranks: tuple[int, ...],
        sizes: Sequence[tuple[int, ...]] = (),
    ) -> tuple[Tensor, ...]:
        """Factorize a kernel so that the damage in this metric is least.

        By sweeps where there is no closed solution: few of them for large kernels, and over
        channels instead of whole patches for the largest. ``sizes`` are ranks to which the
        factors will be cut (`pliant.math.forms.decompose`).
        """
        seen = self.inputs
        if len(seen) > WHOLE and form not in ("output", "svd"):
            seen = channel_moments(seen, weight[0, 0].numel())
        sweeps = forms.SWEEPS if len(self.inputs) <= SETTLING else BRIEF
        dense = self.enter(weight)
        *first, last = forms.decompose(dense, form, ranks, moments=seen, sweeps=sweeps, sizes=sizes)
        return tuple(norm_shares(*first, self.leave(last)))

    @cached_property
    def _roots(self) -> tuple[Tensor, Tensor]:
        assert self.outputs is not None
        values, vectors = torch.linalg.eigh(dampen(self.outputs.double(), SENSITIVITY_DAMPING))
        root = values.clamp_min(torch.finfo(values.dtype).tiny).sqrt()
        return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T


def _mix(kernel: Tensor, matrix: Tensor) -> Tensor:
    return torch.einsum("ab,b...->a...", matrix, kernel.double()).to(kernel.dtype)
