"""AIMP: counts of masks by hand and against PyTorch, zeros that stay, and rates that begin anew."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR

from pliant.budget import Budget
from pliant.edits import Encode
from pliant.errors import BudgetError, TrainingError
from pliant.families.prune.rewind import (
    Rates,
    beginnings,
    factor,
    iterations,
    kept_after,
    smallest,
    within_bytes,
)
from pliant.families.prune.sparse import bytes_with
from pliant.methods.prune.aimp import AIMP
from pliant.nn.coded import Coded
from pliant.run import Run, start
from pliant.testing import TOYS as NETWORKS
from pliant.testing import Case
from tests.cases.prune import TOYS
from tests.cases.witness import on

LR = 0.05


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3)),
        *(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 4)),
    )


def begun(method: AIMP, steps: int, budget: Budget | None = None, **options: Any) -> Run:
    model = network()
    optimizer = SGD(model.parameters(), LR, **options)
    example = (torch.zeros(2, 3, 6, 6),)
    return start(model, method, budget, example=example, optimizer=optimizer, steps=steps)


def step(run: Run, seed: int = 0) -> None:
    assert run.optimizer is not None
    g = torch.Generator().manual_seed(seed)
    run.optimizer.zero_grad()
    images, labels = torch.randn(16, 3, 6, 6, generator=g), torch.arange(16) % 4
    nn.functional.cross_entropy(run.model(images), labels).backward()
    run.before_step()
    run.optimizer.step()
    run.after_step()


def left(run: Run) -> int:
    return sum(int(mask.sum()) for mask in run.state["masks"].values())


def counts_are_those_of_the_recursion() -> None:
    """1,001 weights by fifths: 200 go, then 160, 128, 102, ... and the last stops at a tenth."""
    assert [kept_after(1001, n, 0.9, 0.2) for n in range(5)] == [1001, 801, 641, 513, 411]
    assert iterations(0.9, 0.2) == 11 == math.ceil(math.log(0.1) / math.log(0.8))
    assert kept_after(1001, 11, 0.9, 0.2) == 101 and kept_after(1001, 10, 0.9, 0.2) > 101


def masks_are_those_of_pytorch() -> None:
    """Of global pruning by l1 with the same whole numbers, again and again; and they are nested."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    other = copy.deepcopy(model)
    weights = {name: model.get_parameter(f"{name}.weight") for name in ("0", "1")}
    masks: dict[str, Tensor] = {n: torch.ones_like(w, dtype=torch.bool) for n, w in weights.items()}
    total = sum(w.numel() for w in weights.values())
    for number in range(1, 6):
        before, kept = masks, kept_after(total, number, 0.99, 0.3)
        amount = kept_after(total, number - 1, 0.99, 0.3) - kept
        masks = smallest(weights, masks, kept)
        targets = [(other[0], "weight"), (other[1], "weight")]
        prune.global_unstructured(targets, prune.L1Unstructured, amount=amount)
        for name, mask in masks.items():
            assert torch.equal(mask, other.get_submodule(name).weight_mask.bool())  # type: ignore[union-attr, operator]
            assert not (mask & ~before[name]).any()
        assert sum(int(mask.sum()) for mask in masks.values()) == kept


def equal_magnitudes_go_in_their_order() -> None:
    weights = {"a": torch.tensor([1.0, -1.0, 1.0]), "b": torch.tensor([1.0, 2.0])}
    masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}
    found = smallest(weights, masks, 3)
    assert [mask.tolist() for mask in found.values()] == [[False, False, True], [True, True]]
    zeros = {name: torch.zeros_like(w) for name, w in weights.items()}
    again = smallest(zeros, found, 2)  # what went before does not stand in for what is to go
    assert [mask.tolist() for mask in again.values()] == [[False, False, False], [True, True]]


def zeros_stay_zeros() -> None:
    """With momentum from elsewhere, weight decay, and a last training of many steps."""
    run = begun(AIMP(sparsity=0.6, rate=0.4), 30, momentum=0.9, weight_decay=0.1)
    assert run.optimizer is not None
    for number in range(30):
        for state in run.optimizer.state.values() if number == 20 else ():
            state["momentum_buffer"].fill_(0.1)
        step(run, number)
        for name, mask in run.state["masks"].items():
            assert not run.model.get_parameter(f"{name}.weight")[~mask].any()
    weights = [run.model.get_parameter(f"{name}.weight") for name in run.state["masks"]]
    total = sum(w.numel() for w in weights)
    assert sum(int((w != 0).sum()) for w in weights) == left(run) == math.ceil(0.4 * total)
    assert list(run.state["masks"]) == ["0", "3"]  # convolutions, not the last layer


def short_trainings_take_as_many_steps_as_they_should() -> None:
    """Ten prunings with 4 epochs each but 10 for the last: 46 where full ones take 100."""
    starts = beginnings(10, 0.4, dense=False)
    ends = [*starts[1:], 1.0]
    lengths = [round(46 * (b - a)) for a, b in zip(starts, ends, strict=True)]
    assert lengths == [4] * 9 + [10]
    assert beginnings(10, 1.0, dense=False)[1] == pytest.approx(10 / 100)
    assert beginnings(2, 0.5, dense=True) == pytest.approx([1 / 2.5, 1.5 / 2.5])
    run = begun(AIMP(sparsity=1 - 0.8**10, rate=0.2), 46)
    done = []
    for number in range(46):
        done.append(run.state["done"])
        step(run, number)
    assert [done.index(number) for number in range(1, 11)] == [4 * number for number in range(10)]


