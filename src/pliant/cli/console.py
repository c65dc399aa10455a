"""What all commands share: where they write, and how a refusal looks."""

import functools
import json
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.segment import Segment
from rich.text import Text

from pliant.errors import PliantError, shown
from pliant.render import table
from pliant.result import Report

P = ParamSpec("P")
R = TypeVar("R")
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]
REFUSED, DROPPED, INTERRUPTED = 2, 3, 130  # exit codes


class _Console(Console):
    """Shows what steers a terminal, where it stands in a name, instead of sending it there."""

    def render(self, *args: Any, **options: Any) -> Iterator[Segment]:
        """Render as ever, in text that is only shown."""
        for segment in super().render(*args, **options):
            if segment.control or segment.text.isprintable() or segment.text == "\n":
                yield segment
            else:
                lines = [shown(line, 4 * len(line)) for line in segment.text.split("\n")]
                yield Segment("\n".join(lines), segment.style)


def out() -> Console:
    """Return the console for results."""
    return _Console(file=sys.stdout, highlight=False)


def err() -> Console:
    """Return the console for progress, notes and refusals."""
    return _Console(file=sys.stderr, highlight=False)


def refuse(error: PliantError | str) -> typer.Exit:
    """Print a refusal as one red sentence, and return what ends the command."""
    err().print(Text(str(error), "red"), soft_wrap=True)
    return typer.Exit(REFUSED)


def refusals(command: Callable[P, R]) -> Callable[P, R]:
    """Let a command end with a sentence where Pliant refuses; other exceptions stay as they are."""

    @functools.wraps(command)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except PliantError as error:
            raise refuse(error) from error
        except KeyboardInterrupt:
            err().print("Stopped.")
            raise typer.Exit(INTERRUPTED) from None

    return guarded


def print_json(value: Any) -> None:
    """Print plain data as JSON on standard output, and nothing else."""
    typer.echo(json.dumps(value, indent=1))


def print_report(report: Report, files: Iterable[Path]) -> None:
    """Print the tables of a report, and the files that were written."""
    shown = out()
    shown.print(table.before_after(report))
    if "reference" in report.train:
        shown.print(f"Before: {report.train['reference']}.", style="dim")
    if report.sizes:
        shown.print(table.sizes(report))
    if report.tried:
        shown.print(table.tried(report))
    shown.print(table.layers(report))
    for path in files:
        shown.print(f"  {path}", soft_wrap=True, markup=False)


def again(context: typer.Context, *, add: str, drop: tuple[str, ...]) -> str:
    """Write the running command down, so that it can be pasted, with one more option."""
    words = ["pliant", context.info_name or ""]
    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        if source is None or source.name != "COMMANDLINE" or name in drop:
            continue
        words += _written(parameter, context.params[name])
    return shlex.join([*words, add])


def _written(parameter: Any, value: Any) -> list[str]:
    if parameter.param_type_name == "argument":
        return [str(value)]
    if isinstance(value, bool):
        names = parameter.opts if value else parameter.secondary_opts
        return [names[0]] if names else []
    return [parameter.opts[0], str(value)]


def is_default(context: typer.Context, name: str) -> bool:
    """Say whether an option was left out."""
    source = context.get_parameter_source(name)
    return source is None or source.name == "DEFAULT"
