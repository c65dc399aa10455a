"""Elastic ranks: one training of ordered factors, from which every size is cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from pliant.budget import Budget, Option
from pliant.data import unpack
from pliant.edits import Factor, Nest, Settle, replay
from pliant.edits.sizes import costs, count, weights_at
from pliant.errors import BudgetError, MethodError
from pliant.families.lowrank.factorize import Form, Layers, check_reachable, choices, look, subjects
from pliant.families.lowrank.nested import nested
from pliant.families.lowrank.sizes import settle
from pliant.math.divergence import divergence
from pliant.math.metric import Metric
from pliant.method import Method
from pliant.observe.aside import Teacher
from pliant.observe.outputs import logits
from pliant.registry import In, Paper, register
from pliant.run import Run

LearnFrom = Literal["largest", "dense"]
Plan = dict[str, Factor]
AXES = ("params", "macs", "bytes")
MOST = 64  # sizes: each costs a plan, a calibration and a row in every table
HARD, SOFT = 1.0, 4.0  # temperatures at which outputs are copied
SETTLING = 2048  # samples from which batch norms are re-estimated, for each size
MET = "the budget is met without it, even at the smallest size"


class Precision:
    """Remembers in what precision the loop trains a network, to run its other sizes in it too."""

    def __init__(self, model: nn.Module) -> None:
        self.kind: torch.dtype | None = None
        self._handle = model.register_forward_pre_hook(self._see)

    def again(self, device: str) -> AbstractContextManager[Any]:
        """Return a context with this precision."""
        return torch.autocast(device, self.kind, enabled=self.kind is not None)

    def remove(self) -> None:
        """Take the hook out of the network."""
        self._handle.remove()

    def _see(self, model: nn.Module, given: Any) -> None:
        if torch.is_grad_enabled():  # a validation may have another precision
            device = next(model.parameters()).device.type
            on = torch.is_autocast_enabled(device)
            self.kind = torch.get_autocast_dtype(device) if on else None


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
    from its outputs (in-place distillation). With ``learn_from="dense"`` all of them learn from
    the network as it came, half of it at a temperature of 4; the other half is the labels for the
    largest, a temperature of 1 for the others: for networks that come trained.
    Batch norms are re-estimated from training inputs for every size at the end and kept in a table
    each: a network that has them needs data, in a loop of your own too.
    ``pliant.load(path, at=...)`` then cuts a size from the file.

    A layer has factors of one form at every size, or at none. Whether it has is planned at the
    smallest; forms are planned at three sizes, and those that damage all sizes together the least
    are taken. The training is that of ``Train(epochs=...)``; a plain fine-tuning
    afterwards sees one size only.
    The report scores every size, and times it where a target is named.

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
        self._check(run, norms)
        if self.learn_from == "dense":
            run.hook(Teacher(run.model))
        layers = subjects(run, self.only, self.exclude)
        seen = look(run, layers, self.samples)
        tables = [Settle(name, self.sizes) for name in norms]
        planned = run.rehearsal()
        replay(planned.model, tables)  # their bytes count
        edits = self._factors(planned, layers, seen)
        if edits:
            run.apply(*tables, *edits)
        why = "no factorized form at the rank it needs is smaller" if edits else MET
        for name in layers.keys() - {edit.layer for edit in edits}:
            run.keep(name, why)
        run.hook(Precision(run.model))

    def loss(self, run: Run, loss: Tensor, output: Any, batch: Any) -> Tensor:
        """Add what sizes are away from the largest one, or from the dense network."""
        inputs, target = unpack(batch)[0], logits(output).detach().float()
        temperatures = [HARD]
        if self.learn_from == "dense":
            target = run.aside.get(Teacher).scores(inputs, target.device).float()
            loss = (loss + divergence(logits(output).float(), target, SOFT)) / 2
            temperatures = [HARD, SOFT]
        args, names = ((), inputs) if isinstance(inputs, Mapping) else (inputs, {})
        for size in self._sampled(run):
            with run.aside.get(Precision).again(target.device.type):
                weights = weights_at(run.model, run.edits, size)
                found = logits(functional_call(run.model, weights, args, dict(names)))
            gaps = [divergence(found.float(), target, each) for each in temperatures]
            loss = loss + sum(gaps) / len(gaps)
        return loss

    def finalize(self, run: Run) -> None:
        """Re-estimate the batch norms of every size."""
        if any(isinstance(edit, Settle) for edit in run.edits):
            settle(run.model, run.edits, run.inputs(SETTLING))
        found = costs(run.model, run.edits, run.example)
        run.note(sizes=[{axis: getattr(each, axis) for axis in AXES} for each in found])

    def _check(self, run: Run, norms: Sequence[str]) -> None:
        known = 2 <= self.sizes <= MOST and 0 <= self.between <= MOST
        if not known or not 0 < self.smallest < 1 or not 0 < self.largest <= 1:
            raise MethodError(
                f"elastic takes 2 to {MOST} sizes, at most {MOST} of them between, and shares from "
                f"0 to 1, not sizes={self.sizes}, between={self.between}, smallest="
                f"{self.smallest}, largest={self.largest}."
            )
        if "latency" in run.limits():
            raise BudgetError(
                "elastic plans its sizes by params, macs or bytes, not by milliseconds: bound one "
                'of these, and pick a size by its latency with pliant.load(path, at="latency=...").'
            )
        if norms and (run.data is None or not run.data.has("train")):
            raise MethodError(
                f"elastic re-estimates batch norms, such as {norms[0]}, for every size when the "
                "training is over, and there are no training inputs: pass data, in a loop of "
                "your own too: pliant.start(..., data=pliant.Data(train=loader))."
            )

    def _sampled(self, run: Run) -> list[int]:
        """The smallest size, and random ones between it and the largest."""
        last = count(run.edits) - 1
        if last < 2 or not self.between:
            return [last] if last else []
        found = torch.randint(1, last, (self.between,), generator=run.generator)
        return [last, *found.tolist()]

    def _factors(self, run: Run, layers: Layers, seen: Mapping[str, Metric]) -> list[Nest]:
        """Plan layers at the smallest size, then ranks at all sizes with the best forms.

        Those of the size in the middle can leave the smallest a rank of 1, and those of the
        smallest cost the others something: both are tried, and those of a size between. Plans
        are compared by what they lose at all sizes.
        """
        rows = choices(run, layers, self.form, seen)
        most = run.limits() or {"params": self.largest * run.cost.params}
        least, share = _smallest(run, rows, most, self.smallest)
        taken = {name: rows[name] for name in least}
        shares = torch.linspace(1.0, share, self.sizes, dtype=torch.float64).tolist()
        limits = [_scaled(most, part) for part in shares]
        found = [_at_all(run, taken, least, limits)]
        for size in (self.sizes // 2, 3 * self.sizes // 4):
            with suppress(BudgetError):  # the smallest size cannot have the forms of this one
                forms = least | _planned(run, taken, limits[size])
                found.append(_at_all(run, taken, forms, limits))
        scores = {row.edit: row.score for each in taken.values() for row in each if row.edit}
        best = min(found, key=lambda plans: sum(scores[e] for p in plans for e in p.values()))
        return _built(_falling(best), layers, seen)


def _planned(run: Run, rows: dict[str, list[Option]], limits: dict[str, float]) -> Plan:
    # All of these are counts, so a whole number bounds them as well.
    budget = Budget(**{axis: max(1, int(bound)) for axis, bound in limits.items()})
    found = replace(run.planner, budget=budget).allocate(rows, rule="sum")
    return {edit.layer: edit for edit in found if isinstance(edit, Factor)}


def _at_all(
    run: Run, rows: Mapping[str, list[Option]], forms: Plan, limits: list[dict[str, float]]
) -> list[Plan]:
    """Plan all sizes with the same forms."""
    kept = {
        name: [row for row in rows[name] if row.edit and row.edit.form == edit.form]
        for name, edit in forms.items()
    }
    return [_planned(run, kept, each) for each in limits]


def _built(plans: Sequence[Plan], layers: Layers, seen: Mapping[str, Metric]) -> list[Nest]:
    """Compute the factors of all sizes."""
    edits = []
    for name, edit in plans[0].items():
        ranks = [plan[name].ranks for plan in plans]
        kernels = nested(layers[name].weight, edit.form, ranks, seen.get(name))
        edits.append(Nest(name, edit.form, sum(ranks, ()), kernels))
    return edits


def _scaled(limits: dict[str, float], share: float) -> dict[str, float]:
    return {axis: share * bound for axis, bound in limits.items()}


def _smallest(
    run: Run, rows: dict[str, list[Option]], most: dict[str, float], share: float
) -> tuple[Plan, float]:
    """Plan the smallest share of the budget that can be met, from the one asked for upwards."""
    steps = 16
    for step in range(steps + 1):
        part = share + (1 - share) * step / steps
        try:
            return _planned(run, rows, _scaled(most, part)), part
        except BudgetError:
            if step == steps:
                raise
    raise AssertionError


def _falling(plans: list[Plan]) -> list[Plan]:
    """Let no rank rise from one size to the next smaller one: that would not be nested."""
    for more, less in pairwise(plans):
        for name, edit in less.items():
            pairs = zip(edit.ranks, more[name].ranks, strict=True)
            less[name] = replace(edit, ranks=tuple(min(pair) for pair in pairs))
    return plans


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.track_running_stats
