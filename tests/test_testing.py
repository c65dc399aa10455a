"""The checks bite: each is shown a method that breaks what it guards."""

import contextlib
import itertools
from dataclasses import dataclass, field
from typing import Annotated, Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pliant import registry
from pliant.cost import LayerCost
from pliant.data import Data
from pliant.edits import EDITS, Factor
from pliant.errors import DataError, MethodError, ModelError
from pliant.method import Method
from pliant.registry import In, Paper, register
from pliant.result import Solution
from pliant.run import Run
from pliant.testing import (
    TOYS,
    Case,
    Toy,
    check_method,
    checks,
    checks_for,
    counted,
    described,
    trial,
)
from pliant.testing import exported as export
from pliant.testing.checks import Suite

PAPER = Paper("Title", "A. Author", "Venue", 2020, "https://example.org")
PLAIN = TOYS["plain"]
EXPORTS = Suite.exports


@pytest.fixture(autouse=True)
def own_list(monkeypatch: pytest.MonkeyPatch) -> None:
    registry.entries()
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))


@pytest.fixture(autouse=True)
def no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """The export takes seconds, and the conformance suite makes it."""
    monkeypatch.setattr(Suite, "exports", lambda suite: None)


def failing(method: Any, toy: Toy = PLAIN) -> set[str]:
    """Names of the checks that a method fails on one toy."""
    found = set()
    for name, check in checks(method, (toy,)):
        try:
            check()
        except Exception:
            found.add(name)
    return found


@dataclass(frozen=True)
class Good(Method):
    """Factorizes one layer after half of the steps."""

    rank: int = 3  # of the layer

    def after_step(self, run: Run) -> None:
        if run.step == run.steps // 2:
            self.finalize(run)

    def finalize(self, run: Run) -> None:
        if self.rank < 1:
            raise MethodError("good: rank must be at least 1.")
        if not run.edits:
            run.apply(Factor("3", "output", (min(self.rank, 12),)))


def test_a_sound_method_fails_nothing():
    assert failing(Good()) == set()
    assert failing(Method()) == set()


