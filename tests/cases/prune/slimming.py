"""Network slimming: the penalty and the cut by hand, before and after training."""

import pytest
import torch
from torch import nn
from torch.optim import SGD

from pliant.budget import Budget
from pliant.errors import BudgetError, ModelError
from pliant.methods.prune.slimming import Slimming
from pliant.run import Run, start
from pliant.testing import Case, toys
from tests.cases.prune import REFUSES, kept, pair, run_of


def scaled(*scales: float) -> nn.Sequential:
    """Channels that a batch norm scales, and a layer without one."""
    count = len(scales)
    model = nn.Sequential(
        *(nn.Linear(2, count), nn.BatchNorm1d(count), nn.ReLU()),
        *(nn.Linear(count, 4), nn.ReLU(), nn.Linear(4, 2)),
    )
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor(scales))
    return model


def step(run: Run, task: float = 0.0) -> None:
    """One step in which every parameter has the same gradient from the task."""
    assert run.optimizer is not None
    for parameter in run.model.parameters():
        parameter.grad = torch.full_like(parameter, task)
    run.before_step()
    run.optimizer.step()
    run.after_step()


def begun(model: nn.Module, method: Slimming, steps: int = 4) -> Run:
    optimizer = SGD(model.parameters(), 1.0)
    return start(model, method, example=(torch.zeros(2, 2),), optimizer=optimizer, steps=steps)


def a_step_moves_scales_by_their_sign_and_nothing_else() -> None:
    """The gradient of strength * sum |gamma| is strength * sign(gamma)."""
    run = begun(scaled(0.5, -0.5, 0.0, 2.0), Slimming(strength=0.125))
    before = [p.clone() for p in run.model.parameters()]
    step(run)
    moved = [(a - b).detach() for a, b in zip(run.model.parameters(), before, strict=True)]
    assert torch.equal(moved[2], -0.125 * torch.tensor([1.0, -1.0, 0.0, 1.0]))
    assert not any(part.any() for i, part in enumerate(moved) if i != 2)


def smallest_scales_leave_when_training_is_over() -> None:
    """The scales of the end decide: the first fell from 0.6 to 0.1."""
    run = begun(scaled(0.6, 0.3, -0.4, 0.5), Slimming(strength=0.0, start=1.0))
    for _ in range(4):
        step(run)
        assert not run.edits
    with torch.no_grad():
        run.model.get_submodule("1").weight[0] = 0.1  # type: ignore[operator, index]
    run.finish()
    assert kept(run)["0", "out"] == (2, 3)
    assert {layer for layer, _ in kept(run)} == {"0", "1", "3"}  # the other layer has no scales
    assert run.reasons["3"] == "no batch norm scales its channels"


def all_scales_are_compared() -> None:
    """One threshold for the network: of 1, 2, 3, 4 and 5, 6, 7, 8 half leave from one layer."""
    layers = [*scaled(1.0, 2.0, 3.0, 4.0)[:3], *scaled(5.0, 6.0, 7.0, 8.0)]
    model = nn.Sequential(*layers)
    model[3] = nn.Linear(4, 4)
    run = begun(model, Slimming(least=0.0), steps=0)
    run.finish()
    assert kept(run)["0", "out"] == (3,) and ("4", "channels") in kept(run)  # one of each stays


def fine_tuning_is_without_the_penalty() -> None:
    """With the cut in the middle the penalty ends there."""
    run = begun(scaled(0.5, 1.0, 2.0, 4.0), Slimming(strength=0.125, start=0.5))
    penalty = run.method.penalty(run)
    assert penalty is not None and penalty.item() == 0.125 * 7.5
    for _ in range(2):
        step(run)
    assert kept(run)["1", "channels"] == (2, 3) and run.method.penalty(run) is None
    scales = run.model.get_submodule("1").weight.detach().clone()  # type: ignore[operator, union-attr]
    step(run)
    assert torch.equal(run.model.get_submodule("1").weight, scales)  # type: ignore[arg-type]


def channels_that_meet_count_by_their_mean_scale() -> None:
    """In the residual toy the two norms of a sum would outweigh a single one by number alone."""
    model = toys.TOYS["residual"].model()
    run = start(model, Slimming(), example=toys.TOYS["residual"].inputs(1), steps=4)
    method = Slimming()
    for group in method.groups(run):
        assert torch.allclose(method.scores(run, [group])[group.name], torch.ones(1).double())


def what_cannot_be_slimmed_is_refused_before_training() -> None:
    with pytest.raises(ModelError, match="no batch norm behind channels"):
        run_of(pair(1.0, 2.0), Slimming(), steps=4)
    with pytest.raises(BudgetError, match="the least reachable is"):
        start(scaled(1.0, 2.0), Slimming(), Budget(params=1), example=(torch.zeros(2, 2),), steps=4)


BARE = "no batch norm behind channels"

CASES = (
    Case(
        "slimming",
        budget=Budget(params=0.85),  # of the grouped toy, most layers have no batch norm behind
        toys=("plain", "residual", "grouped", "volume", "linear", "signal"),
        refuses=REFUSES | {"bare": BARE, "transformer": BARE},
        variants=("slimming(start=0.5, rounds=2, end=1.0)", 'slimming(scope="local")'),
        own=(
            a_step_moves_scales_by_their_sign_and_nothing_else,
            smallest_scales_leave_when_training_is_over,
            all_scales_are_compared,
            fine_tuning_is_without_the_penalty,
            channels_that_meet_count_by_their_mean_scale,
            what_cannot_be_slimmed_is_refused_before_training,
        ),
    ),
)
