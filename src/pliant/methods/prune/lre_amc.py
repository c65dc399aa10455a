"""LRE-AMC: units that others predict leave, and the layers that read them read the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from torch import Tensor, nn

from pliant.cost import twin
from pliant.families.prune.allocate import Goal, allocate, fewest
from pliant.families.prune.judge import need_inputs, towards_teacher, validation
from pliant.families.prune.pruner import ChannelPruning, Rounds
from pliant.families.prune.ranking import Scope, by_group, ranking, up_to
from pliant.families.prune.redundancy import elimination, fold_all, grams
from pliant.families.prune.scores import Groups, Scores
from pliant.observe.aside import Teacher
from pliant.registry import In, Paper, register
from pliant.run import RECALIBRATED, Run
from pliant.surgery.batchnorm import recalibrate
from pliant.surgery.prove import Leaving

BATCH = 64  # samples whose activations are held at once
PAPER = Paper(
    "Exploiting Non-Linear Redundancy for Neural Model Compression",
    "M. A. Shah, R. Olivier, B. Raj",
    "ICPR",
    2020,
    "https://arxiv.org/abs/2005.14070",
)


@register("lre_amc", paper=PAPER, saves="params macs bytes latency")
@dataclass(frozen=True)
class LREAMC(ChannelPruning):
    """Removes units that are linear in others, and folds what they gave into those that stay.

    What layers read of each unit is predicted by ridge regression from the other units and a
    constant. The unit that is predicted best leaves first, and the rest is predicted anew without
    it. The layers that read it then read its prediction, so an exact dependence costs nothing.
    Between the cuts the network learns the classes of the dense one; ``start`` above 0 takes the
    labels alone instead, as for a network that trains from scratch. Needs training inputs.

    Without a budget, and with validation labels, no cut goes so far that accuracy falls by more
    than ``tolerance``; and if the training after the last cut ends below that, its weights go back
    to those behind the cut. A budget is met in any case.

    *Departs from the paper*: regressions are solved, not trained; units are scored anew after each
    that leaves; all layers shrink in the same round, and how far is found by bisection. There is
    no weighting of errors by the sensitivity of the loss.

    *Measured* (bench ``prune-vgg16``): with 10 % of its parameters, trained for 2 epochs on 4,000
    images, VGG-16 of half the width was right on 52.1 % by ``lre_amc(samples=256, rounds=1)`` and
    on 48.7 % by ``magnitude`` (means of 2 seeds).

    >>> LREAMC(tolerance=0.05).scope
    'local'
    """

    scope: Scope = "local"
    rounds: Rounds = 4  # shrinkings, each an equal part of the way
    # rho, most that accuracy on validation data may fall, if there is no budget
    tolerance: Annotated[float, In(0, 1)] = 0.02
    # lambda of the regressions, as a share of the mean energy of a layer's units
    ridge: Annotated[float, In(0, 1)] = 1e-4
    labels: Annotated[float, In(0, 1)] = 1e-4  # w, share of the labels in the loss
    # Tau, by which scores are divided before they become probabilities
    temperature: Annotated[float, In(0, open="low")] = 1.0
    samples: Annotated[int, In(1)] = 2048  # training inputs that regressions see

    def refuse(self, run: Run) -> None:
        need_inputs(run, "lre_amc", "predicts activations of training inputs from each other")

    def prepare(self, run: Run) -> None:
        if run.steps and not self.start:
            run.aside.put(Teacher(run.model))
        run.state.update(base=validation(run, run.model), accepted={}, edits=0)
        super().prepare(run)

    def loss(self, run: Run, loss: Tensor, output: Any, batch: Any) -> Tensor:
        return towards_teacher(run, loss, output, batch, self.labels, self.temperature)

    def finalize(self, run: Run) -> None:
        super().finalize(run)
        accepted, same = run.state["accepted"], run.state["edits"] == len(run.edits)
        if accepted and same and not self._tolerable(run, run.model):
            run.model.load_state_dict(accepted)
        run.state["accepted"] = {}

    def scores(self, run: Run, groups: Groups) -> Scores:
        found = self._grams(run, groups)
        return {name: elimination(gram, self.ridge) for name, gram in found.items()}

    def allocation(self, run: Run, groups: Groups, goal: Goal) -> Leaving:
        ranked = ranking(self.scores(run, groups), self.scope, run.state["floors"])
        if goal.limits or run.state["base"] is None:
            return allocate(run, groups, ranked, goal)
        ranked, found = up_to(ranked, goal.ratio), self._grams(run, groups)

        def tolerable(kept: int) -> bool:
            model = twin(run.model)
            fold_all(model, groups, by_group(ranked[: len(ranked) - kept]), found, self.ridge)
            recalibrate(model, run.inputs(RECALIBRATED))
            return self._tolerable(run, model)

        kept = fewest(len(ranked), tolerable)
        return by_group(ranked[: 0 if kept is None else len(ranked) - kept])

    def adjust(self, run: Run, groups: Groups, leaving: Leaving) -> None:
        if any(leaving.values()):
            fold_all(run.model, groups, leaving, self._grams(run, groups), self.ridge)

    def cut(self, run: Run, goal: Goal, *, last: bool = True) -> None:
        super().cut(run, goal, last=True)  # a cut is to change nothing, batch norms included
        if not goal.limits and self._tolerable(run, run.model):
            tensors = {name: value.clone() for name, value in run.model.state_dict().items()}
            run.state.update(accepted=tensors, edits=len(run.edits))

    def _grams(self, run: Run, groups: Groups) -> dict[str, Tensor]:
        return grams(run.model, groups, run.inputs(self.samples, batch=BATCH), seed=run.seed)

    def _tolerable(self, run: Run, model: nn.Module) -> bool:
        base = run.state["base"]
        return base is not None and (validation(run, model) or 0.0) >= base - self.tolerance
