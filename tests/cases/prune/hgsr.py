"""HGSR: the penalties by slow loops, and rises of the loss by running the network whole."""

import copy
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam

from pliant.api import compress
from pliant.budget import Budget
from pliant.data import Data, Train, load
from pliant.edits import Prune
from pliant.errors import DataError
from pliant.families.prune.allocate import Goal
from pliant.families.prune.judge import accuracy
from pliant.families.prune.ranking import Unit, by_group
from pliant.families.prune.scores import importance, weakest
from pliant.families.prune.zeroing import Replay, increases
from pliant.math.hierarchical import Kind, hierarchical
from pliant.methods.prune.hgsr import HGSR
from pliant.run import start
from pliant.surgery.prove import cuttable, edits_of, ignore
from pliant.testing import Case, toys
from tests.cases.prune import REFUSES, TOYS, kept, pair, run_of
from tests.cases.witness import on_many

POWERS = {
    "group_lasso": 1,
    "root_group_lasso": 0.5,
    "squared_group_lasso": 2,
    "exclusive": 2,
    "root_exclusive": 1,
    "squared_exclusive": 4,
    "group_l12": 0.5,
    "root_group_l12": 0.25,
    "squared_group_l12": 1,
}


def entropy(output: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(output, batch[-1])


def by_loops(weight: Tensor, kind: str) -> float:
    """Written out over o, i, u and v; the outer groups are input channels."""
    outputs, inputs, *kernel = weight.shape
    total = 0.0
    for i in range(inputs):
        squares = sums = lasso = exclusive = half = 0.0
        for o in range(outputs):
            r = s = 0.0
            for u in range(kernel[0]):
                for v in range(kernel[1]):
                    r += float(weight[o, i, u, v]) ** 2
                    s += abs(float(weight[o, i, u, v]))
            squares, sums = squares + r, sums + s
            lasso, exclusive, half = lasso + r**0.5, exclusive + s**2, half + s**0.5
        total += {
            "group_lasso": squares**0.5,
            "root_group_lasso": lasso**0.5,
            "squared_group_lasso": lasso**2,
            "exclusive": sums**2,
            "root_exclusive": exclusive**0.5,
            "squared_exclusive": exclusive**2,
            "group_l12": sums**0.5,
            "root_group_l12": half**0.5,
            "squared_group_l12": half**2,
        }[kind]
    return total


def penalties_are_those_of_slow_loops() -> None:
    """With gradients, powers of a factor, and both groupings; finite where all is zero."""
    assert set(get_args(Kind)) == set(POWERS)
    draws = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 3, 2, 2, generator=draws).double()
    for kind in get_args(Kind):
        value = hierarchical(weight, kind)
        assert float(value) == pytest.approx(by_loops(weight, kind), abs=1e-10)
        turned = hierarchical(weight.transpose(0, 1), kind, "neuron")
        assert torch.allclose(turned, value, atol=1e-12)
        assert float(hierarchical(3 * weight, kind) / value) == pytest.approx(3 ** POWERS[kind])
        assert torch.autograd.gradcheck(
            lambda w, kind=kind: hierarchical(w, kind), weight.clone().requires_grad_()
        )
        dead = weight.clone()
        dead[1], dead[:, 2] = 0, 0
        dead.requires_grad_()
        (slope,) = torch.autograd.grad(hierarchical(dead, kind), dead)
        assert slope.isfinite().all() and not slope[1, 2].any()
        assert hierarchical(torch.zeros(2, 2, 1, 1), kind) == 0


