"""Activation density: the meter against a plain count, and the widths by hand."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from pliant.budget import Budget
from pliant.data import Data
from pliant.errors import DataError, ModelError
from pliant.families.prune.density import Meter, densities, saturated
from pliant.methods.prune.activation_density import ActivationDensity
from pliant.run import Run, start
from pliant.surgery.prove import cuttable
from pliant.testing import Case, toys
from tests.cases.prune import REFUSES, TOYS, kept, pair
from tests.cases.witness import on_many


class Reused(nn.Module):
    """One rectifier module called twice, in place, then a function; pooling and dropout behind."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3)
        self.relu, self.pool = nn.ReLU(inplace=True), nn.MaxPool2d(2)
        self.drop = nn.Dropout(0.5)
        self.three, self.four = nn.Linear(8, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.two(self.pool(self.relu(self.one(x)))))
        x = self.drop(nn.functional.relu(self.three(x.mean((2, 3)))))
        out: Tensor = self.four(x)
        return out


def a_meter_counts_what_a_plain_count_does() -> None:
    """Exactly, by call and not by module, for any batch, in both modes."""
    torch.manual_seed(0)
    model, images = Reused(), torch.randn(11, 3, 9, 9)
    groups, _ = cuttable(model, (images[:1],))
    first = model.one(images).relu()
    second = model.two(model.pool(first)).relu()
    third = model.three(second.mean((2, 3))).relu()
    expected = {"one": first, "two": second, "three": third}
    for training in (False, True):
        model.train(training)
        with torch.no_grad(), Meter(model, groups) as meter:
            for batch in images.split(4):  # the last one is smaller
                model(batch)
        assert meter.found.keys() == expected.keys()
        for name, seen in expected.items():
            counts = (seen > 0).transpose(0, 1).flatten(1).sum(1)
            found = meter.found[name]
            assert found.nonzero.dtype == torch.int64 and torch.equal(found.nonzero, counts)
            assert found.entries * len(counts) == seen.numel()
            assert found.mean == int(counts.sum()) / seen.numel()
    assert not any(module._forward_hooks for module in model.modules())


def behind_a_sum_the_last_rectifier_counts() -> None:
    """In the residual toy branch and shortcut end in one rectifier; none counts twice."""
    toy = toys.TOYS["residual"]
    model = toy.model().eval()
    groups, _ = cuttable(model, toy.inputs(1))
    (images,) = toy.inputs(5)
    found = densities(model, groups, [(images,)])
    with torch.no_grad():
        hidden = model.norm(model.stem(images)).relu()  # type: ignore[operator]
        met = (model.branch(hidden) + model.shortcut(hidden)).relu()  # type: ignore[operator]
    assert found["stem"].mean == pytest.approx(float((hidden > 0).double().mean()))
    (ends,) = (group for group in groups if ("shortcut", "out") in group.slots)
    assert found[ends.name].mean == pytest.approx(float((met > 0).double().mean()))


