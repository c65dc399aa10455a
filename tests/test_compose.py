"""Chains and sets of methods: who claims a budget, whose clock it is, and resuming in between."""

import copy
import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from pliant import registry
from pliant.api import compress
from pliant.budget import Budget
from pliant.compose import Chain, Stage, chain, resolve, together
from pliant.data import Data, Train
from pliant.drivers.loop import fit
from pliant.edits import Factor
from pliant.errors import BudgetError, ChainError, MethodError
from pliant.latency import Target
from pliant.method import HOOKS, Method, uses
from pliant.registry import Paper, plain, register
from pliant.render.words import verdict
from pliant.run import Run, start

EXAMPLE = (torch.zeros(1, 3, 6, 6),)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.Flatten(), nn.Linear(24, 4)
    return nn.Sequential(*layers)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) for m in model.modules())


@dataclass(frozen=True)
class Notes(Method):
    """Writes down every call with its clock and budget."""

    name: str = "a"

    def _note(self, run: Run, hook: str) -> None:
        limits = run.budget.given() if run.budget else {}
        clock = (run.step, run.steps, run.epoch)
        run.note(call=f"{self.name}.{hook}", clock=clock, limits=limits, keys=sorted(run.state))

    def prepare(self, run: Run) -> None:
        run.state[self.name] = 0
        self._note(run, "prepare")

    def loss(self, run: Run, loss: Tensor, output: Any, batch: Any) -> Tensor:
        return loss + 1

    def penalty(self, run: Run) -> Tensor:
        return run.model.get_parameter("4.bias").sum()

    def after_step(self, run: Run) -> None:
        run.state[self.name] += 1
        self._note(run, "after_step")

    def after_epoch(self, run: Run) -> None:
        self._note(run, "after_epoch")

    def finalize(self, run: Run) -> None:
        self._note(run, "finalize")


@dataclass(frozen=True)
class Saver(Method):
    """Claims parameters."""


@dataclass(frozen=True)
class Coder(Method):
    """Claims bytes, parameters and milliseconds."""


@dataclass(frozen=True)
class Cuts(Method):
    """Makes the network smaller, and promises nothing."""

    def finalize(self, run: Run) -> None:
        run.apply(Factor("2", "output", (1,)))


def whole(method: Method) -> Run:
    return start(net(), method, example=EXAMPLE)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    registry.entries()
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))
    paper = Paper("T", "A", "V", 2020)
    register("saver", paper=paper, saves="params")(Saver)
    register("coder", paper=paper, saves="params bytes latency")(Coder)


def calls(run: Run) -> list[str]:
    return [row["call"] for row in run.log if "call" in row]


# ------------------------------------------------------------------ making them


def test_names_specs_methods_and_sequences():
    method = chain("energy(p=0.9)", Notes(), Stage("evbmf"), ["saver", "coder"])
    assert [type(part).__name__ for part in method.parts] == ["Energy", "Notes", "EVBMF", "Chain"]
    assert resolve(["saver", Notes()]) == chain("saver", Notes())
    assert isinstance(resolve(Stage(Saver())), Chain)
    assert resolve(("saver",)).parts == (Saver(),)
    for method in (chain("saver", "coder"), together("saver", "coder")):
        assert resolve(method) is method and isinstance(method, Method)


@pytest.mark.parametrize("compose", [chain, together])
def test_there_must_be_a_method(compose):
    with pytest.raises(ChainError, match="at least one"):
        compose()
    with pytest.raises(MethodError, match="a name, a spec string, a Method or a sequence"):
        compose(3)


def test_shares_must_be_positive():
    with pytest.raises(ChainError, match="one must be positive"):
        chain(Stage(Saver(), share=0))


def test_a_composition_uses_what_its_parts_use():
    for compose in (chain, together):
        assert all(uses(compose(Saver(), Notes()), h) == uses(Notes(), h) for h in HOOKS)
        assert uses(compose(compose(Notes())), "loss") and not uses(compose(Saver()), "loss")


def test_a_composition_is_plain_data():
    data = plain(chain(Stage(Saver(), Budget(params=0.5), 2.0), together("coder")))
    first, second = data["stages"]
    assert first == {
        "method": {"name": "saver", "options": {}},
        "budget": {"params": 0.5},
        "share": 2.0,
    }
    assert second["method"]["methods"][0]["name"] == "coder"


# ------------------------------------------------------------------ budgets


def budgets(method: Chain, budget: Budget | None) -> list[dict[str, Any]]:
    """What every stage gets."""
    run = start(net(), method, budget, example=EXAMPLE)
    seen = []
    for index in range(len(method.stages)):
        run.state["stage"] = index
        seen.append(method._now(run).budget)
    return [given.given() if given else {} for given in seen]


