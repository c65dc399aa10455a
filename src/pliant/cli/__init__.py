"""The command line: each command reads its options and calls a function that Python has too."""

from typing import Annotated

import typer

from pliant.cli import (
    auto,
    compress,
    doctor,
    files,
    inspect,
    measure,
    methods,
    networks,
    runs,
    solve,
)

app = typer.Typer(
    name="pliant",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,  # a refusal is one sentence, a mistake of ours a traceback
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("compress")(compress.compress)
app.command("auto")(auto.auto)
app.command("recover")(solve.recover)
app.command("cluster")(solve.cluster)
app.command("analyze")(solve.analyze)
app.command("inspect")(inspect.inspect)
app.command("measure")(measure.measure)
app.command("methods")(methods.methods)
app.command("show")(methods.show)
app.command("sweep")(runs.sweep)
app.command("runs")(runs.runs)
app.command("compare")(runs.compare)
app.command("doctor")(doctor.doctor)
app.command("zoo")(networks.networks)
app.command("report")(files.report)
app.command("export")(files.export)


def _version(asked: bool) -> None:
    if asked:
        from pliant import __version__

        typer.echo(f"pliant {__version__}")
        raise typer.Exit


@app.callback()
def pliant(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Make PyTorch networks smaller, with published methods."""


def main() -> None:
    """Run the command line."""
    app()
