"""Checks that run nothing: what a method says of itself, and how it is constructed."""

from __future__ import annotations

import json
import math
from dataclasses import MISSING, FrozenInstanceError, fields
from typing import Any

from pliant.budget import AXES
from pliant.errors import MethodError, PliantError
from pliant.method import Method
from pliant.registry import Entry, In, construct, options, plain
from pliant.registry.options import hints, ranges

HUGE, TINY = 10**6, 1e-6
PATIENCE = 1000  # of steps, rounds, draws


def must(holds: Any, sentence: str) -> None:
    """Fail a check, also where Python runs without assertions."""
    if not holds:
        raise AssertionError(sentence)


def metadata_complete(entry: Entry) -> None:
    """Paper, summary, and a word on every option."""
    paper, name = entry.paper, entry.name
    for part in ("title", "authors", "venue"):
        must(getattr(paper, part).strip(), f"{name}: the paper's {part} is empty")
    must(1900 < paper.year < 2100, f"{name}: the paper's year is {paper.year}")
    known = not paper.url or paper.url.startswith("https://")  # some papers lie nowhere
    must(known, f"{name}: the paper's url must begin with https://")
    written = not (entry.kind.__doc__ or "").startswith(f"{entry.kind.__name__}(")
    must(written and entry.summary.endswith("."), f"{name}: the docstring needs a first sentence")
    for row in options(entry):
        must(row.text, f"{name}: the option {row.name} needs a comment after its default")


def defaults_construct(entry: Entry) -> None:
    """Every option has a default; two methods with equal options are equal."""
    for field in fields(entry.kind):
        none = field.default is MISSING and field.default_factory is MISSING
        must(not none, f"{entry.name}: the option {field.name} needs a default")
    must(entry.kind() == entry.kind(), f"{entry.name}: two defaults must be equal")
    must(construct(entry.name, {}) == entry.kind(), f"{entry.name}: its name must build it")
    if entry.verb == "compress":
        *above, _ = entry.kind.__mro__[1:]
        own = [kind for kind in above if not kind.__module__.startswith("pliant.families.")]
        must(own == [Method], f"{entry.name} must derive from Method, or from a family's class")
    else:
        must(entry.kind.__mro__[1:] == (object,), f"{entry.name} must derive from nothing")


def is_frozen(method: Any) -> None:
    """Options cannot be assigned, so no state can be kept on the method."""
    for name in [field.name for field in fields(method)] + ["something"]:
        try:
            setattr(method, name, getattr(method, name, 0))
        except (FrozenInstanceError, AttributeError, TypeError):
            continue
        raise AssertionError(f"{type(method).__name__}.{name} could be assigned")


def comes_back_from_json(method: Any) -> None:
    """As plain data and through JSON it comes back equal."""
    data = plain(method)
    must(construct(data["name"], data["options"]) == method, f"{data} does not build an equal one")
    text = json.loads(json.dumps(data))
    must(construct(text["name"], text["options"]) == method, f"{text} does not build an equal one")


def unknown_option_is_named(entry: Entry) -> None:
    """A misspelt option is refused with its name and the nearest known one."""
    known = [field.name for field in fields(entry.kind)]
    wrong = f"{known[0]}x" if known else "strength"
    try:
        construct(entry.name, {wrong: 1})
    except MethodError as error:
        must(wrong in str(error), f"{entry.name}: {error} does not name {wrong}")
        must(not known or known[0] in str(error), f"{error} does not name {known[:1]}")
    else:
        raise AssertionError(f"{entry.name} took the unknown option {wrong}")


def axes_are_known(entry: Entry) -> None:
    """What a compression method saves are axes that a budget has; no other method saves."""
    known = set(AXES) if entry.verb == "compress" else set()
    must(set(entry.saves) <= known, f"{entry.name} saves {entry.saves}, a budget has {known}")


def odd_values(method: Any) -> list[tuple[str, Any]]:
    """Numbers that nobody means, for every option that takes numbers and accepts them.

    They are the ends of the ranges that options declare; zero, negative and huge where none is.
    """
    kind: type = type(method)
    name, known, found = plain(method)["name"], hints(kind), []
    for field in fields(method):
        number = type(getattr(method, field.name))
        odd = [end for declared in ranges(known[field.name]) for end in _ends(*declared)]
        if not odd and number in (int, float):
            odd = [number(0), number(-1), number(HUGE)]
        found += [(field.name, value) for value in odd]
    return [(option, value) for option, value in found if _accepted(name, option, value)]


def _ends(kind: type, declared: In) -> list[Any]:
    """The ends of a range, or what is next to them where they do not belong to it."""
    step = 1 if kind is int else TINY
    low = declared.low if math.isfinite(declared.low) else -HUGE
    high = declared.high if math.isfinite(declared.high) else HUGE
    ends = [low if low in declared else low + step, high if high in declared else high - step]
    if kind is int and PATIENCE < ends[1] < HUGE:
        ends.pop()  # a range that ends here ends where nobody waits any longer
    return [kind(end) for end in ends]


def _accepted(name: str, option: str, value: Any) -> bool:
    try:
        construct(name, {option: value})
    except PliantError:
        return False
    return True
