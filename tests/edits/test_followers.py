"""What stands beside a network goes along with it: averages, optimizers handed over late."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pliant import start
from pliant.errors import TrainingError
from pliant.testing.toys import CLASSES
from tests.edits import held, test_insert, test_remove, test_swap, test_widen
from tests.edits.held import Whole

WHOLES = (
    *(test_swap.WHOLES[1], test_widen.WHOLES[1], test_insert.WHOLES[0], test_insert.WHOLES[1]),
    *(test_remove.WHOLES[0], test_insert.slimmed()),
)
IDS = [whole.name for whole in WHOLES]


def step(run: Any, optimizers: list[Any], x: torch.Tensor) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad()
    labels = torch.arange(len(x)) % CLASSES
    nn.functional.cross_entropy(run.model(x), labels).backward()
    run.before_step()
    for optimizer in optimizers:
        optimizer.step()
    run.after_step()


@pytest.mark.parametrize("whole", WHOLES, ids=IDS)
def test_an_average_of_the_weights_follows(whole: Whole) -> None:
    """It has the same layers, goes on averaging, and keeps what it had where nothing was made."""
    model, x = whole.model().train(), whole.inputs()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = SGD(model.parameters(), 0.1, momentum=0.9)
    run = start(
        model, whole.method(), example=(x,), optimizer=optimizer, steps=held.STEPS, copies=[average]
    )
    for _ in range(held.STEPS):
        step(run, [optimizer], x)
        average.update_parameters(model)
    run.finish()
    assert held.sizes(average.module) == held.sizes(model)
    assert not torch.equal(average.module.eval()(x), model.eval()(x))


def test_an_average_doubles_its_own_channels_and_computes_as_before() -> None:
    whole = test_widen.WHOLES[1]
    model, x = whole.model().eval(), whole.inputs()
    average = AveragedModel(whole.model(seed=3)).eval()
    with torch.no_grad():
        wanted = average(x)
        run = start(model, whole.method(), example=(x,), copies=[average])
        run.finish()
        assert torch.allclose(average(x), wanted, atol=1e-5)
    assert held.sizes(average.module) == held.sizes(model)


def test_a_neighbour_that_moves_into_a_row_keeps_its_own_average() -> None:
    whole = test_insert.WHOLES[1]
    model, average = whole.model(), AveragedModel(whole.model(seed=3))
    stem = average.module.stem.weight.detach().clone()
    run = start(model, whole.method(), example=(whole.inputs(1),), copies=[average])
    run.finish()
    assert torch.equal(average.module.stem.layer.weight, stem)
    added, wanted = average.module.stem.added, model.stem.added  # type: ignore[union-attr]
    assert all(
        torch.equal(value, wanted.state_dict()[name]) for name, value in added.state_dict().items()
    )


@pytest.mark.parametrize("whole", WHOLES, ids=IDS)
def test_an_optimizer_that_is_handed_over_late_gets_what_it_missed(whole: Whole) -> None:
    model, x = whole.model().train(), whole.inputs()
    optimizer = SGD(model.parameters(), 0.01, momentum=0.9)
    run = start(model, whole.method(), example=(x,), steps=held.STEPS)
    run.apply(*whole.edits)
    run.optimizer = optimizer
    known = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in model.parameters()} <= {*known} and len(known) == len({*known})
    step(run, [optimizer], x)


@pytest.mark.parametrize("whole", WHOLES[2:4], ids=IDS[2:4])
def test_layers_that_nobody_trains_are_not_put_in_silently(whole: Whole) -> None:
    model, x = whole.model().train(), whole.inputs()
    optimizer = SGD(model.parameters(), 0.01)
    run = start(model, whole.method(), example=(x,), steps=held.STEPS)
    with pytest.raises(TrainingError, match="still holds others of the network.*never train"):
        for _ in range(held.STEPS):
            step(run, [optimizer], x)


def test_an_optimizer_of_ones_own_for_what_is_new_will_do() -> None:
    whole = test_insert.WHOLES[1]
    model, x = whole.model().train(), whole.inputs()
    old = SGD(model.parameters(), 0.01)
    run = start(model, whole.method(), example=(x,), steps=held.STEPS)
    known = {*model.parameters()}
    run.apply(*whole.edits)
    new = SGD([p for p in model.parameters() if p not in known], 0.01)
    for _ in range(3):
        run.step = 5  # past the edits of the plan
        step(run, [old, new], x)
