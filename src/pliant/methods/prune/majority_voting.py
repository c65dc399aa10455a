"""Majority voting: the units leave that few samples find outstanding in their layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from pliant.errors import DataError
from pliant.families.prune.allocate import Goal
from pliant.families.prune.pruner import ChannelPruning, Rounds, Share
from pliant.families.prune.ranking import Scope
from pliant.families.prune.schedule import Schedule
from pliant.families.prune.scores import Groups, Scores, weakest
from pliant.families.prune.votes import Ballot, votes
from pliant.plan.pace import cuts, until
from pliant.registry import In, Paper, register
from pliant.run import Run
from pliant.surgery.prove import Leaving

BATCH = 64  # samples whose activations are held at once
PAPER = Paper(
    "Neuron-Based Network Pruning Based on Majority Voting",
    "A. Alqahtani, X. Xie, E. Essa, M. W. Jones",
    "ICPR",
    2020,
    "https://ailb-web.ing.unimore.it/icpr/author/1262",
)


@register("majority_voting", paper=PAPER, saves="params macs bytes latency")
@dataclass(frozen=True)
class MajorityVoting(ChannelPruning):
    """Removes the units with the fewest votes, in rounds, while the network trains from scratch.

    Each training input votes for the units of a layer that are larger than the mean of those left
    there (``ballot``). In every round the same share of each layer leaves; the rest of the
    training is for those that survive. Units whose layers meet in a sum vote as one. Needs
    unlabelled training inputs.

    *Departs from the paper*, whose ballot and schedule are inferred: ``samples`` inputs vote in
    eval mode instead of the batches of an epoch; losers leave at once instead of being masked;
    no validation stops it. With ``majority`` above 0, and without a budget, those leave that get
    less than this part of their layer's median of votes, however many they are.

    *Measured* (bench ``prune-family``): with 50 % of its multiply-accumulates, trained for 2 epochs
    on 2,000 images, ResNet-20 was right on 62.3 % by ``majority_voting(samples=512, rounds=2)`` and
    on 68.8 % by ``magnitude`` (means of 3 seeds).

    *Measured* (bench ``prune-vgg16``): with 10 % of its parameters, trained for 2 epochs on 4,000
    images, VGG-16 of half the width was right on 41.0 % by ``majority_voting(samples=512,
    rounds=1)`` and on 48.7 % by ``magnitude`` (means of 2 seeds).

    *Not shown* (bench ``prune-items``, small networks, 2 seeds): with a tenth of the parameters it
    is at most 0.5 behind the dense MLP (-2.15 ± 0.35 points); without training after it, it is no
    worse than units of small norm (-8.45 ± 2.8 points); in a network of which 80 % is zero, it is
    at most 1 behind after its cuts (-0.75 ± 0.55 points).

    >>> MajorityVoting().scope
    'local'
    """

    scope: Scope = field(default="local", init=False)
    # votes, each before a cut; None: 4, or fewer in a short training
    rounds: Rounds | None = None  # type: ignore[assignment]
    start: Share = 0.1  # share of the training before the first vote
    # share of the training up to which votes are spread; None: 0.65, or less in a short training
    end: Share | None = None  # type: ignore[assignment]
    ballot: Ballot = "mean"  # what a sample votes for: units above the mean, the most, pairwise
    samples: Annotated[int, In(1)] = 4096  # S, training inputs that vote
    # c, part of a layer's median of votes below which units leave, in place of the ratio
    majority: Annotated[float, In(0)] = 0.0

    def refuse(self, run: Run) -> None:
        if not run.has_inputs:
            raise DataError(
                "majority_voting asks training inputs, but there are none: give data, or take "
                "magnitude, which looks at weights alone."
            )

    def schedule(self, run: Run) -> Schedule:
        end = 0.65 if self.end is None else self.end
        rounds = cuts(self.rounds, 4, (end - self.start) * run.steps)
        found = Schedule(rounds, self.start, end)
        return found.by(until(None, 1.0, run.steps)) if self.end is None else found

    def scores(self, run: Run, groups: Groups) -> Scores:
        return votes(run.model, groups, run.inputs(self.samples, batch=BATCH), self.ballot)

    def allocation(self, run: Run, groups: Groups, goal: Goal) -> Leaving:
        if not self.majority or goal.limits:
            return super().allocation(run, groups, goal)
        leaving = {}
        for name, shares in self.scores(run, groups).items():
            losers = int((shares < self.majority * shares.median()).sum())
            spare = len(shares) - run.state["floors"][name]
            leaving[name] = weakest(shares, max(0, min(losers, spare))).tolist()
        return leaving