class InPlace(nn.Module):
    """One rectifier called three times, and a sum that is made in place."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.three, self.four = nn.Conv2d(4, 5, 3, padding=1), nn.Conv2d(5, 4, 3, padding=1)
        self.relu, self.head = nn.ReLU(inplace=True), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.one(x))
        y = self.two(x)
        y += x
        z = y + self.four(self.relu(self.three(y)))
        out: Tensor = self.head(self.relu(z).mean((2, 3)))
        return out


def rises_are_those_of_whole_passes() -> None:
    """Where nothing is cached, in sums and behind depthwise layers, and with units gone before."""
    (images,), labels = toys.TOYS["plain"].inputs(6), torch.arange(6) % 4
    torch.manual_seed(0)
    kinds = [toys.TOYS[name].model() for name in ("plain", "residual", "grouped", "bare")]
    for model in (*kinds, InPlace(), repeated()):
        with torch.no_grad():
            model.train()(images)  # batch norms with statistics
        model.eval()
        groups, _ = cuttable(model, (images[:1],))
        gone = [Unit(0.0, groups[0].name, 1)]
        batches = [((images[:4],), labels[:4]), ((images[4:],), labels[4:])]
        found = increases(model, groups, batches, entropy, gone)

        def loss(units: list[Unit], model: nn.Module = model, at: Any = groups) -> float:
            other = copy.deepcopy(model)
            ignore(other, edits_of(other, at, by_group(units)))
            with torch.no_grad():
                return float(F.cross_entropy(other(images), labels))  # noqa: B023

        for group in groups:
            for unit in range(len(group.units)):
                extra = [*gone, Unit(0.0, group.name, unit)]
                wanted = loss(extra) - loss(gone) if extra[1] != gone[0] else 0.0
                assert float(found[group.name][unit]) == pytest.approx(wanted, abs=1e-6)


def blocks_that_are_over_are_not_entered() -> None:
    """The plan is that of whole passes, to the last bit of the rises, with fewer calls."""

    def block() -> nn.Module:
        return nn.Sequential(nn.Conv2d(4, 6, 1), nn.ReLU(True), nn.Conv2d(6, 4, 1), nn.Tanh())

    torch.manual_seed(0)
    model = nn.Sequential(block(), block(), block(), nn.AvgPool2d(4), nn.Flatten())
    images, calls = torch.randn(4, 4, 4, 4), [0]
    for part in model[:3].modules():
        part.register_forward_hook(lambda *args: calls.append(calls.pop() + 1))
    groups = cuttable(model, (images,))[0]

    def seen() -> tuple[dict[str, Tensor], int]:
        calls[:] = [0]
        return increases(model, groups, [((images,), torch.arange(4) % 4)], entropy), calls[0]

    rises, few = seen()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Replay, "again", lambda self, example, layers: self.run(example))
        wanted, all_of_them = seen()
    assert wanted and all(torch.equal(rises[name], wanted[name]) for name in wanted)
    assert few < 0.8 * all_of_them


def repeated() -> nn.Module:
    """One layer is called twice, and what stands between reads what the first call gave."""
    twice = nn.Conv2d(4, 4, 1)
    convs = nn.Conv2d(3, 4, 1), nn.ReLU(), twice, nn.Conv2d(4, 4, 1), nn.ReLU(), twice
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))


def a_dead_channel_is_worth_nothing() -> None:
    toy = toys.TOYS["plain"]
    model = toy.model()
    with torch.no_grad():
        for tensor in (model[0].weight, model[1].weight, model[1].bias):  # type: ignore[index]
            tensor[3] = 0
    groups, _ = cuttable(model, toy.inputs(1))
    batches = [(toy.inputs(8), torch.arange(8) % 4)]
    rises = increases(model, groups, batches, entropy)["0"]
    assert abs(float(rises[3])) < 1e-7 < float(rises.abs().median())
    assert not any("forward" in vars(module) for module in model.modules())


def convnet(seed: int, data: Data, method: Callable[[nn.Module], Tensor] | None) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 24, 3, bias=False), nn.BatchNorm2d(24), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(96, 10)),
    )
    optimizer = Adam(model.parameters(), 3e-3)
    for epoch in range(5):
        for images, labels in data.batches("train", 64, seed=seed, epoch=epoch, shuffle=True):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            (loss if method is None else loss + method(model)).backward()
            optimizer.step()
    return model.eval()


def zeroing_loses_less_than_small_norms() -> None:
    """Of one regularized network on digits, half of all channels; mean of three seeds."""
    data, ours, norms = load("digits"), 0.0, 0.0

    def penalty(model: nn.Module) -> Tensor:
        convs = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
        return 1e-4 * sum(
            (hierarchical(w, "squared_group_l12") + w.abs().sum() for w in convs), torch.zeros(())
        )

    for seed in range(3):
        model = convnet(seed, data, penalty)
        method = HGSR(passes=4, start=1.0)
        run = start(model, method, data=data, steps=1)
        groups = method.groups(run)
        run.state["floors"] = {group.name: 1 for group in groups}
        leaving = method.allocation(run, groups, Goal(0.5))
        small = {}
        for group in groups:
            count = len(leaving.get(group.name, ()))
            small[group.name] = weakest(importance(model, group, order=1), count).tolist()
        for place, units in enumerate((leaving, small)):
            other = copy.deepcopy(model)
            ignore(other, edits_of(other, groups, units))
            share = accuracy(other, data.batches("val", 256)) or 0.0
            ours, norms = (ours + share, norms) if place == 0 else (ours, norms + share)
    assert ours > norms + 0.3, (ours / 3, norms / 3)


def the_penalty_begins_at_its_strength_and_ends_with_the_cut() -> None:
    toy = toys.TOYS["plain"]
    model = toy.model()
    optimizer = SGD(model.parameters(), 0.01)
    method = HGSR(strength=0.25, start=0.5, mix=0.75)
    run = start(model, method, data=toy.data(), optimizer=optimizer, steps=4)
    penalty = method.penalty(run)
    assert penalty is not None and penalty.item() == pytest.approx(0.25)
    convs = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    both = [0.75 * hierarchical(w, "squared_group_l12") + 0.25 * w.abs().sum() for w in convs]
    assert penalty.item() == pytest.approx(run.state["lambda"] * sum(both, torch.zeros(())).item())
    for _ in range(2):
        optimizer.zero_grad()
        run.before_step()
        assert not run.edits and convs[0].grad is not None
        optimizer.step()
        run.after_step()
    assert run.edits and method.penalty(run) is None


def a_shortcut_is_not_penalized() -> None:
    toy = toys.TOYS["residual"]
    run = start(toy.model(), HGSR(), data=toy.data(), steps=4)
    assert run.state["layers"] == ["stem", "branch.0", "branch.3"]


def what_the_loss_misses_stays() -> None:
    """Of five units two are read; without a rise allowed, only those that do nothing leave."""
    torch.manual_seed(0)
    model = pair(1.0, 2.0, 3.0, 4.0, 5.0)
    with torch.no_grad():
        model.get_parameter("2.weight")[:, [1, 2, 4]] = 0
    data = Data((torch.randn(16, 2), torch.arange(16) % 2), classes=2)
    run = start(model, HGSR(ratio=0.9, most=0.0, least=0.0, passes=1), data=data)
    left = kept(run)["0", "out"]
    assert {0, 3} & {*left} and not {1, 2, 4} & {*left}


def a_training_keeps_what_its_labels_need() -> None:
    """Labels that only one of two halves of the channels can tell; the other half is louder."""
    torch.manual_seed(0)
    images = torch.randn(256, 2)
    data = Data((images, (images[:, 0] > 0).long()), (images, (images[:, 0] > 0).long()), classes=2)
    first, last = nn.Linear(2, 8, bias=False), nn.Linear(8, 2)
    with torch.no_grad():
        first.weight.zero_()
        first.weight[:4, 0] = torch.tensor([1.0, -1.0, 1.0, -1.0])  # they tell the classes
        first.weight[4:, 1] = 9.0
        last.weight.zero_()
        last.weight[0, [1, 3]], last.weight[1, [0, 2]] = 1.0, 1.0
        last.weight[:, 4:] = 0.1  # the same for both
        last.bias.zero_()
    model = nn.Sequential(first, nn.ReLU(), last)
    spec = "hgsr(ratio=0.5, least=0, start=0.5, strength=0.0)"
    result = compress(model, data, spec, train=Train(epochs=2, batch=64, lr=1e-3))
    (cut,) = [e for e in result.edits if isinstance(e, Prune) and e.layer == "0"]
    assert set(cut.keep) <= {0, 1, 2, 3} and result.report.after.accuracy == 1


def labels_are_needed() -> None:
    with pytest.raises(DataError, match="labelled training samples"):
        run_of(pair(1.0, 2.0), HGSR())


CASES = (
    Case(
        "hgsr",
        toys=TOYS,
        refuses=REFUSES,
        variants=(
            'hgsr(penalize="root_group_lasso", grouping="neuron", rounds=2, start=0.2)',
            "hgsr(most=0.01, passes=1)",
        ),
        witnesses={
            "samples": on_many("hgsr", "samples", Budget(macs=0.7)),
        },
        own=(
            penalties_are_those_of_slow_loops,
            rises_are_those_of_whole_passes,
            blocks_that_are_over_are_not_entered,
            a_dead_channel_is_worth_nothing,
            zeroing_loses_less_than_small_norms,
            the_penalty_begins_at_its_strength_and_ends_with_the_cut,
            a_shortcut_is_not_penalized,
            what_the_loss_misses_stays,
            a_training_keeps_what_its_labels_need,
            labels_are_needed,
        ),
    ),
)