def test_an_axis_goes_to_the_one_that_claims_it():
    assert budgets(chain("saver", Notes()), Budget(params=0.5)) == [{"params": 0.5}, {}]
    assert budgets(chain("saver", "coder"), Budget(bytes=9)) == [{}, {"bytes": 9}]
    assert budgets(chain(Notes(), ["coder", Notes()]), Budget(bytes=9)) == [{}, {"bytes": 9}]
    assert budgets(chain(Notes(), together("coder", Notes())), Budget(bytes=9))[1] == {"bytes": 9}


def test_two_claimants_must_be_told_apart():
    with pytest.raises(ChainError, match=r"saver and coder both save params: .*Stage\("):
        start(net(), chain("saver", "coder"), Budget(params=0.5), example=EXAMPLE)
    with pytest.raises(ChainError, match="saver and coder both save params"):
        start(net(), together("saver", "coder"), Budget(params=0.5), example=EXAMPLE)
    stages = chain(Stage(Saver(), Budget(params=0.6)), Stage(Coder(), Budget(params=0.5)))
    assert budgets(stages, Budget(params=0.5)) == [{"params": 0.6}, {"params": 0.5}]
    half = chain(Stage(Saver(), Budget(params=0.6)), "coder")
    assert budgets(half, Budget(params=0.4, bytes=0.3)) == [
        {"params": 0.6},
        {"params": 0.4, "bytes": 0.3},
    ]


def test_an_axis_that_nobody_saves_is_refused():
    with pytest.raises(ChainError, match="None of saver, notes says that it saves macs"):
        start(net(), chain("saver", Notes()), Budget(macs=0.5), example=EXAMPLE)
    own = chain(Stage(Coder(), Budget(params=0.5)), Notes())
    with pytest.raises(ChainError, match="coder could save bytes but has a budget of its own"):
        start(net(), own, Budget(bytes=0.5), example=EXAMPLE)


def test_a_stage_is_refused_an_axis_that_it_does_not_save():
    own = Stage(Saver(), Budget(macs=0.5))
    for method in (chain(own), chain(Notes(), own), chain(Notes(), [Notes(), own])):
        with pytest.raises(BudgetError, match="saver does not save macs: it saves params; drop"):
            start(net(), method, example=EXAMPLE, steps=4)
    with pytest.raises(ChainError, match="None of notes says that it saves params"):
        start(net(), chain(Notes(), Stage(chain(Notes()), Budget(params=9))), example=EXAMPLE)


def test_a_stage_that_misses_its_own_budget_is_named():
    own = Stage(Saver(), Budget(params=0.5))
    run = start(net(), chain(own, Notes()), example=EXAMPLE, steps=2)
    assert run.misses(run.cost) == []
    run.after_step()
    assert calls(run) == ["a.prepare"]
    other = start(net(), chain(own, Notes()), example=EXAMPLE, steps=2)
    other.load_state_dict(stored(run.state_dict()))
    said = "after saver, params is 598 where 299 was allowed"
    for each in (run, other):
        assert each.misses(each.finish(strict=False)) == [said]
        with pytest.raises(BudgetError, match=said):
            each.finish()


def test_a_stage_is_measured_as_it_is_left():
    """What comes later neither mends what a stage missed nor spoils what it kept."""
    early = chain(Stage(Saver(), Budget(params=0.9)), Cuts())
    late = chain(Cuts(), Stage(Saver(), Budget(params=0.9)))
    missed = [len(run.misses(run.finish(strict=False))) for run in map(whole, (early, late))]
    assert missed == [1, 0]


def test_a_stage_that_is_not_fast_enough_is_named():
    def by_size(module: nn.Module, example: Any) -> float:
        return 1e-6 * sum(parameter.numel() for parameter in module.parameters())

    slow = chain(Stage(Coder(), Budget(latency="60%")), Cuts())
    run = start(net(), slow, example=EXAMPLE, target=Target.of(by_size))
    (said,) = run.misses(run.finish(strict=False))
    assert said.startswith("after coder, latency is 0.598 ms where 0.359 ms was allowed")
    assert (
        run.clock is not None and run.planner.measured().latency < 0.598
    )  # of the finished network


def test_the_report_tells_what_a_stage_missed():
    asked = chain(Stage(Saver(), Budget(params=0.5)))
    missed = compress(net(), None, asked, example=EXAMPLE, strict=False)
    assert not missed.report.met and missed.report.budget == {"params": 0.5}
    assert missed.report.misses == ("after saver, params is 598 where 299 was allowed",)
    assert verdict(missed.report).startswith("Budget missed (params")
    asked = chain(Cuts(), Stage(Saver(), Budget(params=0.9)))
    met = compress(net(), None, asked, example=EXAMPLE)
    assert met.report.met and verdict(met.report).startswith("Budget met: params")


