"""Point-wise activation: do single positions decide, or what they make together?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import nn

from pliant.data import Data
from pliant.families.analyze import kernels, shuffle
from pliant.families.analyze.decisions import decisions, figures
from pliant.families.analyze.heads import find_head
from pliant.families.analyze.inputs import first
from pliant.families.analyze.words import said, summed
from pliant.registry import In, Paper, register
from pliant.result import Finding


@register(
    "pointwise_activation",
    paper=Paper(
        "How Does DCNN Make Decisions?",
        "Y. Lin, N. Wang, X. Ma, Z. Li, G. Bai",
        "ICPR",
        2020,
    ),
    verb="analyze",
)
@dataclass(frozen=True)
class PointwiseActivation:
    """Tests whether a network decides by single positions, whatever their arrangement.

    The scores of a head on global means, or on all numbers of the last map, are divided exactly
    into what each position adds (the evidence map); positions are taken away and put in, the
    strongest first; inputs are cut into tiles and shuffled, and positions permuted layer by layer.
    Decisions that stay speak for the hypothesis that arrangement does not count, decisions that
    fall to chance against it: both can come out, and intervals and a null are given with them.

    The values are ``agreement`` (share of decisions that stay at the finest grid), ``chance`` (the
    same for decisions dealt out at random) and ``p``; ``points`` (median share of positions that
    keep a decision); areas under curves of ``deletion`` and ``insertion`` by evidence, in random
    order and by input gradients, with ``p_random`` and ``p_saliency`` of Wilcoxon's signed ranks
    that deletion by evidence is no faster; ``exactness`` and ``permuted`` (largest relative error
    of the sum of evidence; largest change of a score when the last map's positions are permuted);
    and for each input its ``decisions``, ``evidence`` and ``minimal_points``. Rows are the grids,
    layers with their kernels, and designed kernels.

    *Departs from the paper*, of which the abstract alone could be read: everything here
    operationalizes its claims, and no step is the paper's own.

    >>> PointwiseActivation(grids=(2, 4)).permutations
    5
    """

    # g: parts of each axis of the input, where they divide it evenly
    grids: tuple[Annotated[int, In(2)], ...] = (2, 4, 8)
    # orders of the tiles, and of each layer's positions
    permutations: Annotated[int, In(1, 50)] = 5
    steps: Annotated[int, In(1)] = 20  # points of a deletion curve
    fill: Literal["mean", "zero"] = "mean"  # features of a position that is taken away
    # convolutions whose positions are permuted, evenly spread
    layers: Annotated[int, In(1)] = 8
    samples: Annotated[int, In(2)] = 200  # inputs looked at
    pictures: Annotated[int, In(0)] = 8  # of them shown with their evidence

    def analyze(self, model: nn.Module, data: Data, generator: torch.Generator) -> Finding:
        """Divide the decisions, then shuffle inputs and layers."""
        samples = first(data, self.samples)
        grids = shuffle.grids(samples.inputs.shape[2:], self.grids)
        head = find_head(model, samples.inputs[:8])
        found = decisions(
            model, head, samples, fill=self.fill, steps=self.steps, generator=generator
        )
        tiles = [shuffle.shuffled(model, samples, g, self.permutations, generator) for g in grids]
        layers = shuffle.profile(model, samples, self.layers, self.permutations, generator)
        sides = {s for layer in kernels.wide(model).values() for s in layer.kernel_size}
        values = summed(found, tiles[-1], head.positions)
        rows = (*tiles, *layers, *shuffle.designed(sorted(sides)))
        text = said(values, tiles[-1], len(samples.inputs))
        names = () if isinstance(data.classes, int) else data.classes
        drawn = figures(samples, found, self.pictures, names)
        return Finding(values, rows, text, figures=(*drawn, shuffle.figure(tiles, grids)))
