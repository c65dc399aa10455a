"""PGP: how far filters move, how many leave, and what becomes of them and the optimizer."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from pliant.budget import Budget
from pliant.edits import Prune
from pliant.errors import BudgetError
from pliant.families.prune.progress import (
    add_gradients,
    calm,
    merged,
    moved,
    remaining,
    reset,
    weak,
)
from pliant.methods.prune.pgp import PGP
from pliant.run import Run, start
from pliant.surgery.prove import cuttable, silence
from pliant.testing import Case
from tests.cases.prune import REFUSES, TOYS, kept, pair, run_of

LR = 0.05


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
    )


def lifted() -> nn.Sequential:
    """The network with biases of norms above zero."""
    model = network()
    with torch.no_grad():
        model.get_parameter("1.bias").fill_(0.3)
    return model


def loss_of(model: nn.Module, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    images, labels = torch.randn(16, 3, 6, 6, generator=g), torch.arange(16) % 4
    return nn.functional.cross_entropy(model(images), labels)


def step(run: Run, seed: int = 0) -> None:
    assert run.optimizer is not None
    run.optimizer.zero_grad()
    loss_of(run.model, seed).backward()
    run.before_step()
    run.optimizer.step()
    run.after_step()


def begun(method: PGP, steps: int, budget: Budget | None = None, **options: Any) -> Run:
    model = network()
    optimizer = SGD(model.parameters(), LR, **options)
    example = (torch.zeros(2, 3, 6, 6),)
    return start(model, method, budget, example=example, optimizer=optimizer, steps=steps)


# ---------------------------------------------------------------- the criterion


def a_sum_is_how_far_a_filter_moves() -> None:
    """One step of plain SGD moves it by the rate times the l1 norm of its gradient."""
    run = begun(PGP(rounds=1), 100)
    before = run.model.get_parameter("0.weight").detach().clone()
    step(run)
    gone = (run.model.get_parameter("0.weight") - before).detach().abs().flatten(1).sum(1)
    found = PGP(rounds=1).scores(run, [g for g in PGP().groups(run) if g.name == "0"])["0"]
    assert torch.allclose(LR * found, gone.double(), atol=1e-6)


def the_norm_of_a_sum_is_the_way_made_good() -> None:
    method = PGP(rounds=1, criterion="net")
    run = begun(method, 100)
    before = run.model.get_parameter("0.weight").detach().clone()
    for number in range(5):
        step(run, number)
    net = (run.model.get_parameter("0.weight") - before).detach().flatten(1)
    groups = [g for g in method.groups(run) if g.name == "0"]
    assert torch.allclose(
        LR * method.scores(run, groups)["0"], net.abs().sum(1).double(), atol=1e-6
    )
    sums = run.state["sums"]
    assert torch.allclose(
        LR * moved(sums, run.state["rows"]["0"], "sum"),  # type: ignore[operator, arg-type]
        net.sum(1).abs().double(),
        atol=1e-6,
    )


def sums_begin_anew_after_a_cut() -> None:
    method = PGP(rounds=2, end=1.0)
    run = begun(method, 4)
    step(run)
    step(run)
    assert run.state["rounds"] == 1 and not run.state["sums"]
    step(run)
    step(run)
    assert run.state["rounds"] == 2 and not run.state["sums"] and not run.state["rows"]


def gradients_that_are_not_finite_do_not_count() -> None:
    model, sums = network(), dict[str, Tensor]()
    loss_of(model, 0).backward()
    model.get_parameter("0.weight").grad.fill_(math.inf)  # type: ignore[union-attr]
    add_gradients(model, ["0", "3"], sums, "path")
    assert list(sums) == ["3"]


# ---------------------------------------------------------------- how many


def widths_by_hand() -> None:
    """64 filters, half in 10 cuts, half of the weak at once: the last cut takes all weak ones."""
    now, found = 64, []
    for cut in range(1, 11):
        left = remaining(64, 0.5, cut, 10, "exponential")
        assert left == pytest.approx(64 * 0.5 ** (cut / 10))
        count = weak(now, left, 1)
        now -= count if cut == 10 else count // 2
        found.append(now)
    # 64 - 59.7 = 4, 62 - 55.7 = 6, 59 - 51.98 = 7, 56 - 48.5 = 7, 53 - 45.3 = 7, 50 - 42.2 = 7,
    # 47 - 39.4 = 7, 44 - 36.8 = 7, 41 - 34.3 = 6, 38 - 32 = 6
    assert found == [62, 59, 56, 53, 50, 47, 44, 41, 38, 32]
    assert (
        remaining(64, 0.5, 5, 10, "linear") == 48 and weak(5, 0.0, 2) == 3 and weak(5, 9.0, 1) == 0
    )


def a_network_ends_at_the_ratio() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 3))
    optimizer = SGD(model.parameters(), 0.01)
    example = (torch.randn(8, 4),)
    method = PGP(rounds=10, end=1.0)
    run = start(model, method, example=example, optimizer=optimizer, steps=20)
    widths = []
    for _ in range(20):
        optimizer.zero_grad()
        run.model(*example).square().sum().backward()
        run.before_step()
        optimizer.step()
        run.after_step()
        widths.append(run.model.get_parameter("0.weight").shape[0])
    assert widths[1::2] == [62, 59, 56, 53, 50, 47, 44, 41, 38, 32]
    assert len([edit for edit in run.edits if isinstance(edit, Prune)]) == 2  # however many cuts


def a_budget_is_met() -> None:
    run = begun(PGP(rounds=3), 6, Budget(macs=0.4))
    for number in range(6):
        step(run, number)
    assert run.finish().macs <= 0.4 * run.cost.macs
    with pytest.raises(BudgetError, match="the least reachable is"):
        begun(PGP(), 6, Budget(macs=0.001))


def the_weakest_leave() -> None:
    run = begun(PGP(rounds=1, end=1.0), 2)
    step(run)
    sums = {name: values.clone() for name, values in run.state["sums"].items()}
    whole = copy.deepcopy(run.model)
    optimizer = SGD(whole.parameters(), LR)
    loss_of(whole, 1).backward()
    for name in sums:
        gradient = whole.get_parameter(f"{name}.weight").grad
        sums[name] += gradient.flatten(1).abs().sum(1)  # type: ignore[union-attr]
    optimizer.step()
    step(run, 1)
    for name in ("0", "3"):
        strongest = sums[name].argsort(descending=True)[:4].sort().values.tolist()
        assert kept(run)[name, "out"] == tuple(strongest)


# ---------------------------------------------------------------- surgery


def cut_in_two(hard: float = 1.0, **options: Any) -> tuple[Run, nn.Module, SGD]:
    """A run right after its first cut of two, and network and optimizer as they were before."""
    run = begun(PGP(rounds=2, end=1.0, hard=hard), 4, momentum=0.9, weight_decay=0.01, **options)
    assert run.optimizer is not None
    step(run)
    run.optimizer.zero_grad()
    loss_of(run.model, 1).backward()
    run.before_step()
    run.optimizer.step()
    whole = copy.deepcopy(run.model)
    other = SGD(whole.parameters(), LR, momentum=0.9, weight_decay=0.01)
    other.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    run.after_step()
    assert run.state["rounds"] == 1 and run.edits
    return run, whole, other


def a_cut_network_is_the_whole_one_with_filters_silent() -> None:
    run, whole, _ = cut_in_two()
    silence(whole, [edit for edit in run.edits if isinstance(edit, Prune)])
    images = torch.randn(5, 3, 6, 6)
    with torch.no_grad():
        assert torch.allclose(run.model.eval()(images), whole.eval()(images), atol=1e-5)


def the_next_step_is_that_of_the_whole_network() -> None:
    """Momentum and decay follow: what is left moves as it would with the others masked."""
    run, whole, other = cut_in_two()
    edits = [edit for edit in run.edits if isinstance(edit, Prune)]
    silence(whole, edits)
    fresh = copy.deepcopy(run.model)
    forgetful = SGD(fresh.parameters(), LR, momentum=0.9, weight_decay=0.01)
    for model, optimizer in ((whole, other), (run.model, run.optimizer), (fresh, forgetful)):
        optimizer.zero_grad()  # type: ignore[union-attr]
        loss_of(model.train(), 2).backward()  # type: ignore[union-attr]
        optimizer.step()  # type: ignore[union-attr]
    for edit in edits:
        edit.apply(whole)
    for name, tensor in run.model.named_parameters():
        assert torch.allclose(tensor, whole.get_parameter(name), atol=1e-6), name
    weights = (fresh.get_parameter("3.weight"), whole.get_parameter("3.weight"))
    assert not torch.allclose(*weights, atol=1e-4)  # an optimizer made anew goes elsewhere
    assert not any(
        state["momentum_buffer"].shape != parameter.shape
        for parameter, state in run.optimizer.state.items()  # type: ignore[union-attr]
    )


def weak_filters_that_stay_are_zero_and_forgotten() -> None:
    run, _, _ = cut_in_two(hard=0.5)
    assert run.optimizer is not None
    fresh = run.state["fresh"]
    assert any(fresh.values())
    for name, units in fresh.items():
        weight = run.model.get_parameter(f"{name}.weight")
        zero = [i for i, row in enumerate(weight.detach().flatten(1)) if not row.any()]
        assert zero == sorted(units)
        momentum = run.optimizer.state[weight]["momentum_buffer"].flatten(1)
        assert not momentum[units].any() and momentum.any(1).sum() == len(weight) - len(units)


def zeroed_norms_never_recover_and_others_do() -> None:
    """Others do where the bias of the norm is above zero, so that a rectifier lets gradients by."""
    for norms in (True, False):
        model = lifted()
        optimizer = SGD(model.parameters(), LR, momentum=0.9)
        groups, _ = cuttable(model, (torch.zeros(1, 3, 6, 6),))
        group = next(g for g in groups if g.name == "0")
        reset(model, [optimizer], group, [1, 4], norms=norms)
        for number in range(50):
            optimizer.zero_grad()
            loss_of(model, number).backward()
            calm(model, {"0": {"0": group.rows(("0", "out"))}}, {"0": [1, 4]} if not number else {})
            optimizer.step()
        rows = model.get_parameter("0.weight").detach().flatten(1)
        assert bool(rows[[1, 4]].any()) is not norms and rows.isfinite().all()
        if norms:
            assert not model[1].running_var[[1, 4]].any()  # type: ignore[index, union-attr]


def first_gradients_of_zeroed_filters_are_shortened() -> None:
    """Behind a norm they are hundreds of times as long; afterwards as long as the median."""
    model = lifted()
    groups, _ = cuttable(model, (torch.zeros(1, 3, 6, 6),))
    group = next(g for g in groups if g.name == "0")
    reset(model, [], group, [2], norms=False)
    loss_of(model, 0).backward()
    gradient = model.get_parameter("0.weight").grad
    assert gradient is not None
    gradient[5] *= 1e-3  # a short one is not made longer
    before = gradient.clone().flatten(1).norm(dim=1)
    calm(model, {"0": {"0": group.rows(("0", "out"))}}, {"0": [2, 5]})
    after = gradient.flatten(1).norm(dim=1)
    assert after[5] == before[5]
    others = [0, 1, 3, 4, 6, 7]
    assert float(before[2]) > 10 * float(before[others].median())
    assert torch.equal(after[others], before[others])
    assert float(after[2]) == pytest.approx(float(before[others].median()))


def untrained_networks_lose_small_filters() -> None:
    run = run_of(pair(3.0, 1.0, 2.0, 4.0), PGP())
    assert kept(run)["0", "out"] == (0, 3)


def cuts_that_follow_one_another_are_one() -> None:
    model = nn.Sequential(nn.Linear(2, 5), nn.Linear(5, 3))
    cuts = [Prune("1", "in", (0, 2, 3, 4), 5), Prune("0", "out", (0, 2, 3, 4), 5)]
    cuts += [Prune("1", "in", (1, 3), 4), Prune("0", "out", (1, 3), 4)]
    once = copy.deepcopy(model)
    for edit in cuts:
        edit.apply(model)
    for edit in (short := merged(cuts)):
        edit.apply(once)
    assert len(short) == 2 and short[0].keep == (2, 4)  # type: ignore[attr-defined]
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), once.parameters(), strict=True)
    )


CASES = (
    Case(
        "pgp",
        spec="pgp(rounds=2)",
        toys=TOYS,
        refuses=REFUSES,
        variants=(
            'pgp(rounds=3, course="linear", criterion="net", reset_norms=True)',
            'pgp(hard=0.0, criterion="sum", rounds=2, ratio=0.9)',
        ),
        own=(
            a_sum_is_how_far_a_filter_moves,
            the_norm_of_a_sum_is_the_way_made_good,
            sums_begin_anew_after_a_cut,
            gradients_that_are_not_finite_do_not_count,
            widths_by_hand,
            a_network_ends_at_the_ratio,
            a_budget_is_met,
            the_weakest_leave,
            a_cut_network_is_the_whole_one_with_filters_silent,
            the_next_step_is_that_of_the_whole_network,
            weak_filters_that_stay_are_zero_and_forgotten,
            zeroed_norms_never_recover_and_others_do,
            first_gradients_of_zeroed_filters_are_shortened,
            untrained_networks_lose_small_filters,
            cuts_that_follow_one_another_are_one,
        ),
    ),
)
