"""A run by itself: gradients of penalties, hooks that come off, edits, budgets, resuming."""

import io
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from pliant.api.report import layer_rows, side
from pliant.budget import Budget, Option
from pliant.cost import cost, layer_costs
from pliant.edits import Factor
from pliant.errors import BudgetError, ModelError, PliantError
from pliant.method import Method
from pliant.result import LayerRow, Report
from pliant.run import Run, start

EXAMPLE = (torch.zeros(1, 3, 6, 6),)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(96, 4)
    return nn.Sequential(*layers)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# ------------------------------------------------------------------ penalties


@dataclass(frozen=True)
class Squares(Method):
    """Half the squares of the kernels, or of nothing."""

    names: tuple[str, ...] = ("0.weight", "3.weight")

    def penalty(self, run: Run) -> Tensor:
        return 0.5 * sum(run.model.get_parameter(name).square().sum() for name in self.names)


def test_a_penalty_is_added_to_the_gradient():
    model = net()
    run = start(model, Squares(("0.weight",)), example=EXAMPLE)
    loss = model(torch.randn(5, 3, 6, 6)).sum()
    loss.backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    run.before_step()
    for name, parameter in model.named_parameters():
        more = parameter.detach() if name == "0.weight" else 0
        assert torch.allclose(parameter.grad, before[name] + more)


def test_a_penalty_makes_gradients_where_there_are_none():
    model = net()
    run = start(model, Squares(), example=EXAMPLE)
    model[3].requires_grad_(False)
    with torch.no_grad():  # some trainers call before the step without gradients
        run.before_step()
    assert torch.equal(model[0].weight.grad, model[0].weight.detach())
    assert model[3].weight.grad is None and model[1].weight.grad is None


def test_a_penalty_on_nothing_is_nothing():
    model = net().requires_grad_(False)
    for names in ((), ("0.weight",)):
        start(model, Squares(names), example=EXAMPLE).before_step()
    assert all(p.grad is None for p in model.parameters())


# ------------------------------------------------------------------ hooks


@dataclass(frozen=True)
class Hooked(Method):
    """Hooks a layer; fails where it is told to."""

    fail: str = ""

    def _step(self, name: str) -> None:
        if self.fail == name:
            raise RuntimeError(name)

    def prepare(self, run: Run) -> None:
        run.hook(run.model.get_submodule("0").register_forward_hook(lambda *_: None))
        self._step("prepare")

    def finalize(self, run: Run) -> None:
        self._step("finalize")


@pytest.mark.parametrize("fail", ["", "prepare", "finalize"])
def test_hooks_come_off_however_it_ends(fail):
    model = net()
    try:
        run = start(model, Hooked(fail), example=EXAMPLE)
        assert hooks(model) == 1
        run.finish()
    except RuntimeError as error:
        assert str(error) == fail
    assert hooks(model) == 0


def test_anything_that_can_be_removed_is_handed_over():
    removed = []

    class Handle:
        def __init__(self, name: str) -> None:
            self.name = name

        def remove(self) -> None:
            removed.append(self.name)

    run = start(net(), Method(), example=EXAMPLE)
    for name in "ab":
        run.hook(Handle(name))
    run.close()
    run.close()
    assert removed == ["b", "a"]


# ------------------------------------------------------------------ edits and budgets


@dataclass(frozen=True)
class Halve(Method):
    """Factorizes the convolution at a rank."""

    rank: int = 2

    def finalize(self, run: Run) -> None:
        run.apply(Factor("0", "output", (self.rank,)))


def test_an_edit_reaches_model_optimizer_and_history():
    model = net()
    optimizer = SGD(model.parameters(), 0.1)
    run = start(model, Halve(), example=EXAMPLE, optimizer=optimizer)
    dense = run.cost
    after = run.finish()
    assert after.params < dense.params and run.cost == dense and after == cost(model, EXAMPLE)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    edits = list(run.edits)
    assert run.finish() == after and run.edits == edits == [Factor("0", "output", (2,))]


def test_a_missed_budget_raises_unless_told_not_to():
    budget = Budget(params=0.2)
    run = start(net(), Halve(6), budget, example=EXAMPLE)
    with pytest.raises(BudgetError, match=r"misses the budget: params is 6\d\d where 11\d was"):
        run.finish()
    assert run.finished
    run = start(net(), Halve(6), budget, example=EXAMPLE)
    assert len(run.misses(run.finish(strict=False))) == 1


def test_allocation_counts_what_has_no_options():
    model = net()
    run = start(model, Method(), Budget(params=500), example=EXAMPLE)
    rows = layer_costs(model, EXAMPLE)
    edits = [Factor("0", "output", (rank,)) for rank in (1, 2, 3)]
    options = [Option(1 / e.ranks[0], e.predict(rows["0"]), e) for e in edits]
    (chosen,) = run.planner.allocate({"0": [Option(0, rows["0"]), *options]})
    run.apply(chosen)
    most = cost(model, EXAMPLE).params
    assert most <= 500 < most + 27 + 6  # one rank more would not fit


def test_nothing_to_count_with_is_refused():
    with pytest.raises(ModelError, match="example"):
        start(net(), Method())
    with pytest.raises(BudgetError, match="latency"):
        start(net(), Method(), Budget(latency=3.0), example=EXAMPLE)


# ------------------------------------------------------------------ resuming


