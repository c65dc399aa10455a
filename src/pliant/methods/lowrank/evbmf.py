"""EVBMF ranks: variational Bayes estimates, from each unfolding, how much is not noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pliant.edits import Factor
from pliant.families.lowrank.factorize import check_reachable, factorize, subjects
from pliant.families.lowrank.weaken import form_of, weakened
from pliant.math.rank import evbmf_rank
from pliant.math.svd import unfold
from pliant.method import Method
from pliant.nn.factorized import Factorizable
from pliant.nn.kinds import kernel
from pliant.observe.spectra import spectra
from pliant.plan.remember import remembered
from pliant.registry import Paper, register
from pliant.run import Run

LITTLE = 0.5  # share of a layer's energy; a single direction that holds less is not all of it


@register(
    "evbmf",
    paper=Paper(
        "Compression of Deep Convolutional Neural Networks for Fast and Low Power Mobile "
        "Applications",
        "Y.-D. Kim, E. Park, S. Yoo, T. Choi, L. Yang, D. Shin",
        "ICLR",
        2016,
        "https://arxiv.org/abs/1511.06530",
    ),
    saves="params macs bytes latency",
)
@dataclass(frozen=True)
class EVBMF(Method):
    """Factorizes by Tucker-2 at the ranks that empirical variational Bayes finds, layer by layer.

    Ranks are the analytic solution of Nakajima et al. (JMLR 2013). With a budget all of them are
    weakened towards full rank, or tightened towards one, by the same share (the "weakening
    factor" that users of the method set by hand).

    The estimate takes a layer for a signal and Gaussian noise. A small or a flat one, such as the
    last Linear layer, can look like noise altogether; its rank is 1 then, which may ruin the
    network: the report warns in its row where that one direction holds less than half of the
    layer's energy. Leave such a layer out by ``exclude``.

    *Departs from the paper*: Linear layers and 1x1 convolutions use one rank, that of the matrix.

    >>> EVBMF(exclude=("conv1",)).exclude
    ('conv1',)
    """

    only: tuple[str, ...] = ()  # name patterns of the layers to consider
    exclude: tuple[str, ...] = ()  # name patterns of the layers to leave alone

    def refuse(self, run: Run) -> None:
        """Refuse a budget that is out of reach."""
        check_reachable(run, only=self.only, exclude=self.exclude, every=True)

    def prepare(self, run: Run) -> None:
        """Factorize at once."""
        layers = subjects(run, self.only, self.exclude, every=True)
        key = ("evbmf", *layers)
        estimates = remembered(run, key, lambda: {n: _estimate(m) for n, m in layers.items()})
        run.note(evbmf={name: list(ranks) for name, ranks in estimates.items()})
        ranks = {name: tuple(max(1, rank) for rank in each) for name, each in estimates.items()}
        edits = weakened(run, layers, ranks)
        if warnings := _doubtful(edits, layers, estimates):
            run.note(warnings=warnings)
        factorize(run, edits, layers, {})


def _estimate(module: Factorizable) -> tuple[int, ...]:
    """Ranks in the order of the form: (in, out) for Tucker-2, one for a matrix; 0 is all noise."""
    weight = kernel(module).detach()
    found = [
        evbmf_rank(sigma, tuple(unfold(weight, mode).shape))
        for mode, sigma in zip((1, 0), spectra(weight).values(), strict=True)
    ]
    return (found[1],) if form_of(module) == "svd" else tuple(found)


def _doubtful(
    edits: Sequence[Factor],
    layers: Mapping[str, Factorizable],
    estimates: Mapping[str, tuple[int, ...]],
) -> dict[str, str]:
    """Warn of layers that go to a rank of 1 on an estimate of 0 or 1 that their energy belies."""
    found = {}
    for edit in edits:
        sides = ("in", "out") if edit.form == "tucker2" else ("out",)
        values = spectra(kernel(layers[edit.layer]))
        kept = [
            float(values[side][0].square() / values[side].square().sum())
            for side, rank, guess in zip(sides, edit.ranks, estimates[edit.layer], strict=True)
            if rank == 1 and guess <= 1
        ]
        if kept and min(kept) < LITTLE:
            found[edit.layer] = (
                f"EVBMF takes all but one direction for noise, which holds {min(kept):.0%} of the "
                f'energy: exclude "{edit.layer}" if the network suffers'
            )
    return found
