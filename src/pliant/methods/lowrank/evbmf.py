"""EVBMF ranks: variational Bayes estimates, from each unfolding, how much is not noise."""

from __future__ import annotations

from dataclasses import dataclass

from pliant.families.lowrank.estimates import doubtful, evbmf_ranks
from pliant.families.lowrank.factorize import check_reachable, factorize, subjects
from pliant.families.lowrank.weaken import weakened
from pliant.method import Method
from pliant.plan.remember import remembered
from pliant.registry import Paper, register
from pliant.run import Run


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
        estimates = remembered(run, key, lambda: {n: evbmf_ranks(m) for n, m in layers.items()})
        run.note(evbmf={name: list(ranks) for name, ranks in estimates.items()})
        ranks = {name: tuple(max(1, rank) for rank in each) for name, each in estimates.items()}
        edits = weakened(run, layers, ranks)
        if warnings := doubtful(edits, layers, estimates):
            run.note(warnings=warnings)
        factorize(run, edits, layers, {})
