"""What a method can be told: the types and ranges that its fields declare, checked and in words."""

from __future__ import annotations

import inspect
import math
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields
from functools import cache
from typing import Annotated, Any, Literal, get_args, get_origin


@dataclass(frozen=True)
class In:
    """The range of an option that takes numbers: ``share: Annotated[float, In(0, 1)] = 0.5``.

    Args:
        low: its lower end.
        high: its upper end.
        open: ends that do not belong to it. Infinity never does, nor does NaN.

    >>> 1 in In(0, 1), 1 in In(0, 1, open="high"), str(In(0, open="low"))
    (True, False, 'above 0')
    """

    low: float
    high: float = math.inf
    open: Literal["", "low", "high", "both"] = ""

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self._opens("low") else value >= self.low
        return above and (value < self.high if self._opens("high") else value <= self.high)

    def __str__(self) -> str:
        """Return it as it is said after a type, or after "must be"."""
        if not self.open and math.isfinite(self.low) and math.isfinite(self.high):
            return f"in {_number(self.low)}..{_number(self.high)}"
        parts = []
        if math.isfinite(self.low):
            parts.append(f"{'above' if self._opens('low') else 'of at least'} {_number(self.low)}")
        if math.isfinite(self.high):
            parts.append(f"{'below' if self._opens('high') else 'at most'} {_number(self.high)}")
        return " and ".join(parts) or "that is finite"

    def _opens(self, end: Literal["low", "high"]) -> bool:
        return self.open in (end, "both") or not math.isfinite(getattr(self, end))


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


@dataclass(frozen=True)
class OptionRow:
    """One option of a method, in words.

    Args:
        name: as it is written in a spec.
        type: what it takes, with its range.
        default: its value.
        text: what it does: the comment behind the field, or above it.
    """

    name: str
    type: str
    default: Any
    text: str


def rows(kind: type) -> list[OptionRow]:
    """Return the options of a method in order; descriptions are the comments at its fields."""
    known, comments = hints(kind), _comments(kind)
    return [
        OptionRow(f.name, say(known[f.name]), default(f), comments.get(f.name, ""))
        for f in settable(kind)
    ]


def settable(kind: type) -> list[Field[Any]]:
    """Return the fields of a method that are options: a class may fix one that it inherits."""
    return [field for field in fields(kind) if field.init]


def _comments(kind: type) -> dict[str, str]:
    """What stands at each field of a class, those it inherits included."""
    return {k: v for each in reversed(kind.__mro__[:-1]) for k, v in _own_comments(each).items()}


def _own_comments(kind: type) -> dict[str, str]:
    """What stands behind each field of this very class, or in lines of their own above it."""
    try:
        lines = inspect.getsource(kind).splitlines()
    except (OSError, TypeError):  # a class typed into a console
        return {}
    found: dict[str, str] = {}
    above: list[str] = []
    for line in lines:
        alone = re.match(r" +#\s*(.+?)\s*$", line)
        field = re.match(r" +(\w+): [^#]*(?:# type: \S+)?\s*(?:#\s*(.+?)\s*)?$", line)
        if field and (text := field[2] or " ".join(above)):
            found.setdefault(field[1], text)
        above = [*above, alone[1]] if alone else []
    return found


def written(value: Any) -> str:
    """Return a default as it is written in Python."""
    return f'"{value}"' if isinstance(value, str) else repr(value)


def default(field: Any) -> Any:
    """Return the default of a dataclass field."""
    return field.default if field.default is not MISSING else field.default_factory()


@cache
def hints(kind: type) -> dict[str, Any]:
    """Return the annotations of a class by field, with the ranges they declare.

    Raises:
        NameError: one of them names what its module does not have, or has for type checkers only.
    """
    return typing.get_type_hints(kind, include_extras=True)


def fault(method: Any) -> str:
    """Say which option is not what its field declares; nothing if all are."""
    kind: type = type(method)
    try:
        known = hints(kind)
    except NameError:  # a class that is not registered may import names for type checkers only
        return ""
    for field in fields(method):
        value, hint = getattr(method, field.name), known[field.name]
        if not fits(value, hint):
            return f"{field.name} must be {say(hint)}, not {value!r}"
    return ""


def fits(value: Any, hint: Any) -> bool:
    """Check a value against the simple annotations that options have, ranges included."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        ranges = [mark for mark in arguments[1:] if isinstance(mark, In)]
        return fits(value, arguments[0]) and all(value in one for one in ranges)
    if origin is Literal:
        return any(value == one and type(value) is type(one) for one in arguments)
    if origin is tuple:
        if not isinstance(value, tuple | list):
            return False
        same = arguments[-1] is Ellipsis
        kinds = arguments[:1] * len(value) if same else arguments
        return len(kinds) == len(value) and all(map(fits, value, kinds))
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, argument) for argument in arguments)
    if hint in (int, float):
        kinds = (int,) if hint is int else (int, float)
        return isinstance(value, kinds) and not isinstance(value, bool)
    if hint is None or hint is types.NoneType:
        return value is None
    kind = origin or hint
    return kind is Any or not isinstance(kind, type) or isinstance(value, kind)


def say(hint: Any) -> str:
    """Return an annotation in words a user knows: ``float in 0..1``, ``one of "a", "b"``."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        ranges = [str(mark) for mark in arguments[1:] if isinstance(mark, In)]
        return " ".join([say(arguments[0]), *ranges])
    if origin is Literal:
        return "one of " * (len(arguments) > 1) + ", ".join(map(written, arguments))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(say(argument) for argument in arguments)
    if origin is tuple:
        kinds = [say(argument) for argument in arguments if argument is not Ellipsis]
        return f"a list of {kinds[0]}" if Ellipsis in arguments else f"({', '.join(kinds)})"
    if hint is types.NoneType:
        return "None"
    return hint.__name__ if isinstance(hint, type) else str(hint)


def ranges(hint: Any) -> Iterator[tuple[type, In]]:
    """Yield the kinds of numbers that an annotation takes by themselves, each with its range."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for argument in arguments:
            yield from ranges(argument)
    elif origin is Annotated and arguments[0] in (int, float):
        yield from ((arguments[0], mark) for mark in arguments[1:] if isinstance(mark, In))
