"""The command line of the benches."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from bench import experiments, page, tasks
from bench.cells import Progress, Store, measure_all, name_of
from bench.claim import STATES, counted, misses_first, shown
from bench.experiments import Cell
from bench.result import RESULTS, assemble, judge, read_all, write
from pliant.errors import PliantError
from pliant.render.words import seconds

console = Console(soft_wrap=True, highlight=False)
logging.getLogger("lightning_fabric.utilities.rank_zero").setLevel(logging.WARNING)


class Names(TyperGroup):
    """Takes a word that is no command for the name of a bench."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(cls=Names, add_completion=False, no_args_is_help=True, help=__doc__)


@app.command()
def run(
    name: str = typer.Argument(help="a bench: see `python -m bench list`"),
    quick: bool = typer.Option(False, "--quick", help="the same code in under two minutes"),
    path: Path | None = typer.Option(None, "--json", help="write the result here as well"),
    fresh: bool = typer.Option(False, "--fresh", help="measure everything anew"),
    redo: list[str] = typer.Option([], "--redo", help="measure the cells of this rival anew"),
) -> None:
    """Measure one bench, going on where it was stopped. `run` may be left out."""
    try:
        _measure(name, quick=quick, path=path, fresh=fresh, redo=redo)
    except PliantError as error:
        _refuse(str(error))
    except KeyboardInterrupt:
        _refuse(f"Stopped; python -m bench {name} goes on where it stood.", 130)


@app.command()
def claims(as_json: bool = typer.Option(False, "--json", help="for scripts")) -> None:
    """Print every claim of every result, misses first."""
    rows = misses_first(read_all())
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    _print_claims(rows)


@app.command()
def readme() -> None:
    """Write bench/README.md from the results."""
    page.PATH.write_text(page.render(read_all()))
    console.print(f"Wrote {page.PATH}.")


@app.command("judge")
def judge_all() -> None:
    """Judge the claims of every result anew from its cells; nothing is measured."""
    for result in read_all():
        write(RESULTS / f"{result['bench']}.json", judge(result))
    readme()


@app.command("list")
def names() -> None:
    """List the benches."""
    for name in experiments.names():
        done = "measured" if (RESULTS / f"{name}.json").exists() else "no result yet"
        console.print(f"{name}: {experiments.load(name).settings['title']} ({done})")


def _measure(name: str, *, quick: bool, path: Path | None, fresh: bool, redo: list[str]) -> None:
    experiment = experiments.load(name, quick=quick)
    store = Store.of(experiment)
    if fresh or quick:
        store.forget()
    for word in redo:
        store.forget(word)
    found, failed = measure_all(experiment, store, _show, _watch)
    result = assemble(experiment, found)
    _print_claims([{"bench": name, **row} for row in result["claims"]])
    if failed:
        raise PliantError(
            f"No result is written, since {len(failed)} cells failed ({'; '.join(failed)}); mend "
            "what is said above and run the same command: the other cells are kept."
        )
    target = (tasks.WORK / "quick" if quick else RESULTS) / f"{name}.json"
    for place in (target, path) if path else (target,):
        write(place, result)
        console.print(f"Wrote {place}.")
    if not quick:
        readme()


def _show(cell: Cell, measured: dict[str, Any], progress: Progress) -> None:
    values = measured["values"]
    facts = [
        f"{key} {value:.4f}" if isinstance(value, float) else f"{key} {value:,}"
        for key, value in values.items()
        if isinstance(value, int | float) and key not in ("loss", "bytes", "steps", "step")
    ]
    said = measured.get("refused", ", ".join(facts))
    left = f"; about {seconds(progress.left())} left" if progress.seconds else ""
    console.print(f"[{progress.done}/{progress.total}] {name_of(cell)}: {said}{left}", markup=False)


def _watch(cell: Cell, row: dict[str, Any]) -> None:
    """Overwrite one line on a terminal; a log stays free of it."""
    if not sys.stdout.isatty():
        return
    end = "\n" if row["step"] == row["steps"] else ""
    left = seconds(row["seconds_left"])
    text = f"  {name_of(cell)}: {row['phase']} step {row['step']} of {row['steps']}, {left} left"
    print(f"\r\x1b[2K{text}", end=end, flush=True)


def _print_claims(rows: list[dict[str, Any]]) -> None:
    table = Table(title=counted(rows))
    for head in ("", "bench", "claim", "target", "measured"):
        table.add_column(head, overflow="fold")
    for row in sorted(rows, key=lambda row: STATES.index(row["state"])):
        table.add_row(row["state"], row["bench"], row["claim"], row["target"], shown(row))
    Console().print(table)


def _refuse(text: str, code: int = 1) -> None:
    Console(stderr=True, soft_wrap=True, highlight=False).print(text, markup=False)
    raise typer.Exit(code)