# ------------------------------------------------------------------ while compressing


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Foreign(nn.Module):
    """A module that a reader of the file cannot have."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs


@dataclass(frozen=True)
class Bad(Method):
    """Breaks one rule."""

    how: str = ""

    def prepare(self, run: Run) -> None:
        layer: Any = run.model.get_submodule("3")
        if self.how == "hook":
            layer.register_forward_hook(lambda *_: None)
        elif self.how == "parametrization":
            parametrize.register_parametrization(layer, "weight", Doubled())
        elif self.how == "foreign module":
            run.model.get_submodule("").append(Foreign())  # type: ignore[operator]
        elif self.how == "patched forward":
            layer.forward = layer.forward
        elif self.how == "global randomness":
            run.state["noise"] = torch.rand(())
        elif self.how == "process":
            run.state["noise"] = torch.tensor(1e8 * next(_RUNS))
        elif self.how == "object in state":
            run.state["method"] = self
        elif self.how == "needs data":
            next(iter(run.data.batches("train", 2)))  # type: ignore[union-attr]

    def penalty(self, run: Run) -> Tensor | None:
        if self.how == "penalty":
            return run.model.get_parameter("3.weight").sum() * float("nan")
        return None

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        if self.how == "forgets":
            _SEEN.append(len(_SEEN))
            run.model.get_parameter("3.weight").add_(0.01 * len(_SEEN))
        elif self.how in ("global randomness", "process"):
            run.model.get_parameter("3.weight").add_(1e-9 * run.state["noise"])

    @torch.no_grad()
    def finalize(self, run: Run) -> None:
        if self.how == "global randomness":
            torch.rand(())
        elif self.how == "not finite":
            run.model.get_parameter("3.weight").fill_(float("inf"))
        elif self.how == "unsaid":
            run.model.get_submodule("")[3] = nn.Conv2d(8, 12, 1, stride=2)  # type: ignore[operator]
        elif self.how == "wrong prediction":
            run.apply(Wrong("3", "output", (3,)))
        elif self.how == "crash":
            raise ZeroDivisionError


_SEEN: list[int] = []
_RUNS = itertools.count(1)  # differs from run to run, as an address in memory may


@dataclass(frozen=True)
class Wrong(Factor):
    """Predicts one parameter too few."""

    def predict(self, before: LayerCost) -> LayerCost:
        found = super().predict(before)
        return LayerCost(found.kind, found.params - 1, found.macs, found.bytes)


CAUGHT = {
    "hook": {"only_plain_modules_left", "no_hook_left_after_an_error", "works_without_training"},
    "parametrization": {"only_plain_modules_left", "saved_and_loaded_identical"},
    "foreign module": {"only_plain_modules_left", "saved_and_loaded_identical"},
    "patched forward": {"only_plain_modules_left"},
    "global randomness": {"steps_are_finite_and_use_their_own_randomness"},
    "process": {"same_seed_same_bytes"},
    "object in state": {"resume_equals_uninterrupted"},
    "needs data": {"works_without_data_or_says_so"},
    "penalty": {"steps_are_finite_and_use_their_own_randomness"},
    "forgets": {"same_seed_same_bytes", "resume_equals_uninterrupted"},
    "not finite": {"outputs_are_finite"},
    "unsaid": {"saved_and_loaded_identical"},
    "wrong prediction": {"costs_are_as_predicted"},
    "crash": {"outputs_are_finite", "works_without_training", "same_seed_same_bytes"},
}


@pytest.mark.parametrize("how", CAUGHT)
def test_a_broken_rule_is_caught(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EDITS, "wrong", Wrong)
    assert CAUGHT[how] <= failing(Bad(how))


# ------------------------------------------------------------------ budgets, refusals, odd values


@dataclass(frozen=True)
class Spender(Method):
    """Promises to save and saves nothing; chokes on zero."""

    interval: int = 2  # steps

    def after_step(self, run: Run) -> None:
        run.state["turn"] = run.step % self.interval


def test_a_promise_is_held_to_the_budget():
    register("spender", paper=PAPER, saves="params")(Spender)
    assert {"budget_is_met", "odd_values_work_or_are_refused"} <= failing(Spender())
    with pytest.raises(AssertionError, match="interval=0 ends in ZeroDivisionError"):
        dict(checks(Spender(), (PLAIN,)))["odd_values_work_or_are_refused"]()


@dataclass(frozen=True)
class Picky(Method):
    """Refuses networks without batch norms."""

    def prepare(self, run: Run) -> None:
        if not any(isinstance(m, nn.BatchNorm2d) for m in run.model.modules()):
            raise ModelError("There is no batch norm to look at.")


def test_refusals_are_checked_by_their_words():
    register("picky", paper=PAPER)(Picky)
    refuses = {"bare": "no batch norm", "linear": "another sentence", "plain": "no batch norm"}
    case = Case("picky", toys=("residual", "bare"), refuses=refuses)
    by_name = dict(checks_for(case))
    assert "handles_bare" not in by_name and "input_stays_untouched" in by_name
    by_name["refuses_bare"]()
    for wrong in ("refuses_linear", "refuses_plain"):
        with pytest.raises(AssertionError):
            by_name[wrong]()


# ------------------------------------------------------------------ descriptions


def entry_checks(kind: Any, **paper: Any) -> set[str]:
    register("mine", paper=Paper(**{**vars(PAPER), **paper}))(kind)
    return failing(kind(), Toy("none", nn.Identity)) & {
        *("metadata_complete", "defaults_construct", "is_frozen", "comes_back_from_json"),
        *("unknown_option_is_named", "axes_are_known"),
    }


def test_descriptions_are_checked():
    @dataclass(frozen=True)
    class Mute(Method):
        strength: float = 1.0  # of it

    @dataclass(frozen=True)
    class Uncommented(Method):
        """Has an option that nobody explains."""

        strength: float = 1.0

    @dataclass(frozen=True)
    class Two(Good):
        """Stands on another method."""

    @dataclass(frozen=True)
    class Odd(Method):
        """Has a value that JSON does not know."""

        data: Any = field(default_factory=lambda: {1, 2})  # a set

    assert entry_checks(Mute) == {"metadata_complete"}
    registry._ENTRIES.pop("mine")
    assert entry_checks(Uncommented) == {"metadata_complete"}
    registry._ENTRIES.pop("mine")
    assert "defaults_construct" in entry_checks(Two)
    registry._ENTRIES.pop("mine")
    assert entry_checks(Odd) == {"comes_back_from_json"}
    for wrong in ({"title": " "}, {"year": 20}, {"url": "example.org"}):
        registry._ENTRIES.pop("mine")
        assert entry_checks(Picky, **wrong) == {"metadata_complete"}


# ------------------------------------------------------------------ for others


def test_check_method_says_all_that_is_wrong():
    with pytest.raises(AssertionError) as error:
        check_method(Bad("hook"), PLAIN.model(), PLAIN.data())
    lines = str(error.value).splitlines()
    assert any(line.startswith("only_plain_modules_left: AssertionError: in the") for line in lines)
    assert len(lines) > 2


def test_known_failures_must_fail():
    known = dict.fromkeys(failing(Bad("patched forward")), "known")
    check_method(Bad("patched forward"), PLAIN.model(), PLAIN.data(), fails=known)
    with pytest.raises(AssertionError, match=r"is_frozen: was to fail \(never\), but passes"):
        check_method(Good(), PLAIN.model(), PLAIN.data(), fails={"is_frozen": "never"})


def test_a_model_of_yours_needs_data():
    with pytest.raises(MethodError, match="pass data"):
        check_method(Good(), PLAIN.model())


class Words(nn.Module):
    """A network that takes keywords and returns a dict, as Transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.hidden = nn.Linear(8, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.hidden(self.embed(ids).mean(1)).relu())}


