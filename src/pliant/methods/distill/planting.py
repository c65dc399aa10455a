"""Planting: a narrow network gets channels while it trains; only what is new is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from pliant.edits import Prune, Widen, from_json, to_json
from pliant.errors import BudgetError, MethodError
from pliant.families.distill import growth
from pliant.families.distill.growth import joined, judged, most_gained, narrow, planted, plants
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

    >>> Planting().width
    0.125
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
    choice: Literal["validation", "gain", "random"] = "validation"
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

    @torch.no_grad()
    def before_step(self, run: Run) -> None:
        for name, new in run.state["new"].items():
            if (gradient := run.model.get_parameter(name).grad) is not None:
                gradient.mul_(new)

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        for name, old in run.state["kept"].items():  # decay and momentum have moved them too
            parameter = run.model.get_parameter(name)
            parameter.copy_(torch.where(run.state["new"][name], parameter, old))
        first = max(1, round(self.first * run.steps))
        rounds = min(self.rounds, (run.steps - first) // 2)
        if run.step < first or rounds < 1:
            return
        number, place = divmod(run.step - first, length := (run.steps - first) // rounds)
        if number < rounds and not place:
            self._plant(run)
        elif place == length // 2 and run.state["edits"]:
            self._choose(run)

    def finalize(self, run: Run) -> None:
        if run.state["edits"]:
            self._choose(run)
        for layer in run.layers.keys() - {edit.layer for edit in run.edits} - run.reasons.keys():
            run.keep(layer, "its channels are as many as before")

    def _plant(self, run: Run) -> None:
        """Let every layer have new channels that it may, and hold all else fast."""
        run.state["round"] += 1
        edits = plants(run, self.channels, run.seed + run.state["round"])
        new = planted(run.model, edits) if edits else run.state["new"]
        run.apply(*edits)
        run.state["edits"] = to_json(edits)
        self._hold(run, new)

    def _choose(self, run: Run) -> None:
        """Leave new channels in the layer in which they are worth most only."""
        edits: list[Widen] = from_json(run.state["edits"])  # type: ignore[assignment]
        found = growth.candidates(run, edits)
        best, loss = self._best(run, found)
        cuts, before = found[best], run.edits[: len(run.edits) - len(edits)]
        new = {name: mask.float() for name, mask in run.state["new"].items()}
        new = {name: value > 0.5 for name, value in growth.carried(run.model, new, cuts).items()}
        run.apply(*cuts)
        run.restate([*before, *joined(edits, cuts)])
        run.state["edits"] = []
        self._hold(run, new)
        run.recalibrate()
        run.note(planted=best, loss=loss, params=run.planner.now().params)

    def _best(self, run: Run, found: dict[str, list[Prune]]) -> tuple[str, float | None]:
        """The layer whose new channels stay, "" for none, and the loss with them."""
        names = [name for name in found if name] or [""]
        if self.choice == "random" or not names[0]:
            return names[int(torch.randint(len(names), (1,), generator=run.generator))], None
        known = {name: judged(run, cuts, self.samples) for name, cuts in found.items()}
        best = most_gained(known, per_parameter=self.choice == "gain")
        return best, known[best][0]

    def _hold(self, run: Run, new: dict[str, Tensor]) -> None:
        """Remember which numbers are new, and what the others are."""
        kept = {name: run.model.get_parameter(name).detach().clone() for name in new}
        run.state.update(new=new, kept=kept)
