"""Odd numbers and options end in a result that is finite and true, or in one sentence."""

import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

import pliant
from pliant.data import Train
from pliant.errors import PliantError, TrainingError
from pliant.run import Run
from pliant.testing.toys import TOYS
from tests.cases import CASES
from tests.reliability import numerics

PLAN = Train(epochs=1, finetune=1, batch=8, lr=0.01, device="cpu")


def test_one_oddity_of_every_method_holds_no_surprise(tmp_path: Path) -> None:
    rows = numerics.drawn(len(CASES), seed=5)
    assert {method for method, _ in rows} == set(CASES)
    found = numerics.run(rows, tmp_path, seed=5)
    assert found["raw"] == found["untrue"] == 0
    assert found["true"] > 15 and found["refused"] > 15


@dataclass(frozen=True)
class Spoils(pliant.Method):
    """Does one thing that no method should."""

    at: str = "finalize"
    how: str = "divide"

    def _spoil(self, run: Run, at: str) -> None:
        if at != self.at:
            return
        if self.how == "divide":
            _ = 1 / (run.step - run.step)
        elif self.how == "decompose":
            torch.linalg.cholesky(-torch.eye(2))
        else:
            next(run.model.parameters()).data.fill_(math.nan if self.how == "nan" else 3e38)

    def prepare(self, run: Run) -> None:
        self._spoil(run, "prepare")

    def before_step(self, run: Run) -> None:
        self._spoil(run, "before_step")

    def after_step(self, run: Run) -> None:
        self._spoil(run, "after_step")

    def after_epoch(self, run: Run) -> None:
        self._spoil(run, "after_epoch")

    def finalize(self, run: Run) -> None:
        self._spoil(run, "finalize")


@pytest.mark.parametrize("at", ["prepare", "before_step", "after_step", "after_epoch", "finalize"])
@pytest.mark.parametrize(
    ("how", "why"), [("divide", "division by zero"), ("decompose", "cholesky")]
)
def test_arithmetic_that_fails_anywhere_is_said(at: str, how: str, why: str) -> None:
    toy = TOYS["linear"]
    with pytest.raises(TrainingError, match=f"Spoils cannot compute with .*{why}"):
        pliant.compress(toy.model(), toy.data(), Spoils(at, how), train=PLAN)


def test_weights_that_are_not_finite_are_no_result() -> None:
    toy = TOYS["linear"]
    with pytest.raises(TrainingError, match="Spoils left 0.weight with NaN or infinity"):
        pliant.compress(toy.model(), toy.data(), Spoils(how="nan"))
    run = pliant.start(toy.model(), Spoils(how="nan"), data=toy.data())
    with pytest.raises(TrainingError, match="Spoils left 0.weight"):
        run.finish(strict=False)


def test_outputs_that_are_not_finite_are_no_result() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    with pytest.raises(TrainingError, match="gives NaN or infinity where the dense one"):
        pliant.compress(net, torch.full((4, 4), 9.0), Spoils(how="huge"))


def test_a_method_may_differentiate_with_mixed_precision() -> None:
    toy = TOYS["linear"]
    plan = Train(epochs=1, batch=8, device="cpu", precision="bf16-mixed")
    assert pliant.compress(toy.model(), toy.data(), "mltp", train=plan).report.after.loss


def test_fine_tuning_goes_at_its_own_rate() -> None:
    """What a method makes of the learning rate ends with the method."""
    toy = TOYS["linear"]
    run = pliant.start(
        toy.model(), pliant.method("progressive_stepwise"), data=toy.data(), epochs=2, batch=8
    )
    assert run.epochs is not None and run.epochs[0].rate != 1 and run._rate() != 1
    run.finished = True
    assert run._rate() == 1


def test_a_training_of_fine_tuning_only_works() -> None:
    toy = TOYS["linear"]
    plan = Train(epochs=0, finetune=1, batch=8, device="cpu")
    assert pliant.compress(toy.model(), toy.data(), "progressive_stepwise", train=plan).report.met


def test_refusals_are_sentences() -> None:
    assert numerics.clear(PliantError("Weights must be finite, but one is not: change it."))
    assert not numerics.clear(PliantError("no"))
