"""Point-wise activation: do single positions decide, or what they make together?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from pliant.data import Data
from pliant.errors import MethodError
from pliant.families.analyze import kernels, shuffle
from pliant.families.analyze.decisions import (
    ORDERS,
    WAYS,
    Decisions,
    better,
    decisions,
    figures,
)
from pliant.families.analyze.evidence import area
from pliant.families.analyze.heads import find_head
from pliant.families.analyze.inputs import first
from pliant.registry import Paper, register
from pliant.result import Finding

MOST = 50  # orders of the tiles


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

    grids: tuple[int, ...] = (2, 4, 8)  # g: parts of each axis of the input; even divisors are used
    permutations: int = 5  # orders of the tiles, and of each layer's positions
    steps: int = 20  # points of a deletion curve
    fill: Literal["mean", "zero"] = "mean"  # features of a position that is taken away
    layers: int = 8  # convolutions whose positions are permuted, evenly spread
    samples: int = 200  # inputs looked at
    pictures: int = 8  # of them shown with their evidence

    def analyze(self, model: nn.Module, data: Data, generator: torch.Generator) -> Finding:
        """Divide the decisions, then shuffle inputs and layers."""
        self._check()
        samples = first(data, self.samples)
        grids = shuffle.grids(samples.inputs.shape[2:], self.grids)
        head = find_head(model, samples.inputs[:8])
        found = decisions(
            model, head, samples, fill=self.fill, steps=self.steps, generator=generator
        )
        tiles = [shuffle.shuffled(model, samples, g, self.permutations, generator) for g in grids]
        layers = shuffle.profile(model, samples, self.layers, self.permutations, generator)
        sides = {s for layer in kernels.wide(model).values() for s in layer.kernel_size}
        values = self._values(found, tiles[-1], head.positions)
        rows = (*tiles, *layers, *shuffle.designed(sorted(sides)))
        text = _text(values, tiles[-1], len(samples.inputs))
        drawn = (*figures(samples, found, self.pictures), shuffle.figure(tiles, grids))
        return Finding(values, rows, text, figures=drawn)

    def _check(self) -> None:
        counts = (self.permutations, self.steps, self.layers, self.samples - 1)
        odd = not self.grids or min(self.grids) < 2 or min(counts) < 1 or self.pictures < 0
        if odd or self.permutations > MOST:
            raise MethodError(
                f"pointwise_activation: grids must be 2 or more, permutations 1 to {MOST}, steps "
                "and layers 1 or more, samples 2 or more and pictures not negative, but grids "
                f"{self.grids}, permutations {self.permutations}, steps {self.steps}, layers "
                f"{self.layers}, samples {self.samples} and pictures {self.pictures} came."
            )

    def _values(self, found: Decisions, finest: dict[str, Any], positions: int) -> dict[str, Any]:
        areas = {key: area(curve) for key, curve in found.curves.items()}
        means = {
            way if order == "evidence" else f"{way}_{order}": float(areas[way, order].mean())
            for way in WAYS
            for order in ORDERS
        }
        best = areas["deletion", "evidence"]
        return {
            **{name: finest[name] for name in ("agreement", "chance", "p")},
            "points": float(found.points.double().median()) / positions,
            **means,
            "p_random": better(best, areas["deletion", "random"]),
            "p_saliency": better(best, areas["deletion", "saliency"]),
            "exactness": found.exactness,
            "permuted": found.permuted,
            "decisions": found.classes,
            "evidence": found.evidence,
            "minimal_points": found.points,
        }


def _text(values: dict[str, Any], finest: dict[str, Any], count: int) -> str:
    ordered = "does not change" if values["permuted"] < 1e-5 else "changes"
    return (
        f"Operationalized: of {count} decisions {100 * finest['agreement']:.0f} % "
        f"({100 * finest['low']:.0f} to {100 * finest['high']:.0f}) stay with the "
        f"{finest['what']} and shuffled, {100 * finest['chance']:.0f} % would by chance; half of "
        f"them need {100 * values['points']:.3g} % of the positions or fewer, and the order of the "
        f"last map {ordered} scores."
    )
