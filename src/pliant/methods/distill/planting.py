"""Planting: a narrow network gets channels while it trains; only what is new is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from torch import Tensor

from pliant.errors import BudgetError, MethodError
from pliant.families.distill import rounds as growing
from pliant.families.distill.growth import narrow
from pliant.families.distill.teaching import refuse_fractions, taught
from pliant.method import Method
from pliant.observe.aside import Teacher
from pliant.registry import In, Paper, register
from pliant.run import Run


@register(
    "planting",
    paper=Paper(
        "Channel Planting for Deep Neural Networks using Knowledge Distillation",
        "K. Mitsuno, Y. Nomura, T. Kurita",
        "ICPR",
        2020,
        "https://arxiv.org/abs/2011.02390",
    ),
    saves="params macs bytes",
)
@dataclass(frozen=True)
class Planting(Method):
    """Narrows the network, then gives channels to the layer that gains most, up to the budget.

    The network as it came is the teacher, so it should be trained. All layers keep a share of
    their channels, and train for a part of the training. In each of the rounds that follow every
    layer gets new channels, which change nothing at first, since what reads them begins with
    zeros. They alone train: all older weights stay bit for bit. In the middle of the round the
    layer whose new channels are worth most keeps them, and those of all others leave. The loss
    is shared with the teacher throughout. With ``width=1`` the network itself grows.

    *Departs from the paper*: the teacher is as deep as the network, only wider. The new channels
    of all layers train together before they are compared on validation data, not each alone, and
    a round in which none lowers the loss keeps none. Statistics of batch norms are no weights:
    they follow the data and are re-estimated in each round. All phases are parts of one training:
    let its learning rate be constant, ``Train(schedule="constant")``.

    In the bench ``distill-family``, at 30 % of the parameters, it trailed equally narrow layers,
    taught alike, by 10 points; teacher and choice were worth 0.5 +- 0.8 and 0.6 +- 0.4.
    """

    width: Annotated[float, In(0, 1)] = 0.125  # share of the channels it begins with, two at least
    channels: Annotated[int, In(1, 64)] = 4  # p, new ones of a layer in each round
    rounds: Annotated[int, In(1)] = 8  # at most; none follows where the budget is spent
    # share of the training before the first round
    first: Annotated[float, In(0, 1, "high")] = 0.4
    weight: Annotated[float, In(0, 1)] = 0.5  # a, share of the loss that is the teacher's
    # T, by which scores are divided before they become probabilities
    temperature: Annotated[float, In(0, open="low")] = 4.0
    # which layer keeps its channels: the one of the least loss, of most gained per parameter, any
    choice: growing.Choice = "validation"
    samples: Annotated[int, In(1)] = 2048  # validation samples on which layers are compared

    def refuse(self, run: Run) -> None:
        refuse_fractions(run, "planting")
        if run.steps and self.choice != "random" and not run.has_inputs:
            raise MethodError(
                "planting compares layers on data, but the run has none: pass data, or let "
                'choice="random" pick them.'
            )

    def prepare(self, run: Run) -> None:
        run.hook(Teacher(run.model))
        if self.width < 1:
            narrow(run, self.width)
        if misses := run.planner.misses(run.planner.now()):
            raise BudgetError(
                f"planting begins with a network whose {misses[0]}: begin with a smaller width."
            )
        run.state.update(edits=[], new={}, kept={}, round=0)

    def loss(self, run: Run, loss: Tensor, output: Any, batch: Any) -> Tensor:
        return taught(run, loss, output, batch, self.weight, self.temperature)

    def before_step(self, run: Run) -> None:
        growing.mask(run)

    def after_step(self, run: Run) -> None:
        growing.hold(run)
        due = growing.due(run, self.first, self.rounds)
        if due == "plant":
            growing.plant(run, self.channels)
        elif due == "choose":
            growing.choose(run, self.choice, self.samples)

    def finalize(self, run: Run) -> None:
        if run.state["edits"]:
            growing.choose(run, self.choice, self.samples)
        for layer in run.layers.keys() - {edit.layer for edit in run.edits} - run.reasons.keys():
            run.keep(layer, "its channels are as many as before")