def test_an_unregistered_method_is_given_its_budget():
    stages = chain(Stage(Notes(), Budget(params=0.5)), "saver")
    assert budgets(stages, None) == [{"params": 0.5}, {}]


# ------------------------------------------------------------------ clocks and states


def test_stages_run_one_after_the_other_each_by_its_own_clock():
    method = chain(Stage(Notes("a"), share=1), Stage(Notes("b"), share=2))
    run = start(net(), method, example=EXAMPLE, steps=6)
    for step in range(6):
        run.after_step()
        if step % 2:
            run.after_epoch()
    run.finish()
    rows = [(row["call"], row["clock"], (row["step"], row["epoch"])) for row in run.log]
    assert rows == [
        ("a.prepare", (0, 2, 0), (0, 0)),
        ("a.after_step", (1, 2, 0), (1, 0)),
        ("a.after_step", (2, 2, 0), (2, 0)),
        ("a.finalize", (2, 2, 0), (2, 0)),
        ("b.prepare", (0, 4, 0), (2, 0)),
        ("b.after_epoch", (0, 4, 1), (2, 1)),
        ("b.after_step", (1, 4, 1), (3, 1)),
        ("b.after_step", (2, 4, 1), (4, 1)),
        ("b.after_epoch", (2, 4, 2), (4, 2)),
        ("b.after_step", (3, 4, 2), (5, 2)),
        ("b.after_step", (4, 4, 2), (6, 2)),
        ("b.after_epoch", (4, 4, 3), (6, 3)),
        ("b.finalize", (4, 4, 3), (6, 3)),
    ]
    assert run.state["stage0"] == {"a": 2} and run.state["stage1"] == {"b": 4}


def test_without_training_all_stages_follow_at_the_end():
    run = start(net(), chain(Notes("a"), [Notes("b"), Notes("c")]), example=EXAMPLE)
    assert calls(run) == ["a.prepare"]
    run.finish()
    run.finish()
    order = ["a.prepare", "a.finalize", "b.prepare", "b.finalize", "c.prepare", "c.finalize"]
    assert calls(run) == order and {row["clock"] for row in run.log} == {(0, 0, 0)}


def test_a_share_that_rounds_to_nothing_gets_no_step():
    method = chain(Stage(Notes("a"), share=0.01), Notes("b"))
    run = start(net(), method, example=EXAMPLE, steps=4)
    run.after_step()
    assert calls(run) == ["a.prepare", "a.finalize", "b.prepare", "b.after_step"]


def test_only_the_running_stage_changes_loss_and_gradients():
    run = start(net(), chain(Notes("a"), Saver()), example=EXAMPLE, steps=4)
    bias = run.model.get_parameter("4.bias")
    assert run.loss(torch.tensor(1.0), None, None) == 2
    run.before_step()
    assert torch.equal(bias.grad, torch.ones(4))
    run.after_step()
    run.after_step()
    assert run.loss(torch.tensor(1.0), None, None) == 1
    run.before_step()
    assert torch.equal(bias.grad, torch.ones(4))


def test_together_calls_everybody_with_a_state_of_its_own():
    run = start(net(), together(Notes("a"), Notes("b")), example=EXAMPLE, steps=1)
    assert run.loss(torch.tensor(1.0), None, None) == 3
    run.before_step()
    assert torch.equal(run.model.get_parameter("4.bias").grad, 2 * torch.ones(4))
    run.after_step()
    run.after_epoch()
    run.finish()
    assert calls(run) == [
        f"{name}.{hook}"
        for hook in ("prepare", "after_step", "after_epoch", "finalize")
        for name in "ab"
    ]
    assert run.state == {"part0": {"a": 1}, "part1": {"b": 1}}


# ------------------------------------------------------------------ hooks


@dataclass(frozen=True)
class Hooked(Method):
    """Doubles the outputs of a layer while it is at work."""

    layer: str = "0"

    def prepare(self, run: Run) -> None:
        run.hook(run.model.get_submodule(self.layer).register_forward_hook(lambda *a: 2 * a[2]))


def test_a_stage_takes_its_own_hooks_with_it():
    run = start(net(), chain(Hooked("0"), Hooked("2")), example=EXAMPLE, steps=2)
    assert len(run.model[0]._forward_hooks) == 1
    run.after_step()
    assert not run.model[0]._forward_hooks and len(run.model[2]._forward_hooks) == 1
    run.finish()
    assert hooks(run.model) == 0


