"""The engine of channel pruning: scores, schedule, allocation, and cuts while a network trains."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from pliant.budget import Budget
from pliant.cost import cost
from pliant.edits import Prune, replay
from pliant.errors import BudgetError, MethodError
from pliant.families.prune import channels
from pliant.families.prune.allocate import Goal, allocate, by_ratios, check_reachable
from pliant.families.prune.pruner import ChannelPruning
from pliant.families.prune.ranking import by_group, floors_of, ranking
from pliant.families.prune.schedule import MOST_ROUNDS, Schedule
from pliant.families.prune.scores import Groups, Scores, batchnorms, importance, scaled
from pliant.run import Run, start
from pliant.surgery.prove import Leaving, cuttable, edits_of
from pliant.testing.toys import TOYS

IMAGES = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % 4


@dataclass(frozen=True)
class First(ChannelPruning):
    """The channels of the lowest number are the least important."""

    def scores(self, run: Run, groups: Groups) -> Scores:
        return {group.name: torch.arange(len(group.units)).double() for group in groups}


def begun(method: ChannelPruning, steps: int = 0, optimizer: Any = None, **more: Any) -> Run:
    """A run on the plain toy; its groups are 8, 12, 12 and 16 channels in a row."""
    model = TOYS["plain"].model()
    made: Optimizer | None = optimizer(model.parameters()) if optimizer else None
    return start(model, method, example=(IMAGES[:1],), steps=steps, optimizer=made, **more)


def left(run: Run) -> list[int]:
    return [run.model.get_submodule(name).weight.shape[0] for name in ("0", "3", "7", "9")]  # type: ignore[union-attr, operator]


# ---------------------------------------------------------------- scores


def test_importance_is_the_mean_over_all_weights_of_a_unit() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, -4.0], [0.0, 1.0]]))
        model[1].weight.copy_(torch.tensor([-0.5, 2.0]))
    (group,), _ = cuttable(model, (torch.zeros(2, 2),))
    for order, values in ((1, [3.5, 0.5]), (2, [12.5**0.5, 0.5**0.5])):
        assert importance(model, group, order=order).tolist() == pytest.approx(values)
    assert importance(model, group, of="batchnorm", order=1).tolist() == [0.5, 2.0]


def test_scales_of_all_batch_norms_that_channels_pass_count_alike() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.head = nn.Linear(2, 3), nn.Linear(2, 3), nn.Linear(3, 2)
            self.first, self.second = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
            self.plain = nn.BatchNorm1d(3, affine=False)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.plain(self.first(self.one(x)) + self.second(self.two(x))))
            return out

    model = Twice()
    with torch.no_grad():
        model.first.weight.copy_(torch.tensor([1.0, 2.0, -3.0]))
        model.second.weight.copy_(torch.tensor([5.0, 0.0, 1.0]))
    (group,), _ = cuttable(model, (torch.zeros(2, 2),))
    assert importance(model, group, of="batchnorm", order=1).tolist() == [3.0, 1.0, 2.0]
    assert batchnorms(model) == [model.first, model.second]


def test_groups_without_scales_stay_and_say_why() -> None:
    run = begun(First(ratio=0.0))
    assert [g.name for g in scaled(run, First().groups(run))] == ["0", "3"]
    assert run.reasons["9"] == "no batch norm scales its channels"


# ---------------------------------------------------------------- schedule


@given(
    rounds=st.integers(1, MOST_ROUNDS),
    start=st.floats(0, 1),
    end=st.floats(0, 1),
    steps=st.integers(1, 200),
)
def test_cuts_come_in_order_and_between_start_and_end(
    rounds: int, start: float, end: float, steps: int
) -> None:
    schedule = Schedule(rounds, start, end)
    due = [schedule.due(step, steps) for step in range(steps + 1)]
    assert due == sorted(due) and set(due) <= set(range(rounds + 1))
    first = round(start * steps)
    if start == 1:
        assert due[-1] == 0  # it is left to the end of the run
    else:
        assert not any(due[:first]) and due[first] >= 1
        assert all(count == rounds for step, count in enumerate(due) if step >= first > end * steps)


@given(rounds=st.integers(1, MOST_ROUNDS), whole=st.floats(0, 0.99), data=st.data())
def test_rounds_of_any_width_lead_to_the_whole(rounds: int, whole: float, data: Any) -> None:
    schedule, done, rest, way = Schedule(rounds), 0, 1.0, 1.0
    while done < rounds:
        then = data.draw(st.integers(done + 1, rounds))
        rest *= 1 - schedule.ratio(whole, done, then)
        way *= 1 - schedule.part(done, then)
        done = then
    assert rest == pytest.approx(1 - whole) and way == 0


@pytest.mark.parametrize("bad", [{"rounds": 0}, {"rounds": 9}, {"start": -0.1}, {"end": 1.1}])
@pytest.mark.parametrize("train", [0, 8])
def test_schedules_out_of_range_are_refused(bad: dict[str, Any], train: int) -> None:
    with pytest.raises(MethodError, match=next(iter(bad))):
        begun(First(**bad), steps=train)


@pytest.mark.parametrize("bad", [{"ratio": 1.0}, {"ratio": -0.1}, {"least": 1.5}])
def test_shares_out_of_range_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(MethodError, match=next(iter(bad))):
        begun(First(**bad))


def test_each_round_is_made_when_it_is_due() -> None:
    """Of twelve channels two leave in each of three rounds: at 20, 40 and 60 % of the steps."""
    method = First(ratio=0.5, scope="local", rounds=3, start=0.2, end=0.8, least=0.0)
    run, sizes = begun(method, steps=10), []
    for _ in range(10):
        run.after_step()
        sizes.append(left(run)[1])
    assert sizes == [12, 10, 10, 8, 8, 6, 6, 6, 6, 6] and not method.pending(run)
    edits = list(run.edits)
    run.finish()
    assert run.edits == edits


def test_what_was_not_reached_is_made_up_for_at_the_end() -> None:
    run = begun(First(ratio=0.5, scope="local", rounds=2, start=0.2, end=0.8, least=0.0), steps=10)
    for _ in range(2):
        run.after_step()
    assert left(run) == [6, 9, 9, 12]
    run.finish(strict=False)  # ended early on purpose
    assert left(run) == [4, 6, 6, 8]


@pytest.mark.parametrize("steps", [0, 4])
def test_a_start_of_one_waits_for_the_end_of_the_run(steps: int) -> None:
    run = begun(First(ratio=0.5, start=1.0), steps=steps)
    for _ in range(steps):
        run.after_step()
    assert not run.edits and run.method.pending(run)  # type: ignore[attr-defined]
    run.finish()
    assert run.edits


def test_without_training_all_is_cut_at_once() -> None:
    run = begun(First(ratio=0.5, scope="local", rounds=3, least=0.0))
    assert left(run) == [4, 6, 6, 8]
    assert len({(e.layer, e.side) for e in run.edits if isinstance(e, Prune)}) == len(run.edits)


# ---------------------------------------------------------------- allocation


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("axis", ["params", "macs", "bytes"])
def test_a_budget_takes_as_few_units_as_it_needs(axis: str, scope: Any) -> None:
    run = begun(First(ratio=0.0))
    groups, _ = cuttable(run.model, run.example)
    random = torch.Generator().manual_seed(0)
    scores = {g.name: torch.rand(len(g.units), generator=random) for g in groups}
    ranked = ranking(scores, scope, floors_of(groups, 0.2))
    bound = 0.6 * getattr(run.cost, axis)
    leaving = allocate(run, groups, ranked, Goal(0.0, {axis: bound}))
    count = sum(map(len, leaving.values()))
    costs = []
    for taken in (count, count - 1):
        model = copy.deepcopy(run.model)
        replay(model, edits_of(model, groups, by_group(ranked[:taken])))
        costs.append(getattr(cost(model, run.example), axis))
    assert leaving == by_group(ranked[:count]) and costs[0] <= bound < costs[1]


def test_without_a_budget_the_ratio_is_spent_over_all_or_over_each() -> None:
    run = begun(First(ratio=0.0))
    groups, _ = cuttable(run.model, run.example)
    scores = {group.name: torch.full((len(group.units),), 9.0) for group in groups}
    scores["9"][:] = 1.0
    sizes = {}
    for scope in ("global", "local"):
        leaving = allocate(run, groups, ranking(scores, scope), Goal(0.25))  # type: ignore[arg-type]
        sizes[scope] = {name: len(units) for name, units in leaving.items()}
    assert sizes == {"global": {"9": 12}, "local": {"0": 2, "3": 3, "7": 3, "9": 4}}


def test_groups_may_have_ratios_of_their_own() -> None:
    scores = {"a": torch.tensor([3.0, 1.0, 2.0, 4.0]), "b": torch.tensor([1.0, 1.0, 0.0])}
    leaving = by_ratios(scores, {"a": 0.5, "b": 0.99}, least=0.5)
    assert leaving == {"a": [1, 2], "b": [2]}  # of three at least two stay; ties go by number


def test_a_budget_out_of_reach_is_refused_before_training() -> None:
    for method in (First(start=1.0), First(start=0.5, rounds=2)):
        with pytest.raises(BudgetError, match="the least reachable is"):
            begun(method, steps=10, budget=Budget(params=20))
    run = begun(First(ratio=0.0))
    check_reachable(run, First().groups(run), least=0.1)  # no budget, nothing to refuse


# ---------------------------------------------------------------- what a method may say


@dataclass(frozen=True)
class Told(First):
    """Looks at one group, takes three of its units, and doubles what stays."""

    scope: Any = field(default="local", init=False)

    def groups(self, run: Run) -> Groups:
        return [group for group in super().groups(run) if group.name == "3"]

    def allocation(self, run: Run, groups: Groups, goal: Goal) -> Leaving:
        assert goal.ratio == pytest.approx(self.ratio) and run.state["floors"] == {"3": 2}
        return {"3": [1, 5, 7]}

    def adjust(self, run: Run, groups: Groups, leaving: Leaving) -> None:
        assert not run.edits and leaving == {"3": [1, 5, 7]}
        with torch.no_grad():
            run.model.get_submodule("3").weight.mul_(2)  # type: ignore[operator, union-attr]


def test_groups_allocation_and_what_becomes_of_units_are_a_methods_own() -> None:
    dense = TOYS["plain"].model().get_submodule("3").weight.detach()  # type: ignore[union-attr, operator]
    run = begun(Told(ratio=0.3))
    stay = [unit for unit in range(12) if unit not in (1, 5, 7)]
    assert torch.equal(run.model.get_submodule("3").weight, 2 * dense[stay])  # type: ignore[arg-type]
    assert left(run) == [8, 9, 12, 16]


def test_units_of_groups_without_a_score_stay() -> None:
    @dataclass(frozen=True)
    class Some(First):
        def scores(self, run: Run, groups: Groups) -> Scores:
            return {name: s for name, s in super().scores(run, groups).items() if name != "3"}

    assert left(begun(Some(scope="local", least=0.0))) == [4, 12, 6, 8]


def test_a_pruner_without_scores_is_told_what_it_lacks() -> None:
    with pytest.raises(NotImplementedError, match="ChannelPruning must say how important"):
        begun(ChannelPruning())


# ---------------------------------------------------------------- while the network trains


def backward(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    torch.manual_seed(0)  # of dropout
    nn.functional.cross_entropy(model(images), labels).backward()


def test_a_cut_between_two_batches_of_one_step_is_not_noticed_by_what_stays() -> None:
    """Weights, momentum and the gradient of the first batch lose the same rows, and go on."""
    run = begun(First(ratio=0.0), steps=9, optimizer=lambda p: SGD(p, 0.1, momentum=0.9))
    model, optimizer = run.model.train(), run.optimizer
    assert optimizer is not None
    for half in (slice(0, 4), slice(4, 8)):
        optimizer.zero_grad()
        backward(model, IMAGES[half], LABELS[half])
        optimizer.step()
    optimizer.zero_grad()
    backward(model, IMAGES[:4], LABELS[:4])

    groups, _ = cuttable(model, run.example)
    edits = edits_of(model, groups, {group.name: [0, 2, 3] for group in groups})
    wanted = {}
    for what in ("weight", "gradient", "momentum"):
        shadow = copy.deepcopy(model)  # holds one of them in the place of weights, and is cut too
        for name, parameter in model.named_parameters():
            state = optimizer.state[parameter]["momentum_buffer"]
            held = {"weight": parameter, "gradient": parameter.grad, "momentum": state}[what]
            shadow.get_parameter(name).data.copy_(held)
        replay(shadow, edits)
        wanted[what] = {name: p.detach() for name, p in shadow.named_parameters()}

    run.apply(*edits)
    second = copy.deepcopy(model)
    second.zero_grad()
    backward(second, IMAGES[4:], LABELS[4:])
    backward(model, IMAGES[4:], LABELS[4:])
    optimizer.step()
    for name, parameter in model.named_parameters():
        gradient = wanted["gradient"][name] + second.get_parameter(name).grad
        momentum = 0.9 * wanted["momentum"][name] + gradient
        assert torch.allclose(parameter.grad, gradient, atol=1e-7), name
        assert torch.allclose(optimizer.state[parameter]["momentum_buffer"], momentum, atol=1e-6)
        assert torch.allclose(parameter, wanted["weight"][name] - 0.1 * momentum, atol=1e-6), name


@pytest.mark.parametrize("kind", [SGD, Adam])
def test_rates_go_on_over_cuts_in_mid_training(kind: Any) -> None:
    """Scheduler, groups and their options are those of a training in which nothing leaves."""
    rates = []
    for ratio in (0.0, 0.5):
        method = First(ratio=ratio, rounds=3, start=0.25, end=1.0)
        run = begun(method, steps=8, optimizer=lambda p: kind(p, lr=0.1, weight_decay=0.01))
        assert run.optimizer is not None
        scheduler, seen = CosineAnnealingLR(run.optimizer, 8), []
        for _ in range(8):
            run.optimizer.zero_grad()
            backward(run.model.train(), IMAGES, LABELS)
            run.before_step()
            run.optimizer.step()
            run.after_step()
            scheduler.step()
            (group,) = run.optimizer.param_groups
            assert group["weight_decay"] == 0.01
            assert list(map(id, group["params"])) == list(map(id, run.model.parameters()))
            seen.append(group["lr"])
        assert {id(p) for p in run.optimizer.state} <= {id(p) for p in run.model.parameters()}
        rates.append(seen)
        assert bool(run.edits) == bool(ratio)
    assert rates[0] == rates[1] and len(set(rates[0])) == 8


@pytest.mark.parametrize("name", ["plain", "residual", "grouped", "bare", "transformer"])
def test_groups_after_a_cut_are_those_that_would_be_found(name: str) -> None:
    """A cut need not look for them anew, and a run that resumes finds the same."""
    toy = TOYS[name]
    model = toy.model()
    groups, _ = cuttable(model, toy.inputs(2))
    leaving = {group.name: list(range(len(group.units)))[1::3] for group in groups}
    edits = edits_of(model, groups, leaving)
    replay(model, edits)
    assert channels.after_cut(groups, edits) == cuttable(model, toy.inputs(2))[0]


def test_groups_with_one_unit_left_are_found_anew() -> None:
    toy = TOYS["grouped"]
    model = toy.model()
    groups, _ = cuttable(model, toy.inputs(2))
    edits = edits_of(model, groups, {groups[0].name: list(range(1, len(groups[0].units)))})
    assert channels.after_cut(groups, edits) == []


def test_groups_are_found_once_until_something_else_changes_the_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    def counted(*args: Any) -> Any:
        calls.append(1)
        return cuttable(*args)

    monkeypatch.setattr(channels, "cuttable", counted)
    run = begun(First(ratio=0.0))
    for _ in range(2):
        groups = channels.removable(run)
        channels.remove(run, edits_of(run.model, groups, {group.name: [0] for group in groups}))
    assert len(calls) == 1
    edits = edits_of(run.model, groups := channels.removable(run), {groups[0].name: [0]})
    run.apply(*edits)  # by another method
    assert len(channels.removable(run)[0].units) + 1 == len(groups[0].units) and len(calls) == 2
