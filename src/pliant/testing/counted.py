"""Checks that every option counts: another value of it gives another result."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, Literal, get_args, get_origin

import numpy as np
import torch
from torch import nn

from pliant.budget import Budget
from pliant.edits import to_json
from pliant.errors import PliantError
from pliant.method import Method
from pliant.registry import In, build, entry_of, plain
from pliant.registry.options import fits, hints, ranges, settable
from pliant.testing.case import usual_budget
from pliant.testing.solved import Problem, problems, shared_solved, verb_of
from pliant.testing.toys import Toy
from pliant.testing.trial import shared_walk, unless_passed

SHOWN = 3  # networks at most
TRIES = 5  # values of one option on the first network, and two on others


def checks(
    method: Any,
    toys: Sequence[Toy],
    budget: Budget | None = None,
    refuses: Mapping[str, str] | None = None,
    variants: Sequence[str] = (),
    witnesses: Mapping[str, Callable[[], None]] | None = None,
) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield a check for each option of a method.

    Args:
        method: of any verb, as it is run.
        toys: networks to show it.
        budget: that it is run with, seven tenths of the first axis it saves if None; without any
            it is run too.
        refuses: toys or problems that it is not shown.
        variants: specs in which options may count that do not by default.
        witnesses: tests that fail when an option is ignored, for those that count nowhere here.
    """
    shown: Sequence[Any] = toys
    if isinstance(method, Method):
        entry = entry_of(method)
        budget = budget or usual_budget(entry.saves if entry else ())
    else:
        shown = problems(verb_of(method), tuple(toys))
    kept = [one for one in shown if one.name not in (refuses or {})][:SHOWN]
    methods = [method, *map(build, variants)]
    for field in settable(type(method)):
        own = (witnesses or {}).get(field.name)  # of several options perhaps
        here = partial(counts, methods, field.name, kept, budget)
        yield f"{field.name}_counts", partial(unless_passed, own) if own else here


def counts(
    methods: Sequence[Any],
    option: str,
    shown: Sequence[Toy | Problem],
    budget: Budget | None = None,
) -> None:
    """Find another value of an option that gives another result; a refusal is none.

    Args:
        methods: of one class, with options that are tried one after the other.
        option: the name of one.
        shown: networks or problems.
        budget: on all of them; on the first none too.
    """
    if not any(differs(*pair) for pair in pairs(methods, option, shown, budget)):
        raise AssertionError(
            f"{option} changes nothing: all values that were tried give one result. Read it, or "
            "name a variant in which it counts, or a test as its witness."
        )


def differs(method: Any, other: Any, at: Toy | Problem, budget: Budget | None) -> bool:
    """Whether both methods work, and leave different results."""
    usual = result(method, at, budget)
    found = result(other, at, budget) if usual else []
    return bool(found) and not same(found, usual)


def pairs(
    methods: Sequence[Any], option: str, shown: Sequence[Toy | Problem], budget: Budget | None
) -> Iterator[tuple[Any, Any, Toy | Problem, Budget | None]]:
    """Yield a method, the same with another value of an option, what to show both, and a budget.

    What shows it most often comes first: an option that counts does so with nearly any value, but
    some do in a variant only, or without a budget, and a few on another network than the first.
    """
    for places in (shown[:1], shown[1:]):
        first = places == shown[:1]
        rows = [
            (method, at, limit, list(islice(_methods(method, option, at), TRIES if first else 2)))
            for at in places
            for method in methods
            for limit in dict.fromkeys([budget, None] if first else [budget])
        ]
        for number in range(TRIES):
            for method, at, limit, found in rows:
                if number < len(found):
                    yield method, found[number], at, limit


def _methods(method: Any, option: str, at: Toy | Problem) -> Iterator[Any]:
    """Yield a method with other values of one option."""
    options = plain(method)["options"]
    for value in others(method, option, _names(at.model()) if isinstance(at, Toy) else []):
        yield type(method)(**_tuples({**options, option: value}))