def test_a_stage_leaves_the_hooks_of_its_neighbours():
    many = [Hooked("0")] + [Saver()] * 10 + [Hooked("4")]  # "stage1" begins as "stage11" does
    method = together(chain(*many), Hooked("2"))
    run = start(net(), method, example=EXAMPLE, steps=12)
    seen = []
    for _ in range(12):
        seen.append([len(run.model[i]._forward_hooks) for i in (0, 2, 4)])
        run.after_step()
    assert seen == [[1, 1, 0]] + 10 * [[0, 1, 0]] + [[0, 1, 1]]
    run.finish()
    assert hooks(run.model) == 0


# ------------------------------------------------------------------ resuming


@dataclass(frozen=True)
class Teacher(Method):
    """Edits, hooks, draws and copies a teacher in ``prepare``: all that a later stage may add."""

    layer: str = "0"
    rank: int = 2

    def prepare(self, run: Run) -> None:
        weight = run.model.get_submodule(self.layer).weight
        run.state["threshold"] = weight.detach().abs().mean()  # depends on the weights
        run.state["noise"] = torch.randn((), generator=run.generator)
        run.apply(Factor(self.layer, "output", (self.rank,)))
        teacher = copy.deepcopy(run.model)  # of this moment; not in any saved state

        def pull(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return output + 0.1 * teacher.get_submodule(self.layer)(args[0]).detach()

        run.hook(run.model.get_submodule(self.layer).register_forward_hook(pull))

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        run.model.get_parameter("4.bias").add_(run.state["threshold"] * run.state["noise"])


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    noise = torch.Generator().manual_seed(1)
    while True:
        yield torch.randn(4, 3, 6, 6, generator=noise), torch.arange(4)


def stored(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return dict(torch.load(buffer, weights_only=True))


def trained(method: Method, steps: int, stop: int) -> Run:
    """Train; at a step save everything, begin afresh and go on."""
    run, optimizer = begin(method, steps)
    samples = batches()
    for step in range(steps):
        if step == stop:
            saved = stored({"run": run.state_dict(), "model": run.model.state_dict()})
            state = stored(optimizer.state_dict())
            run, optimizer = begin(method, steps)
            run.load_state_dict(saved["run"])
            run.model.load_state_dict(saved["model"])
            optimizer.load_state_dict(state)
        inputs, labels = next(samples)
        optimizer.zero_grad()
        nn.functional.cross_entropy(run.model(inputs), labels).backward()
        run.before_step()
        optimizer.step()
        run.after_step()
    assert hooks(run.model) > 0
    run.finish()
    assert hooks(run.model) == 0 and "entered" not in run.state
    return run


def begin(method: Method, steps: int) -> tuple[Run, SGD]:
    model = net()
    optimizer = SGD(model.parameters(), 0.05, momentum=0.9)
    return start(model, method, example=EXAMPLE, optimizer=optimizer, steps=steps), optimizer


CHAINS = {
    "chain": chain(Teacher("0"), Teacher("2")),
    "three": chain(Teacher("0"), Notes("n"), Teacher("2")),
    "nested": chain(Notes("n"), [Teacher("0"), Teacher("2")]),
    "in a set": together(chain(Teacher("0"), Teacher("2")), Notes("n")),
    "two in a set": together(chain(Notes("a"), Teacher("0")), chain(Notes("n"), Teacher("2"))),
    "unequal": chain(Stage(Teacher("0"), share=0.01), Teacher("2")),
}


@pytest.mark.parametrize("stop", [1, 3, 4, 5])
@pytest.mark.parametrize("name", CHAINS)
def test_resuming_within_any_stage_changes_nothing(name, stop):
    method = CHAINS[name]
    whole, resumed = trained(method, 6, -1), trained(method, 6, stop)
    assert str(whole.state_dict()) == str(resumed.state_dict())
    pairs = zip(whole.model.state_dict().items(), resumed.model.state_dict().items(), strict=True)
    assert [a for (a, x), (b, y) in pairs if a != b or not torch.equal(x, y)] == []


@pytest.mark.parametrize("at", [2, 3, 5])
def test_the_loop_resumes_within_a_chain(at, tmp_path):
    inputs, labels = torch.randn(24, 3, 6, 6), torch.arange(24) % 4
    data, plan = Data((inputs, labels), classes=4), Train(2, batch=8, lr=0.05, checkpoint_every=1)

    def train(**more: Any) -> Run:
        run = start(net(), CHAINS["chain"], example=EXAMPLE, steps=6)
        fit(run, data, replace(plan, device="cpu"), **more)
        return run

    def crash(row: dict[str, Any]) -> None:
        if row["step"] == at:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        train(folder=tmp_path, watch=crash)
    whole, resumed = train(), train(folder=tmp_path, resume=True)
    assert whole.edits == resumed.edits and hooks(resumed.model) == 0
    pairs = zip(whole.model.state_dict().items(), resumed.model.state_dict().items(), strict=True)
    assert [a for (a, x), (b, y) in pairs if a != b or not torch.equal(x, y)] == []
