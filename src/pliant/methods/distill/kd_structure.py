"""KD structure: layers narrow themselves under a price for what they cost, taught by the whole."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from torch import Tensor

from pliant.families.distill import resource
from pliant.families.distill.resource import Resource
from pliant.families.distill.teaching import Temperature, refuse_fractions, taught
from pliant.families.prune.allocate import Goal
from pliant.families.prune.pruner import ChannelPruning, Ratio, Rounds, Share
from pliant.families.prune.ranking import Scope
from pliant.families.prune.scores import Groups, Scores
from pliant.observe.aside import Teacher
from pliant.registry import In, Paper, register
from pliant.run import Run
from pliant.surgery.prove import Leaving


@register(
    "kd_structure",
    paper=Paper(
        "Compact CNN Structure Learning by Knowledge Distillation",
        "W. Ahmed, A. Zunino, P. Morerio, V. Murino",
        "ICPR",
        2020,
        "https://arxiv.org/abs/2104.09191",
    ),
    saves="params macs bytes latency",
)
@dataclass(frozen=True)
class KDStructure(ChannelPruning):
    """Pulls scales of channels to zero by what they cost, then removes those that died.

    A channel's price is what it costs in the layers that make and read it, as many as live there,
    over the cost of its block: layers of one resolution, or of a name pattern in ``blocks``, each
    with its strength in ``strengths``; 0 keeps the block as wide as it is. The network as it came
    is the teacher, before the channels leave and after. With a budget the weakest leave until it
    is met, and until it is the price rises with every epoch; without one, those whose scale is
    below ``threshold``. In the bench ``distill-family``, at half of the multiply-accumulates, it
    trailed equally narrow layers, taught alike, by 4.2 +- 0.6 points, and the teacher did not help.

    *Departs from the paper*, of which only the abstract is at hand: the price is MorphNet's (Gordon
    et al., 2018). What a channel that leaves gave on average goes into biases of the layers that
    read it. Layers without batch norm are pulled by the norms of their filters.
    """

    ratio: Ratio = field(default=0.0, init=False)
    scope: Scope = field(default="global", init=False)
    rounds: Rounds = field(default=1, init=False)
    end: Share = field(default=1.0, init=False)
    start: Share = 0.3  # share of the training in which the structure is learned
    strength: Annotated[float, In(0, 100)] = 0.1  # lambda, of blocks that blocks does not name
    blocks: tuple[str, ...] = ()  # name patterns of layers, each a block of its own
    strengths: tuple[float, ...] = ()  # lambda of each of these
    by: resource.Axis = "macs"  # what is priced
    threshold: Annotated[float, In(0, 1)] = 1e-3  # tau, scale above which a channel lives
    growth: Annotated[float, In(1, 10)] = 1.5  # of the price, with each epoch over the budget
    weight: Annotated[float, In(0, 1)] = 0.7  # a, share of the loss that is the teacher's
    temperature: Temperature = 4.0  # T, divides scores before they become probabilities

    def refuse(self, run: Run) -> None:
        refuse_fractions(run, "kd_structure")
        resource.check(self.blocks, self.strengths)

    def prepare(self, run: Run) -> None:
        run.hook(Teacher(run.model))
        resource.begin(run, self.groups(run), self.by, self.blocks, self.threshold)
        super().prepare(run)

    def groups(self, run: Run) -> Groups:
        return resource.movable(run, super().groups(run), self.blocks, self.strengths)

    def scores(self, run: Run, groups: Groups) -> Scores:
        return resource.scores(run.model, groups)

    def allocation(self, run: Run, groups: Groups, goal: Goal) -> Leaving:
        if goal.limits:
            return super().allocation(run, groups, goal)
        return resource.dead(self.scores(run, groups), run.state["floors"], self.threshold)

    def loss(self, run: Run, loss: Tensor, output: Any, batch: Any) -> Tensor:
        return taught(run, loss, output, batch, self.weight, self.temperature)

    def penalty(self, run: Run) -> Tensor | None:
        if not self.pending(run):
            return None
        return resource.price(run, self.blocks, self.strengths, self.strength)

    def before_step(self, run: Run) -> None:
        if self.pending(run):
            run.spare(resource.scales(run.model, run.aside.get(Resource).groups))

    def after_epoch(self, run: Run) -> None:
        if self.pending(run):
            resource.raise_price(run, self.by, self.growth)
