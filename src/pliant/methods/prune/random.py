"""Random pruning: channels leave by lot, the baseline that any score must beat."""

from dataclasses import dataclass
from functools import partial

import torch

from pliant.families.prune.pruner import RENAMED, ChannelPruning
from pliant.families.prune.ranking import Scope
from pliant.families.prune.scores import Groups, Scores, relative
from pliant.registry import Paper, register
from pliant.run import Run

PAPER = Paper(
    "Recovering from Random Pruning: On the Plasticity of Deep Convolutional Neural Networks",
    "D. Mittal, S. Bhardwaj, M. M. Khapra, B. Ravindran",
    "WACV",
    2018,
    "https://arxiv.org/abs/1801.10447",
)


@register("random", paper=PAPER, saves="params macs bytes latency", renamed=RENAMED)
@dataclass(frozen=True)
class Random(ChannelPruning):
    """Removes channels by lot, with all that belongs to them; the rest of the training repairs.

    *Measured* (bench ``prune-family``): with 50 % of its multiply-accumulates, trained for 2 epochs
    on 2,000 images, ResNet-20 was right on 54.6 % by ``random`` and on 68.8 % by ``magnitude``
    (means of 3 seeds).

    >>> Random(ratio=0.3).scope
    'local'
    """

    scope: Scope = "local"  # take the same share of every layer, or rank all channels together

    def scores(self, run: Run, groups: Groups) -> Scores:
        draw = partial(torch.rand, generator=run.generator, dtype=torch.float64)
        return relative({group.name: draw(len(group.units)) for group in groups})
