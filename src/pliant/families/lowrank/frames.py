"""Coordinates in which every direction of a kernel counts for what it is worth to the loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pliant.errors import MethodError
from pliant.families.lowrank.factorize import Layers, look
from pliant.math.metric import SENSITIVITY_DAMPING, Metric
from pliant.math.moments import dampen
from pliant.math.reads import Rows
from pliant.nn.kinds import kernel
from pliant.run import Run

READING_DAMPING = 1e-2  # share of the mean eigenvalue added to what a layer reads: it is inverted
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Frame:
    """Whitens a kernel: W' = G^(1/2) W C^(1/2), over output and over input channels.

    With C the second moments of what the layer reads, as if the positions of a patch were
    uncorrelated, and G those of the loss's gradient by its outputs, losing a direction of W' with
    the singular value s raises the loss by about s^2 / 2 (`pliant.math.metric`). Both roots are
    scaled so that the kernel keeps its norm: a strength means the same as in the weights.

    Args:
        outputs: symmetric root of G, (T, T).
        inputs: symmetric root of C, (S, S). Without both: the weights' own coordinates.
    """

    outputs: Tensor | None = None
    inputs: Tensor | None = None

    @classmethod
    def of(cls, metric: Metric, weight: Tensor) -> Frame:
        """Return the frame of a metric, scaled to the norm of a kernel."""
        reads = metric.seen.channels(weight[0, 0].numel()).double()
        inputs = _root(dampen(reads, READING_DAMPING))
        outputs = torch.eye(len(weight), dtype=inputs.dtype, device=inputs.device)
        if metric.outputs is not None:
            given = metric.outputs
            given = given.dense() if isinstance(given, Rows) else given
            given = given if given.dim() > 1 else torch.diag(given)
            outputs = _root(dampen(given.double(), SENSITIVITY_DAMPING))
        plain = weight.detach().double()
        scale = float(plain.norm() / cls(outputs, inputs).enter(plain).norm().clamp_min(1e-30))
        return cls((outputs * scale).to(weight.dtype), inputs.to(weight.dtype))

    def enter(self, weight: Tensor) -> Tensor:
        """Whiten a kernel (T, S, *kernel); a gradient by the whitened one is turned back so too."""
        if self.outputs is None or self.inputs is None:
            return weight
        mixed = torch.einsum("ab,bs...->as...", self.outputs.to(weight.dtype), weight)
        return torch.einsum("as...,sc->ac...", mixed, self.inputs.to(weight.dtype)).contiguous()

    def leave(self, whitened: Tensor) -> Tensor:
        """Undo `enter`."""
        if self.outputs is None or self.inputs is None:
            return whitened
        inverses = (torch.linalg.inv(root.double()) for root in (self.outputs, self.inputs))
        return Frame(*inverses).enter(whitened)


def frames(run: Run, layers: Layers, samples: int) -> dict[str, Pair]:
    """Look at training inputs and return the frame of every layer, as tensors that a run keeps.

    Raises:
        MethodError: there are no training inputs, or none may be looked at.
    """
    plain = {n: m for n, m in layers.items() if kernel(m) is m.weight}
    seen = look(run, plain, samples)
    if not seen and plain:
        raise MethodError(
            'space="whitened" measures directions by training inputs, and there are none: pass '
            'data and samples above 0, or take space="weights".'
        )
    found = {name: Frame.of(metric, layers[name].weight) for name, metric in seen.items()}
    return {name: (frame.outputs, frame.inputs) for name, frame in found.items()}  # type: ignore[misc]


def _root(moments: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(moments)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T