def test_networks_of_keywords_and_dicts():
    ids = torch.arange(48).reshape(16, 3) % 10
    batches = [{"ids": ids[i : i + 8], "labels": torch.arange(8) % 4} for i in (0, 8)]
    words = Toy("words", Words, given=Data(batches, classes=4))
    assert failing(registry.build("energy"), words) == set()


# ------------------------------------------------------------------ what is refused, and shared


@dataclass(frozen=True)
class Choosy(Method):
    """Refuses networks by its options."""

    depth: int = 0  # most layers it takes
    late: bool = False  # refuse at the end, when all work is done

    def prepare(self, run: Run) -> None:
        if not self.late:
            self.finalize(run)

    def finalize(self, run: Run) -> None:
        if len(run.layers) > self.depth:
            raise ModelError("There are too many layers.")


def named(method: Any, refuses: Any = None) -> dict[str, Any]:
    return dict(checks(method, tuple(TOYS.values()), refuses=refuses))


def test_a_clear_refusal_will_do_as_long_as_one_toy_works():
    check_method(Choosy(depth=1))  # the smallest toy has one layer
    with pytest.raises(AssertionError, match="refuses every network .*'There are too many"):
        named(Choosy(depth=0))["outputs_are_finite"]()
    with pytest.raises(ModelError):
        named(Choosy(depth=1, late=True))["handles_residual"]()
    with pytest.raises(ModelError):  # a case is strict
        named(Choosy(depth=1), refuses={"residual": "too many"})["handles_grouped"]()


def test_a_refusal_must_be_a_sentence():
    @dataclass(frozen=True)
    class Curt(Choosy):
        """Says little."""

        def prepare(self, run: Run) -> None:
            if len(run.layers) > 1:
                raise ModelError("no")

    with pytest.raises(AssertionError, match="'no' must be a sentence"):
        named(Curt())["handles_residual"]()


def test_no_check_depends_on_the_order_of_toys(monkeypatch: pytest.MonkeyPatch):
    exported = []
    monkeypatch.setattr(Suite, "exports", EXPORTS)
    monkeypatch.setattr(export, "to_onnx", lambda model, *_: exported.append(model))
    monkeypatch.setattr(export, "_EXPORTED", set())
    for names in (("residual", "bare", "signal"), ("signal", "bare", "residual")):
        toys = tuple(TOYS[name] for name in names)
        dict(checks(registry.build("energy"), toys))["exports_to_onnx"]()
        case = Case("energy", toys=names)
        assert [toy.name for toy in case.shown()] == ["residual", "bare", "signal"]
    assert len(exported) == 1  # the smallest, once
    assert any(isinstance(module, nn.Conv1d) for module in exported[0].modules())


def test_a_compression_is_made_once_and_stays_as_it_is(monkeypatch: pytest.MonkeyPatch):
    calls = []
    made = trial.compress

    def counted(model: nn.Module, *given: Any, **named: Any) -> Any:
        calls.append(model)
        return made(model, *given, **named)

    monkeypatch.setattr(trial, "compress", counted)
    method = Good(rank=4)  # of this test alone
    for _ in range(2):
        assert failing(method) == set()
    # the one that all read, one to compare its bytes with, one without training
    assert len(calls) == 3
    found = trial.shared_trial(method, PLAIN, None, train=True)
    assert trial.shared_trial(method, PLAIN, None, train=True) is found
    assert found.result.edits == (Factor("3", "output", (4,)),)
    assert not any(module.training for module in found.result.model.modules())


