"""WeightAlign: filters of one mean and spread keep activations in range, without batch norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pliant.edits import Replaced
from pliant.families.layers.alignable import alignable, calls, without_norms
from pliant.math.filters import RECTIFIED
from pliant.method import Method
from pliant.nn.align import Align, Aligned
from pliant.registry import In, Paper, register
from pliant.run import Run
from pliant.surgery.select import check_patterns, matches


@register(
    "weightalign",
    paper=Paper(
        "WeightAlign: Normalizing Activations by Weight Alignment",
        "X. Shi, Y. Li, X. Liu, J. van Gemert",
        "ICPR",
        2020,
        "https://arxiv.org/abs/2010.07160",
    ),
)
@dataclass(frozen=True)
class WeightAlign(Method):
    """Trains with filters of mean zero and fixed spread instead of batch norms.

    Every filter w becomes gain (w - mean) / sqrt(n/scale variance + eps), which keeps activations
    centred and of one variance without looking at any sample. So training does not depend on the
    size of the batch, and training and inference compute the same. Batch norms are taken out, and
    layers get biases instead; at the end the filters are folded into plain weights. It is a way
    to train a network from the start: the scales of trained batch norms are not kept. Without
    norms, clip the gradient (`Train(clip=5)`), and let every residual branch begin at nothing
    (``zero=("*.conv2",)`` for a ResNet), or its sums grow from block to block.

    *Departs from the paper*: its scale is 2, from He's argument for weights that are independent.
    Those of a filter without mean are not: they see the variance of rectified inputs, not their
    square, and activations would lose a third of their variance in every layer. The default makes
    up for it. Depthwise convolutions and the last layer stay as they are, as do batch norms right
    behind such layers.

    >>> WeightAlign(norms="keep", scale=2.0).scale
    2.0
    """

    norms: Literal["remove", "keep"] = "remove"  # batch norms: take them out, or work beside them
    # n times a filter's variance: 1 behind no rectifier; paper: 2
    scale: Annotated[float, In(0, 100, "low")] = RECTIFIED
    eps: Annotated[float, In(0, 1, "low")] = 1e-6  # under the root
    affine: bool = True  # learn a gain for every filter
    zero: tuple[str, ...] = ()  # name patterns of layers whose gains begin at 0: ends of branches
    depthwise: bool = False  # align depthwise convolutions too
    only: tuple[str, ...] = ()  # name patterns of the layers to align
    exclude: tuple[str, ...] = ()  # name patterns of the layers to leave alone

    def prepare(self, run: Run) -> None:
        """Take batch norms out, and let layers compute with aligned filters."""
        check_patterns(run.model, (*self.zero, *self.only, *self.exclude))
        seen = calls(run)
        layers = alignable(run, seen, self.only, self.exclude, depthwise=self.depthwise)
        if self.norms == "remove":
            run.apply(*without_norms(run, seen, layers))
        for name in layers:
            self._align(run, name)
        run.state["aligned"] = list(layers)

    def before_step(self, run: Run) -> None:
        """Keep the optimizer's weight decay off gains and biases."""
        spared = [layer.align.gain for layer in _aligned(run)]
        spared += [layer.layer.bias for layer in _aligned(run) if layer.layer.bias is not None]
        run.spare(spared)

    def finalize(self, run: Run) -> None:
        """Fold the filters; the gains leave the optimizer, and the moments of the old filters."""
        for aligned in _aligned(run):
            run.carry("", Replaced((aligned.raw, aligned.align.gain), (aligned.raw,)))
            aligned.remove()

    def _align(self, run: Run, name: str) -> None:
        layer = run.model.get_submodule(name)
        gain = 0.0 if matches(name, self.zero) else 1.0
        align = Align(layer, scale=self.scale, eps=self.eps, gain=gain, learn=self.affine)
        aligned = Aligned(layer, align)
        run.hook(aligned)
        if self.affine:
            run.carry(name, Replaced((aligned.raw,), (aligned.raw, align.gain)))


def _aligned(run: Run) -> list[Aligned]:
    """Return what this method put into the network."""
    return run.aside.all(Aligned)
