"""Group Fisher pruning: the channels leave that matter least to the loss for what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pliant.errors import DataError
from pliant.families.prune.allocate import Goal, counted_limits, in_passes, savings
from pliant.families.prune.channels import silenced
from pliant.families.prune.fisher import group_fisher
from pliant.families.prune.pruner import RENAMED, ChannelPruning
from pliant.families.prune.ranking import Unit, by_group, ranking
from pliant.families.prune.scores import Groups, Scores
from pliant.plan.remember import remembered
from pliant.registry import In, Paper, register
from pliant.run import Run
from pliant.surgery.prove import Leaving, edits_of

BATCH = 64  # samples whose activations are held at once
MOST_PASSES = 32


@register(
    "group_fisher",
    paper=Paper(
        "Group Fisher Pruning for Practical Network Compression",
        "L. Liu, S. Zhang, Z. Kuang, A. Zhou, J.-H. Xue, X. Wang, Y. Chen, W. Yang, Q. Liao, "
        "W. Zhang",
        "ICML",
        2021,
        "https://arxiv.org/abs/2108.00708",
    ),
    saves="params macs bytes latency",
    renamed=RENAMED | {"looks": "passes"},
)
@dataclass(frozen=True)
class GroupFisher(ChannelPruning):
    """Removes the channels whose loss hurts least for what leaves with them.

    What a channel is worth is the Fisher information of a mask on it, shared by all layers that
    read it, divided by what the network saves without it: multiply-accumulates for a budget in
    these or in milliseconds, parameters or bytes for others, nothing without a budget.
    Needs unlabelled training inputs.

    *Departs from the paper*: all channels of a cut leave before training goes on, and scores are
    taken anew several times on the way, on a copy that ignores those that have left (``passes``);
    the paper removes one at a time while it trains (``rounds`` goes part of that way). Labels are
    drawn from the network's predictions, unless a loss is given or the network returns its own;
    what a channel gives on average costs nothing, since biases and batch norms make up for it;
    savings are those the budget asks for.

    *Measured* (bench ``prune-vgg16``): with 10 % of its parameters, trained for 2 epochs on 4,000
    images, VGG-16 of half the width was right on 55.6 % by ``group_fisher(samples=256, passes=2)``
    and on 48.7 % by ``magnitude`` (means of 2 seeds).

    >>> GroupFisher(passes=1).samples
    1024
    """

    samples: Annotated[int, In(1)] = 1024  # training inputs of one scoring
    # how often channels are scored on the way of a cut
    passes: Annotated[int, In(1, MOST_PASSES)] = 4

    def prepare(self, run: Run) -> None:
        if not run.has_inputs:
            raise DataError(
                "group_fisher looks at training inputs, but there are none: give data, or take "
                "magnitude, which looks at weights alone."
            )
        super().prepare(run)

    def scores(self, run: Run, groups: Groups) -> Scores:
        return self._without(run, groups, [], 1)

    def allocation(self, run: Run, groups: Groups, goal: Goal) -> Leaving:
        """Score in passes, each of which goes an equal part of the whole way."""

        def ranked(gone: Sequence[Unit], number: int) -> Sequence[Unit]:
            scores = self._without(run, groups, gone, number)
            return ranking(scores, self.scope, run.state["floors"])

        return in_passes(run, groups, goal, self.passes, ranked)

    def _without(self, run: Run, groups: Groups, gone: Sequence[Unit], number: int) -> Scores:
        """Return what each unit is worth beside those that are left, for what leaves with it."""
        model = silenced(run, edits_of(run.model, groups, by_group(gone)))

        def make() -> Scores:
            inputs, loss = run.looks(self.samples, batch=BATCH, seed=10 * number)
            return group_fisher(model, groups, inputs, run.generator, loss)

        key = ("fisher", self.samples, number, *gone, *(group.name for group in groups))
        damages = remembered(run, key, make)
        saved = savings(run, groups, gone, tuple(counted_limits(run)))
        scores = {name: damage / saved[name] for name, damage in damages.items()}
        for place, unit in enumerate(gone):  # in their order, before those that are worth nothing
            scores[unit.group][unit.index] = place - len(gone)
        return scores
