"""`pliant methods` and `pliant show`: what there is, and everything about one of them."""

from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from pliant.cli import console
from pliant.registry import Entry, OptionRow, Verb, entries, get, options
from pliant.registry.options import written
from pliant.render import pages, table, words


@console.refusals
def methods(
    family: Annotated[str | None, typer.Option(help="only this family")] = None,
    verb: Annotated[
        Verb | None, typer.Option(help="only what compresses, recovers, clusters or analyzes")
    ] = None,
    as_json: console.AsJson = False,
) -> None:
    """List the methods by family: verb, what each saves and does, where it was published."""
    found = entries(family=family, verb=verb)
    if as_json:
        console.print_json([_plain(entry) for entry in found])
    else:
        console.out().print(table.methods(found))


@console.refusals
def show(
    name: Annotated[str, typer.Argument(help="of the method")],
    as_json: console.AsJson = False,
) -> None:
    """Show one method: its paper, what it saves, and every option with its default."""
    entry = get(name)
    rows = options(entry)
    if as_json:
        listed = [asdict(row) for row in rows]
        console.print_json(_plain(entry) | {"summary": entry.summary, "options": listed})
        return
    shown, paper = console.out(), entry.paper
    shown.print(Text(entry.name, "bold"), Text(f"  {entry.family}, {entry.verb}", "dim"))
    for paragraph in pages.prose(entry).split("\n\n"):
        shown.print(Text(" ".join(paragraph.split()) + "\n"))
    shown.print(Text(f"Saves: {' '.join(entry.saves) or words.NONE}"))
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


def _table(rows: list[OptionRow]) -> Table:
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for name in ("option", "type", "default", "what it is"):
        shown.add_column(name, overflow="fold")
    for row in rows:
        shown.add_row(*map(Text, (row.name, row.type, written(row.default), row.text)))
    return shown
