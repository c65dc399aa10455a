"""The list of methods: the only global state."""

from __future__ import annotations

import ast
import difflib
import importlib
import pkgutil
import typing
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any, Literal, TypeVar, get_args, get_origin

from pliant.errors import MethodError

Verb = Literal["compress", "recover", "cluster", "analyze"]
T = TypeVar("T", bound=type)


@dataclass(frozen=True)
class Paper:
    """Where a method was published."""

    title: str
    authors: str
    venue: str
    year: int
    url: str = ""


@dataclass(frozen=True)
class Entry:
    """A registered method.

    Args:
        name: the name it is asked for by.
        kind: the class to construct.
        paper: its source.
        saves: the budget axes it can claim (``params``, ``macs``, ``bytes``, ``latency``).
        family: the folder it lives in.
        verb: the call that runs it.
        trains: whether it needs a training loop to have its effect.
    """

    name: str
    kind: type
    paper: Paper
    saves: tuple[str, ...]
    family: str
    verb: Verb = "compress"

    @property
    def summary(self) -> str:
        """The first sentence of the method's docstring."""
        return (self.kind.__doc__ or "").strip().split("\n\n")[0].replace("\n    ", " ")


_ENTRIES: dict[str, Entry] = {}


def register(
    name: str, *, paper: Paper, saves: str = "", verb: Verb = "compress"
) -> Callable[[T], T]:
    """Enter a frozen dataclass into the list under ``name``; its family is its folder.

    Raises:
        MethodError: the name is taken, or the class is not a frozen dataclass.
    """

    def enter(kind: T) -> T:
        if name in _ENTRIES and _ENTRIES[name].kind.__qualname__ != kind.__qualname__:
            raise MethodError(f"The method name {name!r} is taken by {_ENTRIES[name].kind}.")
        if not is_dataclass(kind) or not kind.__dataclass_params__.frozen:  # type: ignore[attr-defined]
            raise MethodError(f"{kind.__name__} must be a @dataclass(frozen=True) to register.")
        family = kind.__module__.split(".")[-2] if "." in kind.__module__ else "other"
        _ENTRIES[name] = Entry(name, kind, paper, tuple(saves.split()), family, verb)
        return kind

    return enter


@cache
def _discover() -> None:
    """Import every module below ``pliant.methods`` and every third-party entry point, once."""
    package = importlib.import_module("pliant.methods")  # by name: methods stand above this line
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
    for point in entry_points(group="pliant.methods"):
        point.load()


def entries(*, family: str | None = None, verb: Verb | None = None) -> list[Entry]:
    """Return all registered methods, sorted by family and name.

    Raises:
        MethodError: there is no such family.
    """
    _discover()
    families = {entry.family for entry in _ENTRIES.values()}
    if family is not None and family not in families:
        raise MethodError(
            f"There is no family {family!r}: the families are {', '.join(sorted(families))}."
        )
    rows = sorted(_ENTRIES.values(), key=lambda entry: (entry.family, entry.name))
    return [row for row in rows if family in (None, row.family) and verb in (None, row.verb)]


def get(name: str) -> Entry:
    """Return the entry of a method.

    Raises:
        MethodError: no method has this name; the message gives the nearest names.
    """
    _discover()
    if name not in _ENTRIES:
        raise MethodError(f"There is no method {name!r}{_near(name, _ENTRIES)}.")
    return _ENTRIES[name]


def _near(name: str, known: typing.Iterable[str]) -> str:
    known = sorted(known)
    close = difflib.get_close_matches(name, known, cutoff=0.5)
    return f": did you mean {' or '.join(close)}?" if close else f": choose from {', '.join(known)}"


def entry_of(method: Any) -> Entry | None:
    """Return the entry a method instance was registered with, or None for a composed one."""
    _discover()
    return next((entry for entry in _ENTRIES.values() if entry.kind is type(method)), None)


def build(spec: str) -> Any:
    """Construct a method from ``"nrmf"`` or ``"nrmf(alpha=0.01, p=0.9)"``.

    Only literals are read; nothing is evaluated.

    Raises:
        MethodError: the text is not a name with literal options, or a name or option is unknown.

    >>> build("energy(p=0.9)").p
    0.9
    """
    try:
        node = ast.parse(spec.strip(), mode="eval").body
        if isinstance(node, ast.Name):
            return construct(node.id, {})
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.args:
            raise SyntaxError
        options = {str(word.arg): ast.literal_eval(word.value) for word in node.keywords}
    except (SyntaxError, ValueError):
        raise MethodError(
            f"Cannot read the method {spec!r}: write a name, or a name with options such as "
            'nrmf(alpha=0.01, form="tucker2").'
        ) from None
    return construct(node.func.id, options)


def construct(name: str, options: dict[str, Any]) -> Any:
    """Construct a method from its name and plain options (numbers, strings, lists).

    Raises:
        MethodError: the name or an option is unknown, or a value has the wrong type.
    """
    kind = get(name).kind
    known = [field.name for field in fields(kind)]
    for option in options:
        if option not in known:
            raise MethodError(f"{name} has no option {option!r}{_near(option, known)}.")
    hints = typing.get_type_hints(kind)
    values = {}
    for option, value in options.items():
        value = tuple(value) if isinstance(value, list) else value
        if not _is_a(value, hints[option]):
            raise MethodError(f"{name}: {option} must be {_say(hints[option])}, not {value!r}.")
        values[option] = value
    return kind(**values)


def plain(method: Any) -> dict[str, Any]:
    """Return a method as plain data, from which ``construct`` builds an equal one."""
    entry = entry_of(method)
    if entry is None:
        return dict(method.plain())  # composed methods describe their parts
    options = {f.name: getattr(method, f.name) for f in fields(method)}
    return {"name": entry.name, "options": options}


def _is_a(value: Any, hint: Any) -> bool:
    """Check a value against the simple annotations that hyper-parameters have."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        return isinstance(value, tuple) and all(_is_a(item, arguments[0]) for item in value)
    if arguments:  # a union
        return any(_is_a(value, argument) for argument in arguments)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return (
        value is None
        if hint is type(None)
        else not isinstance(hint, type) or isinstance(value, hint)
    )


def _say(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(value) for value in get_args(hint))
    return hint.__name__ if isinstance(hint, type) else str(hint)


def default(field: Any) -> Any:
    """Return the default of a dataclass field."""
    return field.default if field.default is not MISSING else field.default_factory()
