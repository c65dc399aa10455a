"""One generator of checks for every method, those of other packages too."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from itertools import chain
from typing import Any

import torch
from torch import nn

from pliant.budget import Budget
from pliant.data import Data
from pliant.drivers.loop import fit
from pliant.edits import Edit
from pliant.errors import MethodError, PliantError
from pliant.method import Method
from pliant.registry import build, entry_of, plain
from pliant.run import start
from pliant.testing import counted, described, solved
from pliant.testing.broken import failing, must_fail, spoilt
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
from pliant.testing.exported import exports
from pliant.testing.toys import SPECIAL, TOYS, Toy
from pliant.testing.trial import (
    PLAN,
    Trial,
    Walk,
    begin,
    outputs,
    put_in,
    resumed,
    shared_trial,
    shared_walk,
    trial,
    unless_passed,
)

Check = tuple[str, Callable[[], None]]


def check_method(
    method: Any,
    model: nn.Module | None = None,
    data: Data | None = None,
    *,
    budget: Budget | str | None = None,
    refuses: Mapping[str, str] | None = None,
    fails: Mapping[str, str] | None = None,
    variants: Sequence[str] = (),
    witnesses: Mapping[str, Callable[[], None]] | None = None,
) -> None:
    """Run every check that applies to a method, and say all that is wrong with it.

    Args:
        method: a method of any verb, its name or a spec; it need not be registered.
        model: checked on this network instead of the toys; ``data`` is needed then.
        data: a few samples for the network: 32 are plenty.
        budget: seven tenths of the first axis it saves if None.
        refuses: the toys or problems that it must refuse, each with a part of the sentence it
            says then; all others must work. None takes any refusal in a sentence that comes
            before any work, as long as one toy works.
        fails: names of checks that are known to fail, and why.
        variants: specs in which options count that change nothing by default.
        witnesses: tests that fail when an option is ignored that changes nothing here. With these,
            be there none, or with variants, every option must count.

    Raises:
        AssertionError: a check fails, or one that was to fail does not; one line for each.
        MethodError: a model came without data.
    """
    built = build(method) if isinstance(method, str) else method
    bounds = Budget.parse(budget) if isinstance(budget, str) else budget
    toys = tuple(TOYS.values()) if model is None else (_yours(model, data),)
    wrong = []
    asked = variants or witnesses is not None
    options = counted.checks(built, toys, bounds, refuses, variants, witnesses) if asked else ()
    for name, check in chain(checks(built, toys, bounds, refuses), options):
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
    method, toys, bounds = case.built(), case.shown(), case.bounds()
    yield from checks(method, toys, bounds, case.refuses)
    for spec in case.variants:
        variant = build(spec)
        if isinstance(variant, Method):
            yield f"works_as_{spec}", Suite(variant, toys, bounds, case.refuses).works
        else:
            yield f"works_as_{spec}", partial(solved.works, variant, toys, case.refuses)
    for own in case.own:
        yield own.__name__.removeprefix("_"), partial(unless_passed, own)
    more = case.variants, case.witnesses
    yield from counted.checks(method, toys, bounds, case.refuses, *more)


def checks(
    method: Any,
    toys: tuple[Toy, ...],
    budget: Budget | None = None,
    refuses: Mapping[str, str] | None = None,
) -> Iterator[Check]:
    """Yield the checks that apply to a method: of its entry, its construction, its work.

    Args:
        method: of any verb; one that does not compress gets the checks of its own verb.
        toys: networks to show it; a method that recovers or clusters has problems of its own.
        budget: seven tenths of the first axis it saves if None.
        refuses: what it must refuse, and how: see `check_method`.
    """
    yield from _described(method)
    if not isinstance(method, Method):
        yield from solved.checks(method, toys, refuses)
    elif toys:
        yield from Suite(method, toys, budget, refuses).checks()


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


class Suite:
    """The checks of one compression method, and the toys that they are made on.

    Args:
        method: whose checks these are.
        toys: the first one that works gets the thorough checks, the smallest the slow ones.
        budget: seven tenths of the first axis it saves if None.
        refuses: what it must refuse, and how; None takes any clear refusal: see `check_method`.
    """

    def __init__(
        self,
        method: Method,
        toys: tuple[Toy, ...],
        budget: Budget | None,
        refuses: Mapping[str, str] | None,
    ) -> None:
        self.method, self.entry, self.refuses = method, entry_of(method), refuses
        self.budget = budget or usual_budget(self.entry.saves if self.entry else ())
        self.toys = tuple(toy for toy in toys if toy.name not in (refuses or {}))
        self.refused = tuple(toy for toy in toys if toy not in self.toys)

    def checks(self) -> Iterator[Check]:
        """Yield all checks of a compression."""
        for toy in self.refused:
            yield f"refuses_{toy.name}", partial(self.must_refuse, toy)
        if not self.toys:
            return
        for check in OF_A_TRIAL:
            yield check.__name__, partial(self.on_the_first, check)
        for toy in self.toys[1:]:
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
            yield method_check.__name__, partial(self.unless_passed, method_check)
        if self.entry is not None:
            yield "odd_values_work_or_are_refused", partial(self.unless_passed, self.odd_values)
        yield "exports_to_onnx", self.exports

    def unless_passed(self, check: Callable[[], None]) -> None:
        """One check, unless it has passed in this process on the same toy."""
        toy = self.smallest if check == self.odd_values else self.first
        self._once(check, check.__name__, toy)

    def look(self, check: Callable[[Trial], None], toy: Toy) -> None:
        """Look at a compression of a toy, unless this check has done so in this process."""
        self._once(lambda: check(self.trial(toy)), check.__name__, toy)

    def _once(self, check: Callable[[], None], name: str, toy: Toy) -> None:
        given = type(self.method), repr((self.method, self.budget))
        unless_passed(check, name, *given, toy)

    @cached_property
    def first(self) -> Toy:
        """The first toy that it takes; a special one if it refuses all that are ordinary."""
        spare = SPECIAL.values() if self.toys == tuple(TOYS.values()) else ()
        for toy in (*self.toys, *spare):
            if self.refusal(toy) is None:
                return toy
        said = self.refusal(self.toys[0])
        raise AssertionError(f"it refuses every network that it is shown, with {said!r}")

    @cached_property
    def smallest(self) -> Toy:
        """The network with the fewest parameters that it takes, of those that it edits if any."""
        taken = [toy for toy in self.toys if self.refusal(toy) is None] or [self.first]
        edited = [toy for toy in taken if self.edits(toy)]
        sizes = {toy: sum(p.numel() for p in toy.model().parameters()) for toy in edited or taken}
        return min(sizes, key=lambda toy: (sizes[toy], toy.name))

    def edits(self, toy: Toy) -> Sequence[Edit]:
        """Return what was done to a toy; nothing if that failed, which other checks say."""
        try:
            return self.trial(toy).result.edits
        except Exception:
            return ()

    def refusal(self, toy: Toy) -> str | None:
        """Return the sentence by which it refuses a toy before any work; None if there is none."""
        if self.refuses is not None:
            return None
        try:
            self.trial(toy)
        except PliantError:
            try:
                begin(self.method, toy, self.budget)
            except PliantError as error:
                must(str(error).endswith("."), f"the refusal {str(error)!r} must be a sentence")
                return str(error)
        return None

    def trial(self, toy: Toy, budget: Budget | None = None, *, train: bool = True) -> Trial:
        """Compress a toy, with the usual budget if none is named; to be read only."""
        return shared_trial(self.method, toy, budget or self.budget, train=train)

    def must_refuse(self, toy: Toy) -> None:
        """With the words that were announced."""
        sentence = (self.refuses or {})[toy.name]
        try:
            self.trial(toy)
        except PliantError as error:
            must(sentence in str(error), f"it refuses with {str(error)!r}, not with {sentence!r}")
        else:
            raise AssertionError(f"it was to refuse {toy.name} ({sentence}), but works")

    def on_the_first(self, check: Callable[[Trial], None]) -> None:
        """One check of one compression."""
        self.look(check, self.first)

    def handles(self, toy: Toy) -> None:
        """All checks of one compression, on a hard architecture."""
        if self.refusal(toy) is not None:
            return
        for check in OF_A_TRIAL:
            try:
                self.look(check, toy)
            except AssertionError as error:
                raise AssertionError(f"{check.__name__}: {error}") from error

    def works(self) -> None:
        """The short form of all checks, for variants."""
        found = self.trial(self.first)
        for check in (only_plain_modules_left, outputs_are_finite, budget_is_met):
            check(found)
        self.steps_are_finite_and_use_their_own_randomness()

    def walk(self) -> Walk:
        """Train the first toy by hand; to be read only."""
        return shared_walk(self.method, self.first, self.budget)

    def same_seed_same_bytes(self) -> None:
        """The caller's random state has no part in the result."""
        first = saved(self.trial(self.first))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(987)
            second = saved(trial(self.method, self.first, self.budget))
        must(first == second, "two compressions with one seed gave files of different bytes")

    def resume_equals_uninterrupted(self) -> None:
        """Saved in the middle and loaded into a fresh run, all ends in the same tensors."""
        whole, saved = self.walk().run, self.walk().saved
        must(saved, "no step was taken at which it could be saved")
        for stop, kept in saved.items():
            other = resumed(kept, self.method, self.first, self.budget).run
            must(other.edits == whole.edits, f"resumed at step {stop}, other edits came out")
            same_tensors(whole.model, other.model, f"resumed at step {stop}")
            must(str(other.state) == str(whole.state), f"resumed at step {stop}, other state")

    def steps_are_finite_and_use_their_own_randomness(self) -> None:
        """Gradients after before_step, losses and weights; random numbers of run.generator."""
        strange = self.walk().strange
        must(not strange, "; ".join(dict.fromkeys(strange)))

    def finishing_twice_changes_nothing(self) -> None:
        """A second finish does no more than measure."""
        before = self.walk().run
        run = copy.deepcopy(before)
        run.finish(strict=False)
        must(run.edits == before.edits, "a second finish edited the model again")
        same_tensors(before.model, run.model, "finished twice")

    def no_hook_left_after_an_error(self) -> None:
        """Data that turn bad and an exception in forward leave the model clean."""
        data = self.first.data()
        good = list(data.batches("train", PLAN.batch))
        bad = [(spoilt(inputs), labels) for inputs, labels in good[1:]]
        run = begin(self.method, self.first, self.budget).run
        stale = Data([good[0], *bad], classes=data.classes)
        must_fail(lambda: fit(run, stale, PLAN), "training on data that are not finite")
        must(not (left := put_in(run.model)), f"after bad data this was left: {'; '.join(left)}")
        run = begin(self.method, self.first, self.budget).run
        with failing(run.model):
            must_fail(lambda: fit(run, data, PLAN), "a model that fails in forward")
        must(not (left := put_in(run.model)), f"after an exception this was left: {left}")

    def works_without_training(self) -> None:
        """By calibration alone the result is whole."""
        found = self.trial(self.first, train=False)
        for check in (outputs_are_finite, only_plain_modules_left, budget_is_met):
            check(found)

    def works_without_data_or_says_so(self) -> None:
        """Without any data it works on weights alone, or refuses in words."""
        model = self.first.model()
        try:
            start(model, self.method, self.budget, example=self.first.inputs(1)).finish()
        except PliantError as error:
            must(str(error).endswith("."), f"the refusal {str(error)!r} must be a sentence")
        must(not put_in(model), f"without data this was left: {'; '.join(put_in(model))}")

    def budgets_are_met_or_refused(self) -> None:
        """Every axis it saves, at a half and at next to nothing."""
        for axis in self.entry.saves if self.entry else ():
            for share in (0.5, 0.001):
                if axis == "latency":
                    continue
                try:
                    found = self.trial(self.first, Budget(**{axis: share}), train=False)
                except PliantError:
                    continue
                budget_is_met(found)

    def odd_values(self) -> None:
        """Options at the ends of their ranges, or zero, negative and huge: refused or whole."""
        toy, options, wrong = self.smallest, plain(self.method)["options"], []
        for option, value in described.odd_values(self.method):
            odd = type(self.method)(**{**options, option: value})
            try:
                model = shared_walk(odd, toy, self.budget).run.model
                found = outputs(copy.deepcopy(model).eval(), toy.inputs(2))
                if not all(torch.isfinite(output).all() for output in found):
                    wrong.append(f"{option}={value!r} gives outputs that are not finite")
            except Exception as error:
                cause = error.__cause__ if isinstance(error.__cause__, ArithmeticError) else error
                if not isinstance(cause, PliantError):
                    wrong.append(f"{option}={value!r} ends in {type(cause).__name__}: {cause}")
        must(not wrong, f"{'; '.join(wrong)}: refuse the value in prepare")

    def exports(self) -> None:
        """As ONNX the result gives equal outputs."""
        exports(self.trial(self.smallest))
