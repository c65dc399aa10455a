"""Cuttlefish: stable ranks by hand, and the step at which layers are split."""

import pytest
import torch
from torch import nn
from torch.optim import SGD

from pliant.budget import Budget
from pliant.edits import Factor
from pliant.errors import MethodError
from pliant.math.rank import stable_rank
from pliant.methods.lowrank.cuttlefish import Cuttlefish
from pliant.run import Run, start
from pliant.testing import Case


def linear(*sigma: float) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(len(sigma), len(sigma), bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.diag(torch.tensor(sigma)))
    return model


def run_of(method: Cuttlefish, budget: Budget | None = None, steps: int = 40) -> Run:
    model = linear(*[1.0] * 8)
    optimizer = SGD(model.parameters(), 0.1)
    return start(
        model, method, budget, example=(torch.zeros(1, 8),), optimizer=optimizer, steps=steps
    )


def set_spectrum(run: Run, *sigma: float) -> None:
    with torch.no_grad():
        run.model.get_submodule("0").weight.copy_(torch.diag(torch.tensor(sigma)))  # type: ignore[operator]


def stable_ranks_by_hand() -> None:
    """(4 + 1 + 1) / 4 directions; all alike count in full, and one alone is one."""
    assert stable_rank(torch.tensor([2.0, 1.0, 1.0])) == 1.5
    assert stable_rank(torch.ones(5)) == 5.0 and stable_rank(torch.tensor([3.0, 0.0])) == 1.0
    assert stable_rank(torch.zeros(4)) == 1.0


def ranks_are_in_units_of_what_they_were() -> None:
    """From 8 of 8 the stable rank falls to 3: rank 3, of which two factors have 48 of 64."""
    run = run_of(Cuttlefish(warmup=0.5, settled=0.0))
    set_spectrum(run, 1.0, 1.0, 1.0, *[0.0] * 5)
    for step in range(1, 40):
        run.after_step()
        assert len(run.edits) == (step >= 20), "no earlier: a warm-up of a fixed length"
    assert run.edits == [Factor("0", "svd", (3,))]


def layers_are_split_once_ranks_have_settled() -> None:
    """Looks at steps 4, 8, 12, ...: still falling at 4 and 8, the same at 12."""
    run = run_of(Cuttlefish(warmup=1.0, settled=0.01))
    for step in range(1, 16):
        if step <= 8:
            left = 1 - step / 10
            set_spectrum(run, 1.0, 1.0, *[left] * 6)
        run.after_step()
        assert len(run.edits) == (step >= 12), step


def a_budget_scales_all_ranks() -> None:
    run = run_of(Cuttlefish(warmup=0.0), Budget(params=0.5))
    assert run.edits == [Factor("0", "svd", (2,))], "16 weights a rank: 32 of 64"
    with pytest.raises(MethodError, match="warmup must be float in 0..1"):
        run_of(Cuttlefish(warmup=2.0))


CASES = [
    Case(
        "cuttlefish",
        spec="cuttlefish(warmup=0.5)",
        variants=(
            'cuttlefish(warmup=1.0, settled=0.5, looks=2, form="tucker2")',
            'cuttlefish(warmup=0.0, form="spatial")',
        ),
        own=(
            stable_ranks_by_hand,
            ranks_are_in_units_of_what_they_were,
            layers_are_split_once_ranks_have_settled,
            a_budget_scales_all_ranks,
        ),
    ),
]
