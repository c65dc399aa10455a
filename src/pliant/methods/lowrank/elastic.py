"""Elastic ranks: one training of ordered factors, from which every size is cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from pliant.data import unpack
from pliant.edits import Settle, replay
from pliant.edits.sizes import costs, count, weights_at
from pliant.families.lowrank.factorize import Form, check_reachable, look, subjects
from pliant.families.lowrank.nesting import MOST, check_sizes, nests
from pliant.families.lowrank.precision import Precision
from pliant.families.lowrank.sizes import settle
from pliant.math.divergence import divergence
from pliant.method import Method
from pliant.observe.aside import Teacher
from pliant.registry import In, Paper, register
from pliant.run import Run

LearnFrom = Literal["largest", "dense"]
AXES = ("params", "macs", "bytes")
HARD, SOFT = 1.0, 4.0  # temperatures at which outputs are copied
SETTLING = 2048  # samples from which batch norms are re-estimated, for each size
MET = "the budget is met without it, even at the smallest size"


@register(
    "elastic",
    paper=Paper(
        "Universally Slimmable Networks and Improved Training Techniques",
        "J. Yu, T. Huang",
        "ICCV",
        2019,
        "https://arxiv.org/abs/1903.05134",
    ),
    saves="params macs bytes",
)
@dataclass(frozen=True)
class Elastic(Method):
    """Trains one network of which the first r components of every layer are a network too.

    Layers become rows of factors in order of importance, at the ranks of the largest size, which
    is what the budget allows. In every step the largest, the smallest and ``between`` random
    sizes look at the batch (the sandwich rule); the largest learns from the labels, the others
    from its outputs (in-place distillation) and, a share of ``labels``, from the labels too. With
    ``learn_from="dense"`` all learn from the network as it came, half of it at a temperature of 4;
    the other half is the labels for the largest, for the others a temperature of 1 and the labels.
    Batch norms are re-estimated from training inputs for every size at the end and kept in a table
    each: a network that has them needs data. ``pliant.load(path, at=...)`` then cuts a size.

    A layer has factors of one form at every size, or at none. Whether it has is planned at the
    smallest; forms are planned at three sizes, and those that damage all sizes together the least
    are taken. The training is that of ``Train(epochs=...)``; a fine-tuning sees one size only.

    *Measured* (bench ``elastic-sampling``: digits in noise, six sizes, three seeds): with labels
    0.7 ± 0.2 points better than as copies alone, 0.1 ± 0.4 behind trainings one by one.

    *Departs from the paper*: ranks of factors are cut, not channels; a size is a plan of ranks
    that makes the damage to the loss least, not one width for all layers. That ordered factors
    can be learned by cutting at random is nested dropout (Rippel, Gelbart and Adams, ICML 2014).

    >>> Elastic(sizes=4).sizes
    4
    """

    sizes: Annotated[int, In(2, MOST)] = 8  # how many, evenly spaced
    # of the budget; the next that can be reached if it is out of reach
    smallest: Annotated[float, In(0, 1, "both")] = 0.25
    # share of the parameters that is the largest size without a budget
    largest: Annotated[float, In(0, 1, "low")] = 0.75
    # random sizes in a step, beside the largest and the smallest
    between: Annotated[int, In(0, MOST)] = 1
    # share of the labels in what the other sizes learn; 0 copies only, as in the paper
    labels: Annotated[float, In(0, 1)] = 0.5
    learn_from: LearnFrom = "largest"  # whose outputs are copied; "dense" needs a trained network
    form: Form = "auto"  # of the factors; "auto" takes the best per layer
    samples: Annotated[int, In(0)] = 1024  # training inputs to look at; 0 looks at weights only
    only: tuple[str, ...] = ()  # name patterns of the layers to consider
    exclude: tuple[str, ...] = ()  # name patterns of the layers to leave alone

    def refuse(self, run: Run) -> None:
        """Refuse a budget that is out of reach."""
        check_reachable(run, self.form, only=self.only, exclude=self.exclude)

    def prepare(self, run: Run) -> None:
        """Plan every size and build the largest."""
        norms = [name for name, module in run.model.named_modules() if _has_statistics(module)]
        limits = {"smallest": self.smallest, "largest": self.largest}
        check_sizes(run, norms)
        if self.learn_from == "dense":
            run.hook(Teacher(run.model))
        layers = subjects(run, self.only, self.exclude)
        seen = look(run, layers, self.samples)
        tables = [Settle(name, self.sizes) for name in norms]
        planned = run.rehearsal()
        replay(planned.model, tables)  # their bytes count
        edits = nests(planned, layers, seen, self.form, sizes=self.sizes, **limits)
        if edits:
            run.apply(*tables, *edits)
        why = "no factorized form at the rank it needs is smaller" if edits else MET
        for name in layers.keys() - {edit.layer for edit in edits}:
            run.keep(name, why)
        run.hook(Precision(run.model))

    def loss(self, run: Run, loss: Tensor, output: Any, batch: Any) -> Tensor:
        """Add what sizes are away from the largest one, or from the dense network."""
        inputs, target = unpack(batch)[0], run.class_scores(output).detach().float()
        temperatures = [HARD]
        if self.learn_from == "dense":
            said = run.aside.get(Teacher).answer(inputs, target.device)
            target = run.class_scores(said).float()
            loss = (loss + divergence(run.class_scores(output).float(), target, SOFT)) / 2
            temperatures = [HARD, SOFT]
        args, names = ((), inputs) if isinstance(inputs, Mapping) else (inputs, {})
        for size in self._sampled(run):
            with run.aside.get(Precision).again(target.device.type):
                weights = weights_at(run.model, run.edits, size)
                said = functional_call(run.model, weights, args, dict(names))
                found = run.class_scores(said)
                task = run.task_loss(said, batch) if self.labels else 0.0
            gaps = [divergence(found.float(), target, each) for each in temperatures]
            gaps[0] = (1 - self.labels) * gaps[0] + self.labels * task
            loss = loss + sum(gaps) / len(gaps)
        return loss

    def finalize(self, run: Run) -> None:
        """Re-estimate the batch norms of every size."""
        if any(isinstance(edit, Settle) for edit in run.edits):
            settle(run.model, run.edits, run.inputs(SETTLING))
        found = costs(run.model, run.edits, run.example)
        run.note(sizes=[{axis: getattr(each, axis) for axis in AXES} for each in found])

    def _sampled(self, run: Run) -> list[int]:
        """The smallest size, and random ones between it and the largest."""
        last = count(run.edits) - 1
        if last < 2 or not self.between:
            return [last] if last else []
        found = torch.randint(1, last, (self.between,), generator=run.generator)
        return [last, *found.tolist()]


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.track_running_stats
