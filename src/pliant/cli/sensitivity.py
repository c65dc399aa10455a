"""`pliant inspect --sensitivity`: what every layer is worth, as a table and as a page."""

import json
from pathlib import Path
from typing import Any

from pliant.api.sensitivity import sensitivity
from pliant.cli import console
from pliant.cli.progress import Bars
from pliant.cli.source import Source
from pliant.data import Data
from pliant.errors import DataError, OutputError
from pliant.files import hub
from pliant.render import table
from pliant.render.sensitivity import by_layer, sensitivity_html, shares_of
from pliant.result import Finding


def check(kind: str | None, data: str | None, out: Path | None) -> None:
    """Refuse what cannot be done, before any work.

    Raises:
        DataError: there is nothing to score on.
        OutputError: the page cannot be written there.
    """
    if kind is None and out is not None:
        raise OutputError("--out is for the page of --sensitivity: name rank or width with it.")
    if kind is not None and data is None:
        raise DataError("What a layer is worth is scored on data: name some with --data.")
    if out is not None and (out.suffix not in (".html", ".json") or not out.parent.is_dir()):
        raise OutputError(
            f"--out must be a file ending in .html or .json in a folder that exists, not {out}."
        )


def run(kind: Any, found: Source, samples: Data, out: Path | None, *, as_json: bool) -> None:
    """Measure, print, and write the page."""
    with Bars(quiet=as_json) as bars:
        finding = sensitivity(found.model, samples, kind, watch=bars.watch)
    plain = {"model": found.name, "data": samples.name, **finding.plain()}
    if out is not None:
        _write(out, finding, plain)
    if as_json:
        console.print_json(plain)
        return
    shown = console.out()
    shown.print(f"{found.name} on {samples.name}: {finding.text}", markup=False, soft_wrap=True)
    shown.print(table.inspect(_rows(finding)))
    if out is not None:
        shown.print(f"  {out}", soft_wrap=True, markup=False)


def _rows(finding: Finding) -> list[dict[str, Any]]:
    """Make a row for every layer: what is lost at each share."""
    shares = shares_of(finding.rows)
    found = []
    for name, rows in by_layer(finding.rows).items():
        lost = {row["share"]: f"{row['lost']:.2f}" for row in rows}
        found.append({"layer": name} | {f"at {s:.0%}": lost.get(s, "–") for s in shares})
    return found


def _write(out: Path, finding: Finding, plain: dict[str, Any]) -> None:
    if out.suffix == ".json":
        hub.write(out, json.dumps(plain, indent=1) + "\n")
        return
    from pliant import __version__

    about = {"model": str(plain["model"]), "data": str(plain["data"])}
    hub.write(out, sensitivity_html(finding, **about, version=__version__))
