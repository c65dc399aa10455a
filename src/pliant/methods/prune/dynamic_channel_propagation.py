"""Dynamic channel propagation: only channels that were useful lately take part in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch

from pliant.edits import Edit
from pliant.errors import DataError
from pliant.families.prune.allocate import Goal
from pliant.families.prune.gates import Gates
from pliant.families.prune.pruner import ChannelPruning, Ratio, Rounds, Share
from pliant.families.prune.ranking import Scope, floors_of
from pliant.families.prune.scores import Groups, Scores
from pliant.families.prune.utility import choose, decay_at, looked_up, utility
from pliant.registry import In, Paper, register
from pliant.run import Run

PAPER = Paper(
    "Learning to Prune in Training via Dynamic Channel Propagation",
    "S. Shen, R. Li, Z. Zhao, H. Zhang, Y. Zhou",
    "ICPR",
    2020,
    "https://arxiv.org/abs/2007.01486",
)


@register("dynamic_channel_propagation", paper=PAPER, saves="params macs bytes latency")
@dataclass(frozen=True)
class DynamicChannelPropagation(ChannelPruning):
    """Lets only useful channels take part in each training step, and removes the others at the end.

    A channel's utility is a decayed sum of what masking it would do to the loss, to first order:
    the mean over the samples of a step of |activation times gradient|, over the largest of its
    layer. After ``warmup`` the channels of the least utility in the whole network are masked in
    every step. Their utility is frozen, so they come back when others fall below it. The decay
    rises by 0.1 at 1/2 and 3/4 of the training, and to 1 at 0.95. When training is over, the masked
    channels leave: in evaluation the network computes the same without them. Training costs as
    much as that of the dense network. Without training, labels drawn from the network's own
    predictions on ``samples`` inputs take the place of steps.

    *Departs from the paper*: channels that meet in a sum are masked too, together, by the sum of
    their effects; where layers read them, so biases and batch norms in between are covered. A
    budget sets anew after every epoch, and before the cut, how many are masked. Utilities begin
    at 0; the rise of the decay does not follow the learning rate.

    *Measured* (bench ``prune-family``): with 50 % of its multiply-accumulates, trained for 2 epochs
    on 2,000 images, ResNet-20 was right on 67.4 % by ``dynamic_channel_propagation`` and on 68.8 %
    by ``magnitude`` (means of 3 seeds; the difference is within the spread).

    *Measured* (bench ``prune-vgg16``): with 10 % of its parameters, trained for 2 epochs on 4,000
    images, VGG-16 of half the width was right on 34.8 % by ``dynamic_channel_propagation`` and on
    48.7 % by ``magnitude`` (means of 2 seeds).

    *Not shown* (bench ``prune-items``, small networks, 2 seeds): it is no worse than channels drawn
    at the start (-0.75 ± 0.15 points).

    >>> DynamicChannelPropagation().start
    1.0
    """

    ratio: Ratio = 0.42  # pr, share of the channels that is masked and leaves, without a budget
    scope: Scope = field(default="global", init=False)
    rounds: Rounds = field(default=1, init=False)
    start: Share = 1.0  # share of the training before masked channels leave; 1 when it is over
    end: Share = field(default=0.5, init=False)
    warmup: Share = 0.05  # share of the training in which no channel is masked
    decay: Annotated[float, In(0, 1)] = 0.6  # d at the beginning, factor of old utilities
    samples: Annotated[int, In(1)] = 1024  # training inputs that are looked at without training

    def refuse(self, run: Run) -> None:
        if not run.steps and not run.has_inputs:
            raise DataError(
                "dynamic_channel_propagation learns from training steps or inputs, but there are "
                "none: train with it, give data, or take magnitude, which looks at weights alone."
            )

    def prepare(self, run: Run) -> None:
        super().prepare(run)
        if run.steps and self.pending(run):
            groups = self.groups(run)
            gates = run.aside.put(Gates(run.model, groups))
            run.state.update(utility=torch.zeros(len(gates.values)).double())
            run.state.update(mask=gates.values > 0, masked=0, floors=floors_of(groups, self.least))

    def resume(self, run: Run, state: Mapping[str, Any], edits: Sequence[Edit]) -> None:
        for gates in run.aside.all(Gates):
            gates.values = state["mask"].float().cpu()
            if state["rounds"]:
                gates.remove()

    def before_step(self, run: Run) -> None:
        if run.steps and self.pending(run):
            gates, state = run.aside.get(Gates), run.state
            decay = decay_at(run.step / run.steps, self.decay)
            seen = (state["utility"], gates.take(), state["mask"], gates.sizes, decay)
            state["utility"] = utility(*seen)

    def after_step(self, run: Run) -> None:
        if run.step >= self.warmup * run.steps and self.pending(run):
            due = run.step >= run.steps or self.schedule(run).due(run.step, run.steps)
            choose(run, run.aside.get(Gates), self.ratio, anew=bool(due) or not run.state["masked"])
        super().after_step(run)

    def after_epoch(self, run: Run) -> None:
        if run.state.get("masked") and self.pending(run):
            choose(run, run.aside.get(Gates), self.ratio, anew=True)

    def cut(self, run: Run, goal: Goal, *, last: bool = True) -> None:
        for gates in run.aside.all(Gates):
            gates.remove()
        learned = bool(run.state.get("masked"))  # then batch norms know the network as it will be
        super().cut(run, goal, last=last and not learned)

    def scores(self, run: Run, groups: Groups) -> Scores:
        known = run.state.get("utility")
        if known is None or not known.any():
            self.refuse(run)
            known = looked_up(run, groups, self.samples, self.decay)
        sizes = [len(group.units) for group in groups]
        return dict(zip([group.name for group in groups], known.split(sizes), strict=True))
