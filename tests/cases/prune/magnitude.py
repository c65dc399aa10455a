"""Magnitude: which filters leave, by hand."""

import pytest
import torch
from torch import nn

from pliant.budget import Budget
from pliant.errors import BudgetError
from pliant.methods.prune.magnitude import Magnitude
from pliant.testing import Case
from tests.cases.prune import REFUSES, TOYS, kept, pair, run_of


def weakest_filters_leave_with_their_readers() -> None:
    run = run_of(pair(3.0, 1.0, 2.0, 0.5), Magnitude(ratio=0.5))
    assert kept(run) == {("0", "out"): (0, 2), ("2", "in"): (0, 2)}
    assert run.model[0].weight.shape == (2, 2)  # type: ignore[index, union-attr]


def norms_differ() -> None:
    """(1, 1) has the larger l1 norm, (1.5, 0) the larger l2 norm."""
    for norm, stays in (("l1", 0), ("l2", 1)):
        model = pair(1.0, 1.0)
        with torch.no_grad():
            model[0].weight.copy_(torch.tensor([[1.0, 1.0], [1.5, 0.0]]))
        run = run_of(model, Magnitude(ratio=0.5, norm=norm))  # type: ignore[arg-type]
        assert kept(run)["0", "out"] == (stays,)


def stacked() -> nn.Sequential:
    """Two layers of filters: 1, 1, 1, 9 (mean 3) and 4, 5, 5, 6 (mean 5)."""
    first, second = pair(1.0, 1.0, 1.0, 9.0), pair(4.0, 5.0, 5.0, 6.0)
    return nn.Sequential(*first, nn.ReLU(), *second)


def global_ranking_is_in_units_of_the_layer_mean() -> None:
    run = run_of(stacked(), Magnitude(ratio=0.3, least=0.0))  # 2 -> 2 is a group as well
    assert kept(run)["0", "out"] == (3,)
    local = run_of(stacked(), Magnitude(ratio=0.3, least=0.0, scope="local"))
    assert kept(local)["0", "out"] == (1, 2, 3) and kept(local)["4", "out"] == (1, 2, 3)


def floors_hold() -> None:
    run = run_of(stacked(), Magnitude(ratio=0.9, least=0.5, scope="local"))
    assert [len(keep) for (_, side), keep in kept(run).items() if side == "out"] == [2, 1, 2]


def a_budget_is_met_with_as_few_channels_as_it_takes() -> None:
    """Weights 4 n + 2 of n filters: half of 34 allows three of eight."""
    run = run_of(pair(8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0), Magnitude(), Budget(params=0.5))
    assert kept(run)["0", "out"] == (0, 1, 2)
    with pytest.raises(BudgetError, match="params=3 .the least reachable is 6."):
        run_of(pair(1.0, 2.0), Magnitude(least=0.0), Budget(params=3))


CASES = (
    Case(
        "magnitude",
        toys=TOYS,
        refuses=REFUSES,
        variants=(
            'magnitude(norm="l1", scope="local")',
            "magnitude(rounds=3)",
            "magnitude(start=1.0)",
        ),
        own=(
            weakest_filters_leave_with_their_readers,
            norms_differ,
            global_ranking_is_in_units_of_the_layer_mean,
            floors_hold,
            a_budget_is_met_with_as_few_channels_as_it_takes,
        ),
    ),
)
