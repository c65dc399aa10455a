"""DRAN: every input weighs the skip connections between all blocks of a row for itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from pliant.edits import Swap
from pliant.errors import ModelError
from pliant.families.layers.rows import rows
from pliant.families.layers.trunks import coefficients
from pliant.method import Method
from pliant.registry import In, Paper, register
from pliant.run import Run
from pliant.surgery.fold import foldable


@register(
    "dran",
    paper=Paper(
        "Single Image Super-Resolution with Dynamic Residual Connection",
        "K. Park, J. W. Soh, N. I. Cho",
        "ICPR",
        2020,
        "https://github.com/saturnian77/DRAN",
    ),
)
@dataclass(frozen=True)
class DRAN(Method):
    """Lets blocks add all features before them, weighed by coefficients computed of the input.

    Three small convolutions read what goes into a row of blocks, and give one number for each
    block and each feature before it. They begin as zeros, so the network begins as it was, and
    learn with it: it does not become smaller. ``freeze`` puts the means over training inputs in
    their place at the end, without those that are small: a fixed wiring that costs a few sums. At
    the end batch norms become part of the layers before them. The whole network for
    super-resolution is ``pliant.zoo.build("dran-x2")``.

    *Measured* (bench ``enlarge``: four blocks of 16 channels, 500 steps on six photographs, Set5
    enlarged twice, three seeds): 32.94 ± 0.19 dB beside 33.37 ± 0.08 dB of connections that are
    fixed, and 33.97 dB of bicubic interpolation: too short a training, in which dynamic ones
    trailed. Their coefficients hardly differed between images: at their means 32.93 ± 0.20 dB.

    *Departs from the paper*: coefficients read the features at the beginning of a row, not the
    image, and blocks keep the skip connection that they have, beside the weighed ones; the frozen
    wiring is ours. The network of the zoo is the paper's.

    >>> DRAN(freeze=True).least
    2
    """

    least: Annotated[int, In(1, 64)] = 2  # M, blocks of one shape in a row, at least
    freeze: bool = False  # fix the coefficients at the end
    small: Annotated[float, In(0, 1e3)] = 0.0  # delta: smaller ones are left out when they freeze
    samples: Annotated[int, In(1)] = 256  # training inputs that means are taken over
    only: tuple[str, ...] = ()  # name patterns of the rows (nn.Sequential) to take
    exclude: tuple[str, ...] = ()  # name patterns of the rows to leave alone

    def prepare(self, run: Run) -> None:
        """Put the trunks in."""
        found = rows(run, self.least, self.only, self.exclude)
        if not found:
            raise ModelError(
                f"dran needs rows of blocks, an nn.Sequential in which {self.least} or more blocks "
                "with layers in them give maps of the shape that they read, but the model has none "
                "that it may take."
            )
        for name in run.layers:
            run.keep(name, "its block has other skip connections, or it is in no row of blocks")
        run.apply(
            *(
                Swap(row.name, "dynamic_residual", {"channels": row.channels}, run.seed)
                for row in found
            )
        )

    @torch.no_grad()
    def finalize(self, run: Run) -> None:
        """Note how much coefficients differ between inputs, freeze them, and fold batch norms."""
        told = coefficients(run, self.samples)
        for name, given in told.items():
            spread = float(given.std(0, correction=0).mean())
            run.note(trunk=name, mean=float(given.mean()), spread=spread)
        if self.freeze:
            run.apply(*(self._fixed(name, given.mean(0)) for name, given in told.items()))
        run.apply(*foldable(run.model, run.example))

    def _fixed(self, name: str, means: Tensor) -> Swap:
        kept = [at for at, value in enumerate(means.tolist()) if abs(value) > self.small]
        spec = {"kept": tuple(kept), "weights": tuple(float(means[at]) for at in kept)}
        return Swap(name, "fixed_residual", spec)
