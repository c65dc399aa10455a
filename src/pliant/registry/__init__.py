"""The list of all methods, by name: the package's only global state."""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import keyword
import pkgutil
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, is_dataclass
from functools import cache, singledispatch
from importlib.metadata import entry_points
from typing import Any, Literal, TypeVar

from pliant.budget import AXES
from pliant.errors import MethodError, must_be
from pliant.registry.options import In, OptionRow, fault, rows, settable

__all__ = [
    "CALLS",
    "Entry",
    "In",
    "OptionRow",
    "Paper",
    "Verb",
    "build",
    "check_options",
    "check_own",
    "construct",
    "entries",
    "entry_of",
    "get",
    "of_verb",
    "options",
    "other_verb",
    "plain",
    "register",
]

Verb = Literal["compress", "recover", "cluster", "analyze"]
T = TypeVar("T", bound=type)

CALLS: dict[Verb, str] = {
    "compress": "model, data",
    "recover": "x, known",
    "cluster": "x, groups",
    "analyze": "model, data",
}
"""What each verb is called with, before the method."""


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
        renamed: options that had another name before, by that name.
    """

    name: str
    kind: type
    paper: Paper
    saves: tuple[str, ...]
    family: str
    verb: Verb = "compress"
    renamed: Mapping[str, str] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """The first paragraph of the method's docstring, on one line."""
        return " ".join(inspect.cleandoc(self.kind.__doc__ or "").split("\n\n")[0].split())


_ENTRIES: dict[str, Entry] = {}


def register(
    name: str,
    *,
    paper: Paper,
    saves: str = "",
    verb: Verb = "compress",
    renamed: Mapping[str, str] | None = None,
) -> Callable[[T], T]:
    """Enter a frozen dataclass into the list under ``name``; its family is its folder.

    Args:
        name: what it is asked for by: an identifier, since specs are read as calls.
        paper: its source.
        saves: the axes of a budget that it can meet, with blanks between them.
        verb: the call that runs it.
        renamed: options that had another name before, by that name: specs may go on using it.

    Raises:
        MethodError: the name is taken or no identifier, an axis is unknown, or the class is not
            a frozen dataclass or cannot do what the verb says.
    """
    if not name.isidentifier() or keyword.iskeyword(name):
        raise MethodError(f"A method's name must be a Python identifier, not {name!r}.")
    if unknown := set(saves.split()) - set(AXES):
        raise MethodError(
            f"{name} cannot save {', '.join(sorted(unknown))}: the axes are {', '.join(AXES)}."
        )

    def enter(kind: T) -> T:
        taken = _ENTRIES[name].kind if name in _ENTRIES else kind
        if (taken.__module__, taken.__qualname__) != (kind.__module__, kind.__qualname__):
            raise MethodError(
                f"The method name {name!r} is taken by {taken.__module__}.{taken.__qualname__}: "
                "choose another."
            )
        if not is_dataclass(kind) or not kind.__dataclass_params__.frozen:  # type: ignore[attr-defined]
            raise MethodError(f"{kind.__name__} must be a @dataclass(frozen=True) to register.")
        if verb != "compress" and not callable(getattr(kind, verb, None)):
            raise MethodError(f"{kind.__name__} must have a method {verb}(...) to register for it.")
        family = kind.__module__.split(".")[-2] if "." in kind.__module__ else "other"
        old = dict(renamed or {})
        _ENTRIES[name] = Entry(name, kind, paper, tuple(saves.split()), family, verb, old)
        return kind

    return enter


@cache
def _discover() -> None:
    """Import every module below ``pliant.methods`` and every third-party entry point, once."""
    package = importlib.import_module("pliant.methods")  # by name: methods stand above this line
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
    for point in entry_points(group="pliant.methods"):
        try:
            point.load()
        except Exception as error:  # a foreign module may fail in any way
            raise MethodError(
                f"The methods of {point.value} cannot be imported ({type(error).__name__}: "
                f"{error}): repair or uninstall the package that brings the entry point "
                f"{point.name!r}."
            ) from error


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


