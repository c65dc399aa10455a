"""Magnitude pruning: filters of small norm leave, for good."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pliant.families.prune.pruner import RENAMED, ChannelPruning
from pliant.families.prune.scores import Groups, Scores, importance, relative
from pliant.registry import Paper, register
from pliant.run import Run

PAPER = Paper(
    "Pruning Filters for Efficient ConvNets",
    "H. Li, A. Kadav, I. Durdanovic, H. Samet, H. P. Graf",
    "ICLR",
    2017,
    "https://arxiv.org/abs/1608.08710",
)


@register("magnitude", paper=PAPER, saves="params macs bytes latency", renamed=RENAMED)
@dataclass(frozen=True)
class Magnitude(ChannelPruning):
    """Removes the filters of the smallest norm, with all that belongs to their channels.

    Channels that meet in a sum leave together, by the norm of all their filters.

    *Departs from the paper*: one ranking of the whole network, each norm in units of the mean of
    its kind; ``scope="local"`` and ``norm="l1"`` take the same share of every layer by the paper's.

    >>> Magnitude(norm="l1", scope="local").ratio
    0.5
    """

    norm: Literal["l1", "l2"] = "l2"  # of a filter

    def scores(self, run: Run, groups: Groups) -> Scores:
        order = 1 if self.norm == "l1" else 2
        return relative({g.name: importance(run.model, g, order=order) for g in groups})