def half_dead() -> tuple[nn.Sequential, Data]:
    """Half the channels of a norm are dead, the others always positive."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
        *(nn.Flatten(), nn.Linear(8, 4)),
    )
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([0.0, 1.0] * 4))
        model[1].bias.copy_(torch.tensor([-1.0, 50.0] * 4))
    return model, Data((torch.randn(32, 3, 6, 6), torch.arange(32) % 4), classes=4)


def dead_channels_leave_and_nothing_changes() -> None:
    """Density is 1/2 exactly, the layer is halved, the logits stay."""
    model, data = half_dead()
    (images,) = data.example(32)
    groups, _ = cuttable(model, (images[:1],))
    assert densities(model, groups, [(images,)])["0"].mean == 0.5
    whole = copy.deepcopy(model).eval()
    run = start(model, ActivationDensity(), data=data, steps=8)
    run.model.eval()
    method = ActivationDensity()
    run.step, run.epoch = 4, 1
    method.after_epoch(run)  # in mid-training: no batch norm is estimated anew
    assert kept(run)["0", "out"] == (1, 3, 5, 7)
    assert torch.allclose(run.model.eval()(images), whole(images), atol=1e-5)


def with_densities(run: Run, wanted: dict[str, float], cut: Callable[[], None]) -> None:
    """Set biases so that a share of units is always dead, then resize."""
    for name, share in wanted.items():
        layer = run.model.get_submodule(name)
        dead = torch.arange(layer.out_features) >= round(share * layer.out_features)  # type: ignore[arg-type]
        with torch.no_grad():
            layer.weight.zero_()  # type: ignore[operator]
            layer.bias.copy_(1.0 - 2.0 * dead)  # type: ignore[operator, arg-type]
    cut()


def widths_and_costs_by_hand() -> None:
    """10 and 20 units at densities 0.4 and 0.75 become 4 and 15: 6-4-15-2 has 60 + 24 + 28."""
    layers = [nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 2)]
    data = Data((torch.randn(16, 6), torch.arange(16) % 2), classes=2)
    run = start(nn.Sequential(*layers), ActivationDensity(), data=data, steps=10)
    wanted = {"0": 0.4, "2": 0.75}
    run.step, run.epoch = 2, 1
    with_densities(run, wanted, run.after_epoch)
    cost = run.planner.now()
    assert cost.params == (6 * 4 + 4) + (4 * 15 + 15) + (15 * 2 + 2)
    assert cost.macs == 6 * 4 + 4 * 15 + 15 * 2
    run.state["rounds"] = 5  # no further resizing: 2 steps were dense, 8 are of the small one
    run.step = 10
    run.finish()
    dense = 6 * 10 + 10 * 20 + 20 * 2
    assert run.log[-1]["complexity"] == pytest.approx((2 * dense + 8 * 114) / (10 * dense))


def one_iteration_costs_what_dense_training_does() -> None:
    run = start(pair(1.0, 2.0, 3.0), ActivationDensity(start=1.0), data=points(), steps=4)
    run.step = 4
    run.finish()
    assert run.log[-1]["complexity"] == 1.0


def points() -> Data:
    return Data((torch.randn(16, 2), torch.arange(16) % 2), classes=2)


def a_budget_is_met_by_one_power_for_all() -> None:
    """Densities of 1/2 and 1/4 to the power p: with p = 1/2 of 16 and 16 units 11 and 8 stay."""
    layers = [nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2)]
    model = nn.Sequential(*layers)
    widths = 11, 8
    params = 3 * widths[0] + (widths[0] + 1) * widths[1] + 2 * (widths[1] + 1)
    run = start(model, ActivationDensity(), Budget(params=params), data=points(), steps=4)
    with_densities(run, {"0": 0.5, "2": 0.25}, run.finish)
    assert [len(kept(run)[name, "out"]) for name in ("0", "2")] == list(widths)


def saturation_looks_at_the_epochs_before() -> None:
    assert saturated([[0.5, 0.5, 0.505]], 2, 0.01) and not saturated([[0.5, 0.5, 0.52]], 2, 0.01)
    assert not saturated([[0.5, 0.5]], 2, 0.01)
    assert not saturated([[0.5, 0.5, 0.5], [0.5, 0.5, 0.6]], 2, 0.01)
    run = start(pair(1.0, 2.0, 3.0), ActivationDensity(window=2, start=0.9), data=points(), steps=9)
    for step in range(1, 4):
        run.step = step
        run.after_epoch()
        assert run.state["rounds"] == int(step == 3)  # the schedule would wait until step 8


def without_a_tolerance_nothing_is_saturated() -> None:
    method = ActivationDensity(window=2, start=0.9, tolerance=0.0)
    run = start(pair(1.0, 2.0, 3.0), method, data=points(), steps=9)
    for run.step in range(1, 4):
        run.after_epoch()
    assert run.state["rounds"] == 0


def resizings_are_spread_up_to_the_end() -> None:
    """The first of two in the first tenth; the second in the middle, or when all is over."""
    for end, due in ((0.5, 2), (1.0, 1)):
        method = ActivationDensity(rounds=2, start=0.1, end=end)
        schedule = method.schedule(start(pair(1.0, 2.0, 3.0), method, data=points(), steps=10))
        assert [schedule.due(step, 10) for step in (1, 4, 10)] == [1, due, 2]


def fresh_weights_forget() -> None:
    """After a resizing weights and momentum are new; the caller's random state is not used."""
    model = pair(1.0, -2.0, 3.0, 4.0)
    optimizer = SGD(model.parameters(), 0.1, momentum=0.9)
    method = ActivationDensity(weights="fresh")
    run = start(model, method, data=points(), optimizer=optimizer, steps=4)
    model(torch.randn(4, 2)).sum().backward()
    optimizer.step()
    before, random = model[2].bias.detach().clone(), torch.get_rng_state()
    run.step = 2
    run.after_epoch()
    assert torch.equal(random, torch.get_rng_state()) and run.state["rounds"] == 1
    assert not torch.equal(before, run.model[2].bias) and not optimizer.state  # type: ignore[index]


def what_is_never_zero_is_refused() -> None:
    smooth = nn.Sequential(nn.Linear(2, 4), nn.GELU(), nn.Linear(4, 2))
    with pytest.raises(ModelError, match="no rectifier"):
        start(smooth, ActivationDensity(), data=points())
    with pytest.raises(DataError, match="looks at training inputs"):
        start(pair(1.0, 2.0), ActivationDensity(), example=(torch.zeros(2, 2),))


CASES = (
    Case(
        "activation_density",
        toys=TOYS,
        refuses=REFUSES,
        variants=('activation_density(weights="fresh")', "activation_density(start=1.0)"),
        witnesses={
            "samples": on_many("activation_density", "samples"),
            "window": saturation_looks_at_the_epochs_before,
            "tolerance": without_a_tolerance_nothing_is_saturated,
            "end": resizings_are_spread_up_to_the_end,
        },
        own=(
            a_meter_counts_what_a_plain_count_does,
            behind_a_sum_the_last_rectifier_counts,
            dead_channels_leave_and_nothing_changes,
            widths_and_costs_by_hand,
            one_iteration_costs_what_dense_training_does,
            a_budget_is_met_by_one_power_for_all,
            saturation_looks_at_the_epochs_before,
            fresh_weights_forget,
            what_is_never_zero_is_refused,
        ),
    ),
)