def _names(model: nn.Module) -> list[str]:
    """Name the modules of a model, rows of others first."""
    named = [(name, module) for name, module in model.named_modules() if name]
    rows = [name for name, module in named if isinstance(module, nn.Sequential)][:2]
    return rows + [name for name, _ in named if name not in rows]


def result(method: Any, at: Toy | Problem, budget: Budget | None) -> list[Any]:
    """Return what a method leaves, as text and tensors; nothing if it refuses.

    That is the network, the edits, the history and the state of the run, and how far its random
    numbers went.
    """
    try:
        if isinstance(method, Method):
            run = shared_walk(method, at, budget).run
            drawn = run.generator.get_state().sum().item()
            trace = to_json(run.edits), run.log, run.state, drawn
            return [str(trace), *_numbers(run.model)]
        found = shared_solved(method, at)
    except PliantError:
        return []
    rows = {k: v for k, v in found.plain().items() if k not in ("seconds", "method")}
    return [str(rows), *map(np.asarray, found.values.values())]


def _numbers(model: nn.Module) -> list[Any]:
    return [v.numpy() for v in model.state_dict().values() if isinstance(v, torch.Tensor)]


def same(found: Sequence[Any], usual: Sequence[Any]) -> bool:
    """Whether two results are equal, bit by bit."""
    return len(found) == len(usual) and all(
        a == b if isinstance(a, str) else np.array_equal(a, b, equal_nan=a.dtype.kind in "fc")
        for a, b in zip(found, usual, strict=True)
    )


def others(method: Any, option: str, layers: Sequence[str] = ()) -> Iterator[Any]:
    """Yield other values that an option takes: those declared, and some that are near.

    Args:
        method: has the present value.
        option: its name.
        layers: names for options that hold patterns of them.
    """
    kind: type = type(method)
    hint, now = hints(kind)[option], getattr(method, option)
    seen = [now]
    for value in (*_declared(hint, now), *_near(now), *_patterns(now, layers)):
        if value not in seen and fits(value, hint):
            seen.append(value)
            yield value


def _declared(hint: Any, now: Any) -> Iterator[Any]:
    """What the annotation names: choices, both answers, ends of ranges."""
    if isinstance(now, bool):
        yield not now
    for part in (hint, *get_args(hint)):
        if get_origin(part) is Literal:
            yield from get_args(part)
    if now is None:
        for kind, span in ranges(hint):
            yield from (kind(v) for v in _inside(span))


def _inside(span: In) -> Iterator[float]:
    low = span.low if math.isfinite(span.low) else 0
    high = span.high if math.isfinite(span.high) else low + 2
    yield from ((low + high) / 2, low + 1, low, high)


def _near(now: Any) -> Iterator[Any]:
    """Multiples of a number, its neighbours; of the numbers of a tuple all at once."""
    if isinstance(now, bool) or not isinstance(now, int | float | tuple):
        return
    if isinstance(now, tuple):
        if not now:
            yield (2.0, 1.0)
        numbers = now and all(isinstance(v, int | float) for v in now)
        rows = [[*_near(v)] for v in now] if numbers else []
        yield from zip(*rows, strict=False)
        yield from (now[:-1], now[::-1]) if now else ()
        return
    numbers = (1, 4, 2 * now, now // 2, now + 1, now - 1, 0)  # what differs most comes first
    if isinstance(now, float):
        numbers = (0.25, 10 * now, 0.75, 2 * now, now / 2, 0.0, 1.0)
    yield from map(type(now), numbers)


def _patterns(now: Any, layers: Sequence[str]) -> Iterator[tuple[str, ...]]:
    if isinstance(now, tuple) and all(isinstance(one, str) for one in now[:1]):
        yield from ((name,) for name in (*layers[:4], *layers[-1:]))


def _tuples(options: Mapping[str, Any]) -> dict[str, Any]:
    return {o: tuple(v) if isinstance(v, list) else v for o, v in options.items()}