def _near(name: str, known: Iterable[str]) -> str:
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
    must_be(str, "A method's name", spec, MethodError, 'text such as "nrmf(p=0.9)"')
    try:
        node = ast.parse(spec.strip(), mode="eval").body
        if isinstance(node, ast.Name):
            node = ast.Call(node, [], [])
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.args:
            raise SyntaxError
        options = {word.arg or "**": ast.literal_eval(word.value) for word in node.keywords}
        if len(options) < len(node.keywords):
            raise SyntaxError
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        raise MethodError(
            f"Cannot read the method {spec!r}: write a name, or a name with options such as "
            'nrmf(alpha=0.01, form="tucker2").'
        ) from None
    return construct(node.func.id, options)


def construct(name: str, options: dict[str, Any]) -> Any:
    """Construct a method from its name and plain options (numbers, strings, lists).

    Raises:
        MethodError: the name or an option is unknown, or a value has the wrong type or is out of
            its range.
    """
    kind, options = get(name).kind, _by_new_names(get(name), options)
    known = [field.name for field in settable(kind)]
    for option in options:
        if option not in known:
            raise MethodError(f"{name} has no option {option!r}{_near(option, known)}.")
    values = {o: tuple(v) if isinstance(v, list) else v for o, v in options.items()}
    method = kind(**values)
    check_options(method)
    return method


@singledispatch
def check_options(method: Any) -> None:
    """Refuse options that are not what their fields declare, of the parts of a method too.

    Specs are checked as they are read, instances where they are used: constructors do nothing.

    Raises:
        MethodError: names the option, the type and the range it must have, and what came.
    """
    check_own(method)


def check_own(method: Any) -> None:
    """Refuse options of a method itself that are not what its fields declare.

    Raises:
        MethodError: as `check_options`.
    """
    if said := fault(method):
        entry = entry_of(method)
        raise MethodError(f"{entry.name if entry else type(method).__name__}: {said}.")


def options(entry: Entry) -> list[OptionRow]:
    """Return the options of a method, in order and in words."""
    return rows(entry.kind)


def _by_new_names(entry: Entry, options: Mapping[str, Any]) -> dict[str, Any]:
    """Give options that go by an old name their new one, and say so."""
    values = {}
    for option, value in options.items():
        name = entry.renamed.get(option, option)
        if name != option and name in options:
            raise MethodError(f"{entry.name}: {option} is now called {name}: give one of them.")
        if name != option:
            said = f"{entry.name}: the option {option} is now called {name}: use this name."
            warnings.warn(said, DeprecationWarning, stacklevel=_calls_within() + 1)
        values[name] = value
    return values


def _calls_within() -> int:
    """Count the calls of this package below the one from outside, to warn where that one is."""
    frame, calls = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("pliant."):
        frame, calls = frame.f_back, calls + 1
    return calls - 1


def of_verb(method: Any, verb: Verb) -> Any:
    """Return a method that recovers, clusters or analyzes, from a name, a spec or an instance.

    Raises:
        MethodError: it is unknown, belongs to another verb, cannot do it, or an option is out of
            its range.
    """
    built = build(method) if isinstance(method, str) else method
    entry = entry_of(built)
    if entry is not None and entry.verb != verb:
        raise other_verb(entry, verb)
    whole = is_dataclass(built) and not isinstance(built, type)
    if not whole or not callable(getattr(built, verb, None)):
        raise MethodError(
            f"A method for pliant.{verb} is a name, a spec string, or a dataclass with a method "
            f"{verb}(...), not {type(built).__name__}; `pliant methods` lists the names."
        )
    check_options(built)
    return built


def other_verb(entry: Entry, verb: Verb) -> MethodError:
    """Say which call a method belongs to that was given to another one."""
    call = f'pliant.{entry.verb}({CALLS[entry.verb]}, "{entry.name}")'
    return MethodError(f"{entry.name} cannot {verb}, it can {entry.verb}: call {call}.")


def options_of(method: Any) -> dict[str, Any]:
    """Return name and options of a method; one that is not registered goes by its class."""
    entry = entry_of(method)
    options = {f.name: getattr(method, f.name) for f in settable(type(method))}
    return {"name": entry.name if entry else type(method).__name__, "options": options}


@singledispatch
def plain(method: Any) -> dict[str, Any]:
    """Return a method as plain data, from which ``construct`` builds an equal one.

    Composed methods describe their parts; one that is not registered goes by its class.
    """
    return options_of(method)
