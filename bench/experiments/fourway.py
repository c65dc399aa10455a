"""The four-way table: ranks found by one method, weights trained for another.

Both dense networks take the same steps from the same checkpoint: one under the first method's
penalty up to the moment at which it factorizes, the other without. Each method reads off its
ranks from its own network. All four combinations are factorized in the same way, without data,
their batch norms recalibrated on the same images, and fine-tuned for the steps that are left.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from bench.compress import Observed, described
from bench.experiments import Table
from pliant.budget import Budget
from pliant.cost import cost
from pliant.data import Data, Train
from pliant.drivers.loop import evaluate, fit, rate
from pliant.edits import Edit, from_json, replay, to_json
from pliant.errors import PliantError
from pliant.method import Method
from pliant.registry import construct
from pliant.run import Run, start
from pliant.surgery.batchnorm import recalibrate

Watch = Callable[[dict[str, Any]], None]


class Stop(Exception):
    """The network has been factorized: what follows is trained elsewhere."""


@dataclass
class Moment:
    """Keeps the dense network as it was when the first edits were made, and the edits."""

    dense: nn.Module | None = None
    edits: tuple[Edit, ...] = ()
    step: int = 0

    def attach(self, run: Run) -> None:
        """Look at what the method does to the network from now on."""
        apply = run.apply

        def keep(*edits: Edit) -> None:
            if not run.edits:
                self.dense, self.step = copy.deepcopy(run.model), run.step
            apply(*edits)

        run.apply = keep  # type: ignore[method-assign]

    def __call__(self, run: Run) -> None:
        if run.edits:
            self.edits = tuple(run.edits)
            raise Stop


@dataclass(frozen=True)
class Attached(Observed):
    """An observed method whose first edits are noticed before they are made."""

    def prepare(self, run: Run) -> None:
        self.look.attach(run)  # type: ignore[attr-defined]
        super().prepare(run)


@dataclass(frozen=True)
class Halt(Method):
    """Plain training that stops after some steps."""

    after: int

    def prepare(self, run: Run) -> None:
        if not self.after:
            raise Stop

    def after_step(self, run: Run) -> None:
        if run.step == self.after:
            raise Stop


def measure(
    model: nn.Module,
    data: Data,
    plan: Mapping[str, Any],
    train: Train,
    seed: int,
    watch: Watch,
) -> dict[str, Any]:
    """Train both dense networks, read off both sets of ranks, and train all four combinations."""
    first, second = plan["methods"]
    budget, moment = Budget(**plan["budget"]), Moment()
    elastic = Attached(construct(**plan["methods"][first]), moment)
    until_stopped(copy.deepcopy(model), elastic, budget, data, train, seed, watch)
    plainly, rival = copy.deepcopy(model), Moment()
    until_stopped(plainly, Halt(moment.step), None, data, train, seed, watch)
    other = Attached(construct(**plan["methods"][second]), rival)
    until_stopped(copy.deepcopy(plainly), other, budget, data, train, seed, watch)
    assert moment.dense is not None
    tail = rest(train, data, moment.step, first)
    ranks = {first: moment.edits, second: rival.edits}
    weights = {first: moment.dense, second: plainly}
    rows = [
        {"ranks": a, "weights": b, **tuned(weights[b], ranks[a], data, plan, tail, seed, watch)}
        for a in ranks
        for b in weights
    ]
    dense = {name: evaluate(net, data, "test").accuracy for name, net in weights.items()}
    return {"rows": rows, "dense": dense, "step": moment.step, "steps": _steps(train, data)}


def until_stopped(
    model: nn.Module,
    method: Method,
    budget: Budget | None,
    data: Data,
    train: Train,
    seed: int,
    watch: Watch,
) -> None:
    """Train a network, in place, until its method says stop."""
    steps = _steps(train, data)
    try:
        fit(
            start(model, method, budget, data=data, steps=steps, seed=seed),
            data,
            train,
            watch=watch,
        )
    except Stop:
        return
    raise PliantError(f"{type(method).__name__} must factorize before the training ends.")


def rest(train: Train, data: Data, step: int, name: str) -> Train:
    """Plan the steps that are left, from the learning rate that is reached."""
    steps, per_epoch = _steps(train, data), data.steps(train.batch)
    if step >= steps:
        raise PliantError(
            f"The four-way table fine-tunes after factorizing, but {name} factorizes after the "
            "last step; let it factorize earlier."
        )
    return replace(train, epochs=(steps - step) / per_epoch, lr=rate(train, step, steps), warmup=0)


def tuned(
    dense: nn.Module,
    edits: tuple[Edit, ...],
    data: Data,
    plan: Mapping[str, Any],
    train: Train,
    seed: int,
    watch: Watch,
) -> dict[str, Any]:
    """Factorize a copy of a dense network, score it, fine-tune it and score it again."""
    model = copy.deepcopy(dense)
    replay(model, from_json(to_json(edits)))  # without the factors that a method computed
    images = data.calibration(plan["recalibrate"], batch=256, seed=seed)
    recalibrate(model, images)
    before = evaluate(model, data, "test").accuracy
    run = start(model, Method(), data=data, steps=_steps(train, data), seed=seed)
    fit(run, data, train, watch=watch)
    return {
        "accuracy_before": before,
        "accuracy": evaluate(model, data, "test").accuracy,
        "params": cost(model, data.example()).params,
        "layers": described(list(edits)),
    }


def table(asked: Mapping[str, Any], cell: Mapping[str, Any]) -> Table:
    """Show the four combinations."""
    rows = [
        [
            row["ranks"],
            row["weights"],
            f"{row['params']:,}",
            f"{100 * row['accuracy_before']:.2f}",
            f"{100 * row['accuracy']:.2f}",
        ]
        for row in cell["values"]["rows"]
    ]
    specs = "; ".join(f"{name}: `{spec}`" for name, spec in asked["methods"].items())
    head = ["ranks from", "weights from", "parameters", "before fine-tuning, %", "after, %"]
    return Table(f"Ranks and weights exchanged, at {asked['budget']:.0%} ({specs})", head, rows)


def _steps(train: Train, data: Data) -> int:
    return train.steps(data.steps(train.batch))