def test_a_check_that_passed_is_not_made_again_and_one_that_failed_is():
    made = []

    @dataclass(frozen=True)
    class Counting(Good):
        """Says how often it begins without data."""

        def refuse(self, run: Run) -> None:
            made.append(run.data is None)
            if self.rank == 7 and run.data is None:
                raise RuntimeError("not in a sentence")

    for rank, times in ((5, 1), (7, 2)):
        made.clear()
        for _ in range(2):
            named = dict(checks(Counting(rank), (PLAIN,)))
            with contextlib.suppress(RuntimeError):
                named["works_without_data_or_says_so"]()
        assert made.count(True) == times


def test_exports_are_of_one_kind_whatever_their_sizes():
    def kind(form: str, *ranks: int) -> str:
        return export.kind_of(trial.trial(Layered(form, ranks), PLAIN, None, train=False))

    assert kind("output", 3) == kind("output", 4) == kind("output", 11)
    assert len({kind("output", 3), kind("output", 1), kind("input", 3), kind("tucker2", 3, 4)}) == 4


@dataclass(frozen=True)
class Layered(Method):
    """Factorizes one layer."""

    form: str = ""
    ranks: tuple[int, ...] = ()

    def finalize(self, run: Run) -> None:
        run.apply(Factor("3", self.form, self.ranks))


def test_odd_values_are_the_ends_of_ranges():
    @dataclass(frozen=True)
    class Ends(Method):
        """Has ranges."""

        share: Annotated[float, In(0, 1, "high")] = 0.5  # half open
        steps: Annotated[int, In(1)] | None = None  # without an upper end
        long: Annotated[int, In(1, 100_000)] = 1  # nobody waits for the upper end
        free: float = 1.0  # without a range

    register("ends", paper=PAPER)(Ends)
    assert described.odd_values(Ends()) == [
        *(("share", 0.0), ("share", 1 - 1e-6), ("steps", 1), ("steps", 10**6), ("long", 1)),
        *(("free", 0.0), ("free", -1.0), ("free", 1e6)),
    ]


def test_problems_are_refused_by_their_data_only():
    @dataclass(frozen=True)
    class Vectors:
        """Groups vectors at random."""

        wrong: bool = False  # fail with sets

        def cluster(self, views: Any, groups: int, generator: torch.Generator) -> Solution:
            if len(views) > 1 or views[0][0].shape[1] > 1:
                raise (MethodError if self.wrong else DataError)("One view of vectors is needed.")
            labels = torch.randint(groups, (len(views[0]),), generator=generator)
            return Solution({"labels": labels}, ({"round": 0},), True, 1)

    check_method(Vectors())
    with pytest.raises(AssertionError, match="solves_sets: MethodError"):
        check_method(Vectors(wrong=True))
    with pytest.raises(DataError):
        dict(checks(Vectors(), (), refuses={"sets": "One view"}))["solves_views"]()


# ------------------------------------------------------------------ options


@dataclass(frozen=True)
class Late(Good):
    """Reads one option only if another says so, and one never."""

    on: bool = False  # whether share is read
    share: Annotated[float, In(0, 1)] = 0.5  # of the layer
    deaf: int = 3  # read by nobody

    def finalize(self, run: Run) -> None:
        if self.on and not run.edits:
            run.apply(Factor("3", "output", (1 + round(self.share * 8),)))
        super().finalize(run)


def idle(method: Any, **more: Any) -> set[str]:
    found = set()
    for name, check in counted.checks(method, (PLAIN, TOYS["linear"]), **more):
        try:
            check()
        except AssertionError as error:
            assert "changes nothing" in str(error)
            found.add(name)
    return found


def test_an_option_that_changes_nothing_is_named():
    late = register("late", paper=PAPER)(Late)
    assert idle(late()) == {"share_counts", "deaf_counts"}
    assert idle(late(), variants=("late(on=True)",)) == {"deaf_counts"}
    with pytest.raises(AssertionError, match="deaf changes nothing"):
        check_method("late", fails={"defaults_construct": "derives from Good"}, witnesses={})


def test_a_test_may_be_the_witness_of_an_option():
    seen = []
    assert idle(Good(), witnesses={"rank": lambda: seen.append(1)}) == set() and seen == [1]


def test_a_refusal_is_no_effect():
    @dataclass(frozen=True)
    class Strict(Method):
        least: Annotated[int, In(1)] = 1  # of nothing

        def prepare(self, run: Run) -> None:
            if self.least > 1:
                raise MethodError("strict: least must be 1.")

    assert idle(Strict()) == {"least_counts"}
