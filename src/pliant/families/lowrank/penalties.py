"""The penalty of a search, as an exact gradient before a step or a proximal step after some.

Both forms of one penalty take equal nuclear norm per optimizer step: a proximal step is as long
as the way that the optimizer would go with the penalty's gradient, each parameter in its own group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pliant.families.lowrank.factorize import Form, Layers
from pliant.families.lowrank.frames import Frame, Pair, frames
from pliant.families.lowrank.goals import goals
from pliant.math.norms import penalty_gradient
from pliant.math.prox import THRESHOLDS, shrink
from pliant.math.svd import spectral_map
from pliant.nn.kinds import kernel
from pliant.nn.layers import Factorizable
from pliant.run import Run
from pliant.surgery.steps import scaling, way

Shrinkage = Literal[
    "reweighted", "relative", "soft", "gradient", "logdet", "schatten", "hoyer", "planned"
]
Space = Literal["weights", "whitened"]

TINY = 1e-30

GRADIENTS = {
    "gradient": "nuclear",
    "logdet": "logdet",
    "schatten": "schatten",
    "hoyer": "hoyer",
}
"""The gradients of functions of singular values, each with its penalty in `pliant.math.norms`."""

PULLS = (*GRADIENTS, "planned")
"""All that are gradients; that of ``planned`` is of half the squared distance to a goal."""


@dataclass(frozen=True)
class Penalty:
    """What pulls kernels to low rank.

    Args:
        kind: one of `PULLS`, or of `pliant.math.prox.THRESHOLDS`.
        space: whose singular values and distances are meant; ``whitened`` needs data.
        keep_norm: leave the norm of every kernel as it is: of a gradient to first order.
        samples: training inputs to look at for ``whitened`` and ``planned``.
        form: of the factors that ``planned`` pulls towards.
        p: energy that these keep, if there is no budget.
    """

    kind: Shrinkage
    space: Space
    keep_norm: bool
    samples: int
    form: Form
    p: float

    def look(self, run: Run, layers: Layers) -> dict[str, Any]:
        """Return the frames and goals of layers as they are now, for a run to keep."""
        whitened, planned = self.space == "whitened", self.kind == "planned"
        return {
            "frames": frames(run, layers, self.samples) if whitened else {},
            "goals": goals(run, layers, self.form, self.samples, self.p) if planned else {},
        }

    @torch.no_grad()
    def before_step(
        self,
        layers: Layers,
        alpha: float,
        frames: Mapping[str, Pair],
        goals: Mapping[str, Tensor],
    ) -> None:
        """Add alpha times the exact gradient to the gradients that are there, if it is one."""
        for name, module in _plain(layers) if self.kind in PULLS else ():
            weight = module.weight.detach()
            if module.weight.grad is None or (self.kind == "planned" and name not in goals):
                continue
            frame = Frame(*frames.get(name, ()))
            kernel = frame.enter(weight)
            if self.kind == "planned":
                pull = kernel - frame.enter(goals[name])
            else:
                pull = penalty_gradient(kernel, modes_of(weight), GRADIENTS[self.kind])
            if self.keep_norm:
                pull -= kernel * ((pull * kernel).sum() / kernel.square().sum().clamp_min(TINY))
            module.weight.grad.add_(frame.enter(pull), alpha=alpha)

    @torch.no_grad()
    def after_steps(
        self, run: Run, layers: Layers, alpha: float, frames: Mapping[str, Pair], *, steps: int
    ) -> None:
        """Take the proximal step of what so many steps with the penalty would have done.

        Unfoldings are shrunk one after the other. Without an optimizer a step is as long as alpha.
        A penalty that is a gradient has nothing to do here.
        """
        if self.kind in PULLS:
            return
        for name, module in _plain(layers):
            frame, weight = Frame(*frames.get(name, ())), module.weight
            for mode, far in _far(run, weight, self.kind, alpha, frame, steps).items():
                if far:
                    kernel, tau = frame.enter(weight.detach()), alpha * far
                    kernel = shrink(kernel, mode, tau, kind=self.kind, keep_norm=self.keep_norm)
                    weight.copy_(frame.leave(kernel))


def _plain(layers: Layers) -> list[tuple[str, Factorizable]]:
    """The layers that are pulled at: weights with their inputs first are factorized as they are."""
    return [(n, module) for n, module in layers.items() if kernel(module) is module.weight]


def _far(
    run: Run, weight: Tensor, kind: str, alpha: float, frame: Frame, steps: int
) -> dict[int, float]:
    """How far the optimizer would have gone in each unfolding, per unit of its penalty's gradient.

    An adaptive optimizer scales every entry of the gradient by itself; what counts is how much
    nuclear norm it would have taken so.
    """
    modes = modes_of(weight)
    if not run.optimizers:
        return dict.fromkeys(modes, float(steps))
    far = way(run.optimizers, weight, step=run.step, steps=steps)
    if not far or scaling(run.optimizers, weight, weight) is None:
        return dict.fromkeys(modes, far)
    kernel = frame.enter(weight.detach())
    forces = {m: spectral_map(kernel, m, lambda s: THRESHOLDS[kind](s, alpha)) for m in modes}
    together = frame.enter(torch.stack(list(forces.values())).sum(0))
    scale, found = scaling(run.optimizers, weight, together), {}
    assert scale is not None
    for mode, force in forces.items():
        polar = spectral_map(kernel, mode, torch.ones_like)
        gone = frame.enter(frame.enter(force) * scale)
        found[mode] = far * float((polar * gone).sum() / (polar * force).sum().clamp_min(TINY))
    return found


def modes_of(weight: Tensor) -> tuple[int, ...]:
    """Return the unfoldings to penalise: the two of a matrix have the same singular values."""
    return (0, 1) if weight[0, 0].numel() > 1 else (0,)
