"""SSPruning: shortcuts are cut into regions, each of which keeps channels of its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from pliant.families.prune.allocate import Goal
from pliant.families.prune.channels import ABSORBED, keep_whole
from pliant.families.prune.judge import labelled, need_labels, slopes
from pliant.families.prune.pruner import ChannelPruning, Rounds, Share
from pliant.families.prune.ranking import floors_of
from pliant.families.prune.scores import Groups, Scores
from pliant.families.prune.shortcuts import (
    Region,
    prove_slimmed,
    slimmed,
    unread,
    with_regions,
)
from pliant.registry import In, Paper, register
from pliant.run import Run
from pliant.surgery.batchnorm import absorb

PAPER = Paper(
    "Slimming ResNet by Slimming Shortcut",
    "D. Joo, D. Kim, J. Kim",
    "ICPR",
    2020,
    "https://doi.org/10.1109/ICPR48806.2021.9413075",
)


@register("sspruning", paper=PAPER, saves="params macs bytes latency")
@dataclass(frozen=True)
class SSPruning(ChannelPruning):
    """Removes channels of residual shortcuts block by block, and of the insides of blocks.

    What a residual block gives is a region: it keeps channels of its own, not those of its whole
    stage. A gate of one on every channel, of a region or within a block, says by its gradient
    what the loss would be without the channel, to first order: the sum over labelled training
    samples counts, by its magnitude. All gates are on one scale, and the least important leave.
    Sums take the channels that a branch still makes at their places, and tensors between blocks
    keep their width, zero where nothing is left; so time falls less than multiply-accumulates.
    Networks without residual blocks lose channels as they are tied. Needs labelled training data.

    *Departs from the paper*, of which only the aim is known here: gates are not trained, and cuts
    are made at once. The first region of a network, which its stem makes, and the classifier keep
    their width.

    *Measured* (bench ``prune-family``): with 50 % of its multiply-accumulates, trained for 2 epochs
    on 2,000 images, ResNet-20 was right on 62.2 % by ``sspruning(samples=512)`` and on 68.8 % by
    ``magnitude`` (means of 3 seeds).

    *Not shown* (bench ``prune-items``, small networks, 2 seeds): it is no worse than the insides of
    blocks alone (-2.5 ± 1 points); it is no worse than channels tied by sums (-1.7 ± 0.8 points).

    >>> SSPruning().rounds
    1
    """

    rounds: Rounds = field(default=1, init=False)
    end: Share = field(default=0.5, init=False)
    samples: Annotated[int, In(1)] = 1024  # labelled training samples of one scoring

    def refuse(self, run: Run) -> None:
        need_labels(run, "sspruning", "asks how the loss changes")

    def groups(self, run: Run) -> Groups:
        return self._found(run)[0]

    def scores(self, run: Run, groups: Groups) -> Scores:
        blocks = {name for name, module in run.model.named_modules() if [*module.children()]}
        behind = {group.name: group.name for group in groups if group.name in blocks}
        return slopes(run, groups, labelled(run, self.samples), behind)

    def cut(self, run: Run, goal: Goal, *, last: bool = True) -> None:
        groups, found = self._found(run)
        run.state["floors"] = floors_of(groups, self.least)
        leaving = self.allocation(run, groups, goal)
        edits = slimmed(run.model, groups, leaving, found)
        if edits:
            prove_slimmed(run.model, run.example, groups, leaving, found)
        if edits and run.has_inputs:
            absorb(run.model, unread(edits, found), run.inputs(ABSORBED))
        run.apply(*edits)
        if edits:
            run.recalibrate()
        keep_whole(run, groups)

    def _found(self, run: Run) -> tuple[Groups, list[Region]]:
        """Return all groups, those of regions first, and the regions."""
        return with_regions(run, super().groups(run))
