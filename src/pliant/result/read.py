"""Reads dataclasses back from plain data, and trusts none of it."""

from __future__ import annotations

import json
import math
from collections import abc
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

MOST = 2**63  # what is larger counts nothing that a network has


def plain(text: str) -> Any:
    """Read JSON; NaN and Infinity are none.

    Raises:
        ValueError: it is no JSON.
    """

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no number of JSON")

    return json.loads(text, parse_constant=refuse)


def read(kind: Any, value: Any, where: str) -> Any:
    """Return plain data as what a type hint names: dataclasses, tuples, mappings, numbers, text.

    Raises:
        TypeError: it is something else; the message says where.
    """
    origin, parts = get_origin(kind), get_args(kind)
    if is_dataclass(kind) and isinstance(value, Mapping):
        hints = _hints(kind)  # type: ignore[arg-type]
        if unknown := value.keys() - {each.name for each in fields(kind)}:
            raise TypeError(f"{where} has an unknown {min(unknown)!r}")
        found = {name: read(hints[name], item, f"{where}.{name}") for name, item in value.items()}
        return kind(**found)  # type: ignore[operator]
    if origin in (Union, UnionType):
        return read(_chosen(parts, value), value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(read(part, item, where) for part, item in _pairs(parts, value, where))
    if origin in (dict, abc.Mapping) and isinstance(value, Mapping):
        return {name: read(parts[1], item, f"{where}.{name}") for name, item in value.items()}
    if kind is Any or (origin is Literal and value in parts) or _is(kind, value):
        return value
    raise TypeError(f"{where} is not of {getattr(kind, '__name__', kind)}")


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _chosen(parts: tuple[Any, ...], value: Any) -> Any:
    """Return the part of a union that a value can be of: None, or the other one."""
    return type(None) if value is None else next(p for p in parts if p is not type(None))


def _pairs(parts: tuple[Any, ...], value: list[Any], where: str) -> Iterator[tuple[Any, Any]]:
    kinds = [parts[0]] * len(value) if parts[1:] == (...,) else list(parts)
    if len(kinds) != len(value):
        raise TypeError(f"{where} has {len(value)} items")
    return zip(kinds, value, strict=True)


def _is(kind: Any, value: Any) -> bool:
    if kind in (int, float) and isinstance(value, int | float) and not isinstance(value, bool):
        whole = kind is float or isinstance(value, int)
        return whole and math.isfinite(value) and abs(value) < (MOST if kind is int else math.inf)
    return isinstance(kind, type) and kind not in (int, float) and isinstance(value, kind)
