"""Compresses one network and measures it right after it became smaller and at the end."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from pliant.budget import Budget
from pliant.cost import cost
from pliant.data import Data, Epoch, Train
from pliant.drivers.loop import evaluate, fit
from pliant.edits import Edit
from pliant.method import Method
from pliant.run import Run, start

Watch = Callable[[dict[str, Any]], None]
Values = dict[str, Any]


@dataclass(frozen=True)
class Observed(Method):
    """Another method, unchanged, with a look at the network whenever its shape has changed.

    A look after the hook sees what the method made before the next optimizer step.
    """

    method: Method
    look: Callable[[Run], None]

    @property
    def parts(self) -> tuple[Method, ...]:
        return (self.method,)

    def refuse(self, run: Run) -> None:
        self.method.refuse(run)

    def prepare(self, run: Run) -> None:
        self.method.prepare(run)
        self.look(run)

    def epoch(self, epoch: Epoch, data: Data) -> Epoch:
        return self.method.epoch(epoch, data)

    def weigh(self, run: Run, losses: Tensor, output: Any, batch: Any) -> Tensor | None:
        return self.method.weigh(run, losses, output, batch)

    def loss(self, run: Run, loss: Tensor, output: Any, batch: Any) -> Tensor:
        return self.method.loss(run, loss, output, batch)

    def penalty(self, run: Run) -> Tensor | None:
        return self.method.penalty(run)

    def before_step(self, run: Run) -> None:
        self.method.before_step(run)

    def after_step(self, run: Run) -> None:
        self.method.after_step(run)
        self.look(run)

    def after_epoch(self, run: Run) -> None:
        self.method.after_epoch(run)
        self.look(run)

    def finalize(self, run: Run) -> None:
        self.method.finalize(run)
        self.look(run)


@dataclass
class Looker:
    """Scores the network on the test split each time edits were made; keeps the last score."""

    data: Data
    edits: int = 0
    seen: Values = field(default_factory=dict)
    seconds: float = 0.0

    def __call__(self, run: Run) -> None:
        if len(run.edits) <= self.edits:  # fewer: what was done in several edits is now in one
            return
        began = time.monotonic()
        self.edits = len(run.edits)
        score = evaluate(run.model, self.data, "test")
        self.seen = {"accuracy_before": score.accuracy, "step": run.step}
        self.seconds += time.monotonic() - began


def compress(
    model: nn.Module,
    data: Data,
    method: Method,
    budget: dict[str, Any],
    train: Train,
    *,
    seed: int,
    teacher: nn.Module | None = None,
    watch: Watch | None = None,
) -> Values:
    """Run a method on a network, in place, and score it on the test split.

    Returns:
        accuracy and loss at the end; accuracy_before, right after the network became smaller,
        and the step when that was; params, macs, bytes; misses of the budget; forms and ranks, and
        the ranks that the method noted as it went; seconds without those spent on scoring.
    """
    began, looker = time.monotonic(), Looker(data)
    steps = train.steps(data.steps(train.batch))
    run = start(
        model,
        Observed(method, looker),
        Budget(**budget) if budget else None,
        data=data,
        steps=steps,
        seed=seed,
    )
    fit(run, data, train, watch=watch, teacher=teacher)
    after = run.finish(strict=False)
    seconds = time.monotonic() - began - looker.seconds
    return {
        **scored(model, data),
        **looker.seen,
        "steps": steps,
        "misses": run.misses(after),
        "layers": described(run.edits),
        "ranks": noted(run),
        "seconds": round(seconds, 2),
    }


def scored(model: nn.Module, data: Data) -> Values:
    """Score and count a network."""
    score, costs = evaluate(model, data, "test"), cost(model, data.example())
    return {
        "accuracy": score.accuracy,
        "loss": round(score.loss, 5),
        "params": costs.params,
        "macs": costs.macs,
        "bytes": costs.bytes,
    }


def noted(run: Run) -> list[Values]:
    """Give the ranks in the history, each with its step: those planned, or those at an energy."""
    rows = ((row["step"], row.get("planned", row.get("ranks"))) for row in run.log)
    return [{"step": step, "ranks": ranks} for step, ranks in rows if ranks]


def described(edits: list[Edit]) -> dict[str, str]:
    """Write form and ranks of every layer that was changed: "tucker2 12 14"."""
    return {
        edit.layer: " ".join(str(part) for part in (getattr(edit, "form", ""), *edit.ranks))
        for edit in edits
        if hasattr(edit, "ranks")
    }