def rates_begin_anew() -> None:
    starts = [0.25, 0.5]  # dense, one short, the last
    cosine = [factor(s, starts, "cosine", 0.5, cut_off=False) for s in (0, 0.125, 0.25, 0.375, 0.5)]
    assert cosine == pytest.approx([1, 0.5, 1, 0.5, 1])
    assert factor(0.75, starts, "cosine", 0.5, cut_off=True) == pytest.approx(0.5)
    assert factor(0.375, starts, "cosine", 0.5, cut_off=True) == pytest.approx(
        (1 + math.cos(math.pi / 4)) / 2
    )
    steps = [factor(s, starts, "step", 0.5, cut_off=False) for s in (0.5, 0.75, 0.875)]
    assert steps == pytest.approx([1, 0.1, 0.01])
    assert factor(0.9, starts, "none", 0.5, cut_off=False) == 1


def rates_change_during_steps_only() -> None:
    """A step is made at a part of the rate; a scheduler sees the whole one, and goes on."""
    weight = nn.Parameter(torch.ones(1))
    optimizer = SGD([weight], 1.0)
    scheduler = StepLR(optimizer, 1, 0.5)
    rates = Rates()
    rates.attach([optimizer])
    rates.attach([optimizer])  # twice is once
    rates.factor = 0.25
    for lr in (1.0, 0.5):
        before = weight.item()
        weight.grad = torch.ones(1)
        optimizer.step()
        assert before - weight.item() == pytest.approx(0.25 * lr)
        assert optimizer.param_groups[0]["lr"] == lr
        scheduler.step()
    rates.remove()
    before = weight.item()
    optimizer.step()
    assert before - weight.item() == pytest.approx(0.25)


def momentum_is_forgotten_and_weights_may_begin_anew() -> None:
    for rewind in ("rate", "weights"):
        method = AIMP(sparsity=0.5, rate=0.3, rewind=rewind, short=0.5)  # type: ignore[arg-type]
        run = begun(method, 4, momentum=0.9)
        assert run.optimizer is not None and run.state["done"] == 1
        first = network().state_dict()
        step(run)  # the second pruning is after a third of the training, rounded to one step
        now = run.model.get_parameter("3.weight")
        mask = run.state["masks"]["3"]
        assert run.state["done"] == 2
        assert not run.optimizer.state
        assert torch.equal(now, first["3.weight"] * mask) is (rewind == "weights")


def a_budget_sets_the_sparsity() -> None:
    run = begun(AIMP(), 0, Budget(bytes=0.5))
    after = run.finish()
    assert 0.47 * run.cost.bytes < after.bytes <= 0.5 * run.cost.bytes
    assert after.macs == run.cost.macs and after.params == run.cost.params  # no speed is sold
    assert all(isinstance(edit, Encode) and edit.form == "mask" for edit in run.edits)
    assert isinstance(run.model[3], Coded)  # type: ignore[index]
    with pytest.raises(BudgetError, match="the least reachable is"):
        begun(AIMP(), 0, Budget(bytes=0.05))


def the_last_pruning_goes_as_far_as_the_budget() -> None:
    """Whatever was planned: with one weight more the network would be too large."""
    run = begun(AIMP(), 1, Budget(bytes=0.5))
    masks = {name: torch.ones_like(mask) for name, mask in run.state["masks"].items()}
    run.state["masks"] = masks
    weights = {name: run.model.get_parameter(f"{name}.weight") for name in masks}
    total = sum(mask.numel() for mask in masks.values())
    kept = within_bytes(run, weights, run.state["masks"], total)  # type: ignore[arg-type]
    sizes = []
    for count in (kept, kept + 1):
        found = smallest(weights, masks, count)
        sizes.append(bytes_with(run, {name: int(mask.sum()) for name, mask in found.items()}))
    assert sizes[0] <= run.limits()["bytes"] < sizes[1]


def what_is_stored_computes_the_same() -> None:
    run = begun(AIMP(sparsity=0.8), 0)
    masks = run.state["masks"]
    whole = network().eval()
    weights = {name: whole.get_parameter(f"{name}.weight") for name in masks}
    total = sum(w.numel() for w in weights.values())
    kept = smallest(weights, masks, math.ceil(0.2 * total - 1e-9))
    with torch.no_grad():
        for name, mask in kept.items():
            weights[name].mul_(mask)
    images = torch.randn(5, 3, 6, 6)
    run.finish()
    with torch.no_grad():
        assert torch.allclose(run.model.eval()(images), whole(images), atol=1e-5)


def weights_that_are_not_finite_are_refused() -> None:
    run = begun(AIMP(sparsity=0.5, rate=0.3), 10)
    with torch.no_grad():
        run.model.get_parameter("3.weight")[0] = math.nan
    run.step = 9
    with pytest.raises(TrainingError, match="lower the learning rate"):
        run.method.after_step(run)


CASES = (
    Case(
        "aimp",
        spec="aimp(sparsity=0.6)",
        budget=Budget(bytes=0.97),
        toys=(*TOYS, "shared", "single"),
        variants=(
            'aimp(sparsity=0.7, rewind="weights", annealing="step", dense=True, linear=True)',
            'aimp(rate=0.5, annealing="none", cut_off=True)',
        ),
        witnesses={
            "linear": on(NETWORKS["bare"], "aimp", "linear"),
        },
        own=(
            counts_are_those_of_the_recursion,
            masks_are_those_of_pytorch,
            equal_magnitudes_go_in_their_order,
            zeros_stay_zeros,
            short_trainings_take_as_many_steps_as_they_should,
            rates_begin_anew,
            rates_change_during_steps_only,
            momentum_is_forgotten_and_weights_may_begin_anew,
            a_budget_sets_the_sparsity,
            the_last_pruning_goes_as_far_as_the_budget,
            what_is_stored_computes_the_same,
            weights_that_are_not_finite_are_refused,
        ),
    ),
)