@dataclass(frozen=True)
class Keeps(Method):
    """Keeps tensors and numbers, and draws at random."""

    def prepare(self, run: Run) -> None:
        run.state["sum"], run.state["rows"] = torch.zeros(2), [[0, "a"]]
        if run.seed == 1:
            run.apply(Factor("3", "svd", (2,)))

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        run.state["sum"] += torch.randn(2, generator=run.generator)
        run.state["rows"].append([run.step, "b"])
        if run.step == 2:
            run.apply(Factor("0", "output", (2,)))
        run.keep("3", f"step {run.step}")
        run.note(total=float(run.state["sum"][0]))


def stored(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return dict(torch.load(buffer, weights_only=True))


@pytest.mark.parametrize("at", [0, 1, 2, 3])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_saved_run_goes_on_as_if_never_stopped(at, seed):
    whole = start(net(), Keeps(), example=EXAMPLE, steps=4, seed=seed)
    for step in range(4):
        if step == at:
            saved, tensors = stored(whole.state_dict()), stored(whole.model.state_dict())
        whole.after_step()
    other = start(net(), Keeps(), example=EXAMPLE, steps=4, seed=seed)
    other.load_state_dict(saved)
    other.model.load_state_dict(tensors)
    for _ in range(at, 4):
        other.after_step()
    assert str(whole.state_dict()) == str(other.state_dict())
    names = zip(whole.model.state_dict().items(), other.model.state_dict().items(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in names)


def test_two_runs_never_share_a_state():
    first = start(net(), Keeps(), example=EXAMPLE)
    second = start(net(), Keeps(), example=EXAMPLE)
    second.load_state_dict(first.state_dict())
    second.after_step()
    assert not first.state["sum"].any() and first.state["rows"] == [[0, "a"]]
    assert not first.log and not first.reasons


def test_a_saved_run_stays_as_it_was_saved():
    run = start(net(), Keeps(), example=EXAMPLE)
    saved = run.state_dict()
    run.after_step()
    assert not saved["state"]["sum"].any() and saved["state"]["rows"] == [[0, "a"]]
    assert saved["step"] == 0 and not saved["log"] and not saved["reasons"]


def test_another_run_is_refused():
    saved = start(net(), Keeps(), example=EXAMPLE, seed=0).state_dict()
    with pytest.raises(PliantError, match="same model, method, budget, data and seed"):
        start(net(), Keeps(), example=EXAMPLE, seed=1).load_state_dict(saved)


def test_a_finished_run_is_loaded_without_its_hooks():
    done = start(net(), Hooked(), example=EXAMPLE)
    done.finish()
    other = start(net(), Hooked("finalize"), example=EXAMPLE)
    other.load_state_dict(done.state_dict())
    assert hooks(other.model) == 0 and other.finished
    other.finish()  # finalize, which would fail, is not called again


# ------------------------------------------------------------------ the report's rows


class Nested(nn.Module):
    """A module that owns a parameter and layers: its row must not count theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Module()
        self.block.scale = nn.Parameter(torch.ones(6))
        self.block.conv = nn.Conv2d(3, 6, 3)
        self.block.bn = nn.BatchNorm2d(6)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.block.bn(self.block.conv(inputs)) * self.block.scale[:, None, None]


def test_rows_account_for_every_parameter_once():
    model = Nested()
    run = start(model, Method(), example=EXAMPLE)
    run.apply(Factor("block.conv", "output", (2,)))
    run.keep("block.bn", "not a kernel")
    rows = {row.layer: row for row in layer_rows(run)}
    assert list(rows) == ["block", "block.conv", "block.bn"]
    assert sum(row.after["params"] for row in rows.values()) == cost(model, EXAMPLE).params
    assert sum(row.after["macs"] for row in rows.values()) == cost(model, EXAMPLE).macs
    assert rows["block"].after["params"] == 6
    assert (rows["block.conv"].form, rows["block.conv"].ranks) == ("output", (2,))
    assert rows["block.conv"].reason == "" and rows["block.bn"].reason == "not a kernel"
    assert rows["block"].reason


def test_every_layer_left_alone_has_a_reason():
    run = start(net(), Method(), example=EXAMPLE)
    assert all(row.reason and row.form == "dense" for row in layer_rows(run))


def report() -> Report:
    sides = side(cost(net(), EXAMPLE), accuracy=float("nan"))
    row = LayerRow("0", "Conv2d", "dense", (), (3, 6), {"params": 1}, {"params": 1}, "why")
    plain = {"model": "Net", "data": "noise", "method": {"name": "x"}, "budget": {"params": 0.3}}
    return Report(
        **plain,
        before=sides,
        after=side(cost(net(), EXAMPLE), accuracy=0.5),
        layers=(row,),
        met=True,
        misses=(),
        history=({"step": 1, "ranks": {"0": [1.0]}},),
        seconds={"train": 1.5},
        seed=0,
        device="cpu",
        versions={},
    )


def test_a_report_survives_json():
    back = Report.from_json(report().to_json())
    assert back.before.accuracy is None  # not a number is no number
    assert back.layers == report().layers and back.history == report().history
    assert Report.from_json(back.to_json()) == back


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"before": 3, "after": 3}', "null"])
def test_what_is_no_report_is_refused(text):
    with pytest.raises(PliantError, match="must be a report"):
        Report.from_json(text)
