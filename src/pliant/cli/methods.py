"""`pliant methods` and `pliant show`: what there is, and everything about one of them."""

import inspect
import re
import typing
from collections.abc import Iterator
from dataclasses import asdict, fields
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from pliant.cli import console
from pliant.registry import Entry, default, entries, get
from pliant.render import table, words


@console.refusals
def methods(
    family: Annotated[str | None, typer.Option(help="only this family")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """List the methods: what each does, what it saves, where it was published."""
    found = entries(family=family)
    if as_json:
        console.print_json([_plain(entry) for entry in found])
    else:
        console.out().print(table.methods(found))


@console.refusals
def show(
    name: Annotated[str, typer.Argument(help="of the method")],
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Show one method: its paper, what it saves, and every option with its default."""
    entry = get(name)
    rows = list(options(entry.kind))
    if as_json:
        console.print_json(_plain(entry) | {"summary": entry.summary, "options": rows})
        return
    shown, paper = console.out(), entry.paper
    shown.print(Text(entry.name, "bold"), Text(f"  {entry.family}, {entry.verb}", "dim"))
    shown.print(Text(inspect.cleandoc(entry.kind.__doc__ or "").partition(">>>")[0].strip()))
    shown.print(Text(f"\nSaves: {' '.join(entry.saves) or words.NONE}"))
    shown.print(Text(f"{paper.authors}: {paper.title}. {paper.venue} {paper.year}. {paper.url}"))
    shown.print(_table(rows))


def _plain(entry: Entry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "family": entry.family,
        "verb": entry.verb,
        "saves": list(entry.saves),
        "paper": asdict(entry.paper),
    }


def options(kind: type) -> Iterator[dict[str, Any]]:
    """Yield the options of a method: name, type, default and what the source says of them."""
    hints, said = typing.get_type_hints(kind), _said(kind)
    for field in fields(kind):
        yield {
            "name": field.name,
            "type": _type(hints[field.name]),
            "default": default(field),
            "about": said.get(field.name, ""),
        }


def _said(kind: type) -> dict[str, str]:
    """Read what stands behind each field as a comment, or in the docstring's list."""
    comments = re.findall(r"^    (\w+): [^#\n]*#\s*(.+)$", inspect.getsource(kind), re.MULTILINE)
    listed = re.findall(
        r"^\s{4,8}(\w+): (.+(?:\n\s{8,}\S.*)*)$", inspect.cleandoc(kind.__doc__ or ""), re.MULTILINE
    )
    return {name: " ".join(text.split()) for name, text in (*listed, *comments)}


def _type(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " | ".join(repr(value) for value in arguments)
    if origin is tuple:
        return f"several {_type(arguments[0])}"
    if arguments:
        return " | ".join(_type(argument) for argument in arguments)
    return "None" if hint is type(None) else getattr(hint, "__name__", str(hint))


def _table(rows: list[dict[str, Any]]) -> Table:
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for name in ("option", "type", "default", "what it is"):
        shown.add_column(name, overflow="fold")
    for row in rows:
        value = repr(row["default"])
        shown.add_row(*map(Text, (row["name"], row["type"], value, row["about"])))
    return shown
