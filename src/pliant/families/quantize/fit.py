"""From a plan and a few samples to the numbers of every layer: calibrated, corrected, fitted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from pliant.cost import twin
from pliant.edits import Edit, Quantize, replay
from pliant.families.quantize.levels import begun, shared_step
from pliant.families.quantize.samples import Few
from pliant.families.quantize.tunable import tunable, tunables
from pliant.families.quantize.tuning import Goal, Judge, Rates, correct, independent, joint
from pliant.math.quantize import Grouping
from pliant.nn import kinds
from pliant.observe.ranges import observe
from pliant.run import Run
from pliant.surgery.blocks import blocks


@dataclass(frozen=True)
class Stages:
    """How a rounded network is fitted.

    Args:
        correct: whether biases are shifted before.
        independent: steps of stage 1.
        joint: steps of stage 2.
        rates: of stage 1.
        slowdown: rates of stage 2, in units of those of stage 1.
        goal: of stage 2.
        step: distance of levels in all layers, in units of the root mean square of their weights;
            0 places them for the least squared error.
    """

    correct: bool
    independent: int
    joint: int
    rates: Rates
    slowdown: float
    goal: Goal
    step: float = 0.0


def fitted(
    run: Run, plan: Mapping[str, Edit], rule: Grouping, few: Few | None, stages: Stages
) -> list[Edit]:
    """Return the edits of a plan with their numbers.

    Tables, layers with several weights and tied ones are rounded and not fitted. Layers that none
    of the inputs reached, as experts may be, have their weights rounded only.

    Args:
        run: its model is what the rounded network shall say; it stays as it is.
        plan: how each layer is written, those first that others share a weight of.
        rule: which channels share a scale.
        few: inputs to look at and to learn from; without any, weights are only rounded.
        stages: how to fit.
    """
    teacher = twin(run.model).eval().requires_grad_(False)
    single = {n: edit for n, edit in plan.items() if isinstance(edit, Quantize)}
    seen = [name for name in single if _reads(teacher, name)]
    flows = observe(teacher, seen, few.look if few else [])
    unused = [name for name in seen if few is not None and name not in flows]
    single |= {name: replace(single[name], inputs=0, outputs=0) for name in unused}
    plan = {**plan, **single}
    step = shared_step(teacher, single, stages.step) if stages.step else 0.0
    values = {n: begun(teacher, edit, rule, flows.get(n), step) for n, edit in single.items()}
    tied = {edit.source for edit in single.values()} | {n for n, e in single.items() if e.source}
    free = [name for name in seen if name not in tied and name not in unused]
    begun_edits = {
        name: replace(edit, values=values[name])
        if isinstance(edit, Quantize)
        else replace(edit, rule=rule)  # type: ignore[type-var]
        for name, edit in plan.items()
    }
    if few is None or not free:
        return list(begun_edits.values())
    student = twin(teacher)
    replay(student, [edit for name, edit in begun_edits.items() if name not in free])
    tunable(student, {name: (single[name].written, values[name]) for name in free})
    _fit(run, teacher, student, free, few, stages)
    for name, layer in tunables(student):
        begun_edits[name] = replace(single[name], values=layer.values())
    return list(begun_edits.values())


def _reads(model: nn.Module, name: str) -> bool:
    return kinds.kind_of(model.get_submodule(name)) not in kinds.TABLE


def _fit(
    run: Run, teacher: nn.Module, student: nn.Module, free: list[str], few: Few, stages: Stages
) -> None:
    if stages.correct:
        correct(teacher, student, few.look)
    if not stages.independent and not stages.joint:
        return
    parts, batches = blocks(run.model, free, run.example, few.look), few.stream()
    goal = replace(stages.goal, loss=None if few.task is None else few.task.total)
    judge = Judge(teacher, student, parts, goal, few.held)
    judge.see()
    errors = independent(
        teacher,
        student,
        parts,
        batches,
        steps=stages.independent,
        rates=stages.rates,
        held=few.held,
    )
    run.note(stage="independent", errors={name: list(pair) for name, pair in errors.items()})
    judge.see()
    rates = stages.rates
    joint(
        teacher,
        student,
        parts,
        batches,
        steps=stages.joint,
        rates=Rates(stages.slowdown * rates.weights, stages.slowdown * rates.scales),
        goal=goal,
        judge=judge,
    )
    judge.best.restore()
    by = {} if few.task is None else {"by": "the task's loss"}
    run.note(stage="joint", losses=judge.losses, **by)
