"""One generator of checks for every method, those of other packages too."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pliant.budget import Budget
from pliant.compose import resolve
from pliant.data import Data
from pliant.drivers.loop import fit
from pliant.edits import to_json
from pliant.errors import MethodError, MissingExtraError, PliantError
from pliant.files.onnx import to_onnx
from pliant.method import Method
from pliant.registry import Entry, build, entry_of, plain
from pliant.run import start
from pliant.testing import described, solved
from pliant.testing.case import Case, usual_budget
from pliant.testing.compressed import (
    OF_A_TRIAL,
    budget_is_met,
    only_plain_modules_left,
    outputs_are_finite,
    same_tensors,
    saved,
)
from pliant.testing.described import must
from pliant.testing.toys import TOYS, Toy
from pliant.testing.trial import PLAN, Trial, Walk, begin, outputs, put_in, trial, walk

Check = tuple[str, Callable[[], None]]


def check_method(
    method: Any,
    model: nn.Module | None = None,
    data: Data | None = None,
    *,
    budget: Budget | str | None = None,
    fails: Mapping[str, str] | None = None,
) -> None:
    """Run every check that applies to a method, and say all that is wrong with it.

    Args:
        method: a method of any verb, its name or a spec; it need not be registered.
        model: checked on this network instead of the toys; ``data`` is needed then.
        data: a few samples for the network: 32 are plenty.
        budget: seven tenths of the first axis it saves if None.
        fails: names of checks that are known to fail, and why.

    Raises:
        AssertionError: a check fails, or one that was to fail does not; one line for each.
        MethodError: a model came without data.
    """
    built = build(method) if isinstance(method, str) else method
    bounds = Budget.parse(budget) if isinstance(budget, str) else budget
    toys = tuple(TOYS.values()) if model is None else (_yours(model, data),)
    wrong = []
    for name, check in checks(built, toys, bounds):
        known = (fails or {}).get(name)
        try:
            check()
        except Exception as error:  # whatever a method raises is a finding
            if known is None:
                wrong.append(f"{name}: {type(error).__name__}: {error}")
        else:
            if known is not None:
                wrong.append(f"{name}: was to fail ({known}), but passes")
    if wrong:
        raise AssertionError("\n".join(wrong))


def _yours(model: nn.Module, data: Data | None) -> Toy:
    if data is None:
        raise MethodError("Checking on a model of yours needs a few samples for it: pass data.")
    return Toy("yours", lambda: copy.deepcopy(model), given=data)


def checks_for(case: Case) -> Iterator[Check]:
    """Yield the checks of one registered method by name: those of all, then its own."""
    method, bounds = case.built(), case.bounds()
    if isinstance(method, Method):
        toys = tuple(TOYS[name] for name in case.toys if name not in case.refuses)
        yield from checks(method, toys, bounds)
        for name, sentence in case.refuses.items():
            yield f"refuses_{name}", partial(_refuses, method, TOYS[name], bounds, sentence)
        for spec in case.variants if toys else ():
            yield f"works_as_{spec}", partial(_works, build(spec), toys[0], bounds)
    else:
        yield from _described(method)
        yield from solved.checks_for(case)
    for own in case.own:
        yield own.__name__.removeprefix("_"), own


def checks(method: Any, toys: tuple[Toy, ...], budget: Budget | None = None) -> Iterator[Check]:
    """Yield the checks that apply to a method: of its entry, its construction, its work.

    Compressions are shared between checks and made when the first of them runs. A method of
    another verb gets the checks of that verb; networks it may analyze are those of the toys.
    """
    yield from _described(method)
    if not isinstance(method, Method):
        yield from solved.checks(method, toys)
    elif toys:
        entry = entry_of(method)
        budget = budget or usual_budget(entry.saves if entry else ())
        yield from _Bench(method, entry, budget).checks(toys)


def _described(method: Any) -> Iterator[Check]:
    """Yield the checks that run nothing."""
    entry = entry_of(method)
    if entry is not None:
        for check in (
            described.metadata_complete,
            described.defaults_construct,
            described.unknown_option_is_named,
            described.axes_are_known,
        ):
            yield check.__name__, partial(check, entry)
        yield "comes_back_from_json", partial(described.comes_back_from_json, method)
    yield "is_frozen", partial(described.is_frozen, method)


class _Bench:
    """What the checks of one method share: one compression of each toy, one training by hand."""

    def __init__(self, method: Method, entry: Entry | None, budget: Budget | None) -> None:
        self.method, self.entry, self.budget = method, entry, budget
        self.trials: dict[str, Trial | Exception] = {}
        self.walks: list[Walk] = []

    def checks(self, toys: tuple[Toy, ...]) -> Iterator[Check]:
        first, *others = toys
        for check in OF_A_TRIAL:
            yield check.__name__, partial(self.on, first, check)
        for toy in others:
            yield f"handles_{toy.name}", partial(self.handles, toy)
        for method_check in (
            self.same_seed_same_bytes,
            self.resume_equals_uninterrupted,
            self.steps_are_finite_and_use_their_own_randomness,
            self.finishing_twice_changes_nothing,
            self.no_hook_left_after_an_error,
            self.works_without_training,
            self.works_without_data_or_says_so,
            self.budgets_are_met_or_refused,
        ):
            yield method_check.__name__, partial(method_check, first)
        if self.entry is not None:
            yield "odd_values_work_or_are_refused", partial(self.odd_values, toys[-1])
        yield "exports_to_onnx", partial(self.exports, toys[-1])

    def on(self, toy: Toy, check: Callable[[Trial], None]) -> None:
        check(self.trial(toy))

    def trial(self, toy: Toy) -> Trial:
        if toy.name not in self.trials:
            try:
                self.trials[toy.name] = trial(self.method, toy, self.budget)
            except Exception as error:  # every check that needs it shall say the same
                self.trials[toy.name] = error
        found = self.trials[toy.name]
        if isinstance(found, Exception):
            raise found
        return found

    def handles(self, toy: Toy) -> None:
        """All checks of one compression, on a hard architecture."""
        for check in OF_A_TRIAL:
            try:
                check(self.trial(toy))
            except AssertionError as error:
                raise AssertionError(f"{check.__name__}: {error}") from error

    def walked(self, toy: Toy) -> Walk:
        if not self.walks:
            self.walks.append(walk(self.method, toy, self.budget))
        return self.walks[0]

    def same_seed_same_bytes(self, toy: Toy) -> None:
        """The caller's random state has no part in the result."""
        first = saved(self.trial(toy))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(987)
            second = saved(trial(self.method, toy, self.budget))
        must(first == second, "two compressions with one seed gave files of different bytes")

    def resume_equals_uninterrupted(self, toy: Toy) -> None:
        """Saved in the middle and loaded into a fresh run, all ends in the same tensors."""
        whole = self.walked(toy).run
        for stop in (whole.steps // 4, whole.steps - 1):
            other = walk(self.method, toy, self.budget, stop=stop).run
            must(other.edits == whole.edits, f"resumed at step {stop}, other edits came out")
            same_tensors(whole.model, other.model, f"resumed at step {stop}")
            must(str(other.state) == str(whole.state), f"resumed at step {stop}, other state")

    def steps_are_finite_and_use_their_own_randomness(self, toy: Toy) -> None:
        """Gradients after before_step, losses and weights; random numbers of run.generator."""
        strange = self.walked(toy).strange
        must(not strange, "; ".join(dict.fromkeys(strange)))

    def finishing_twice_changes_nothing(self, toy: Toy) -> None:
        """A second finish does no more than measure."""
        run = self.walked(toy).run
        before, edits = copy.deepcopy(run.model), list(run.edits)
        run.finish(strict=False)
        must(run.edits == edits, "a second finish edited the model again")
        same_tensors(before, run.model, "finished twice")

    def no_hook_left_after_an_error(self, toy: Toy) -> None:
        """Data that turn bad and an exception in forward leave the model clean."""
        good = list(toy.data().batches("train", PLAN.batch))
        bad = [(_spoilt(inputs), labels) for inputs, labels in good[1:]]
        run = begin(self.method, toy, self.budget).run
        stale = Data([good[0], *bad], classes=toy.data().classes)
        _must_fail(lambda: fit(run, stale, PLAN), "training on data that are not finite")
        must(not (left := put_in(run.model)), f"after bad data this was left: {'; '.join(left)}")
        run = begin(self.method, toy, self.budget).run
        with _failing(run.model):
            _must_fail(lambda: fit(run, toy.data(), PLAN), "a model that fails in forward")
        must(not (left := put_in(run.model)), f"after an exception this was left: {left}")

    def works_without_training(self, toy: Toy) -> None:
        """By calibration alone the result is whole."""
        found = trial(self.method, toy, self.budget, train=False)
        for check in (outputs_are_finite, only_plain_modules_left, budget_is_met):
            check(found)

    def works_without_data_or_says_so(self, toy: Toy) -> None:
        """Without any data it works on weights alone, or refuses in words."""
        model = toy.model()
        try:
            start(model, self.method, self.budget, example=toy.inputs(1)).finish()
        except PliantError as error:
            must(str(error).endswith("."), f"the refusal {str(error)!r} must be a sentence")
        must(not put_in(model), f"without data this was left: {'; '.join(put_in(model))}")

    def budgets_are_met_or_refused(self, toy: Toy) -> None:
        """Every axis it saves, at a half and at next to nothing."""
        for axis in self.entry.saves if self.entry else ():
            for share in (0.5, 0.001):
                if axis == "latency":
                    continue
                budget = Budget(**{axis: share})
                try:
                    found = trial(self.method, toy, budget, train=False)
                except PliantError:
                    continue
                budget_is_met(found)

    def odd_values(self, toy: Toy) -> None:
        """Zero, negative and huge options end in a refusal or in a whole network."""
        options, wrong = plain(self.method)["options"], []
        for option, value in described.odd_values(self.method):
            odd = type(self.method)(**{**options, option: value})
            try:
                model = walk(odd, toy, self.budget).run.model.eval()
                if not all(torch.isfinite(o).all() for o in outputs(model, toy.inputs(2))):
                    wrong.append(f"{option}={value!r} gives outputs that are not finite")
            except PliantError:
                continue
            except Exception as error:
                wrong.append(f"{option}={value!r} ends in {type(error).__name__}: {error}")
        must(not wrong, f"{'; '.join(wrong)}: refuse the value in prepare")

    def exports(self, toy: Toy) -> None:
        """As ONNX the result gives equal outputs; done once for all that end in the same layers."""
        result = self.trial(toy).result
        kind = f"{toy.name} {[{**row, 'ranks': ''} for row in to_json(result.edits)]}"
        if kind in _EXPORTED and toy.given is None:
            return
        with tempfile.TemporaryDirectory() as folder:
            try:
                to_onnx(result.model, Path(folder) / "toy.onnx", toy.inputs(2))
            except MissingExtraError:
                return
        _EXPORTED.add(kind)


_EXPORTED: set[str] = set()


def _refuses(method: Method, toy: Toy, budget: Budget | None, sentence: str) -> None:
    try:
        trial(method, toy, budget)
    except PliantError as error:
        must(sentence in str(error), f"it refuses with {str(error)!r}, not with {sentence!r}")
    else:
        raise AssertionError(f"it was to refuse {toy.name} ({sentence}), but works")


def _works(method: Method, toy: Toy, budget: Budget | None) -> None:
    found = trial(method, toy, budget)
    for check in (only_plain_modules_left, outputs_are_finite, budget_is_met):
        check(found)
    strange = walk(resolve(method), toy, budget).strange
    must(not strange, "; ".join(dict.fromkeys(strange)))


def _must_fail(action: Callable[[], object], what: str) -> None:
    try:
        action()
    except Exception:  # which one is the loop's affair
        return
    raise AssertionError(f"{what} went through without an error")


def _spoilt(inputs: Any) -> Any:
    if isinstance(inputs, Tensor):
        return inputs * math.nan if inputs.is_floating_point() else inputs
    if isinstance(inputs, Mapping):
        return {name: _spoilt(value) for name, value in inputs.items()}
    return type(inputs)(_spoilt(value) for value in inputs)


@contextmanager
def _failing(model: nn.Module) -> Iterator[None]:
    """Let the third training step of a model raise, as running out of memory would."""
    forward, calls = model.forward, [0]

    def raising(*args: Any, **kwargs: Any) -> Any:
        calls[0] += model.training
        if calls[0] == 3:
            raise RuntimeError("out of memory")
        return forward(*args, **kwargs)

    model.forward = raising
    try:
        yield
    finally:
        del model.forward
