"""`pliant runs`, `compare` and `sweep`: many compressions beside one another."""

import os
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from pliant import api
from pliant.api.sweep import Case, cases
from pliant.cli import compress, console, folder, images, measure, source
from pliant.cli.progress import Bars
from pliant.data import Train, load
from pliant.data.digest import digest_of
from pliant.errors import DataError, MethodError, OutputError, PliantError
from pliant.render import table
from pliant.render.runs import compare as side_by_side
from pliant.render.runs import overview, row
from pliant.result import Result


@console.refusals
def runs(
    place: Annotated[Path, typer.Argument(help="folder with runs in it, at any depth")],
    out: Annotated[
        Path | None, typer.Option(help="the page (default: runs.html in the folder)")
    ] = None,
) -> None:
    """Write one page that lists all runs in a folder, to sort, filter and open."""
    page = out or place / "runs.html"
    rows, damaged = _rows(place, page.parent)
    if not rows:
        raise DataError(f"There is no report.json in {place}: name a folder with runs in it.")
    folder.write(page, overview(rows, f"Runs in {place}", _version()))
    console.out().print(table.many(rows))
    for path in damaged:
        console.err().print(f"{path} is no report and was left out.", style="yellow", markup=False)
    console.out().print(f"  {page}", soft_wrap=True, markup=False)


@console.refusals
def compare(
    run: Annotated[list[Path], typer.Argument(help="folders of runs, or their report.json")],
    out: Annotated[Path, typer.Option(help="the page")] = Path("compare.html"),
    force: Annotated[bool, typer.Option("--force", "--overwrite", help="replace the page")] = False,
) -> None:
    """Set runs side by side on one page: costs, accuracy, curves and layers."""
    if len(run) < 2:
        raise DataError("Name two runs or more to compare: pliant compare RUN RUN.")
    if out.exists() and not force:
        raise OutputError(f"{out} exists: name another page with --out, or add --force.")
    read = [folder.read_report(path) for path in run]
    names = _told_apart([place for place, _ in read])
    found = [(name, report) for name, (_, report) in zip(names, read, strict=True)]
    with folder.legible(" or ".join(map(str, run))):
        page = side_by_side(found, _version())
    folder.write(out, page)
    console.out().print(table.many([row(name, report) for name, report in found]))
    console.out().print(f"  {out}", soft_wrap=True, markup=False)


@console.refusals
def sweep(
    model: Annotated[str, typer.Argument(help=compress.HELP, show_default=False)],
    data: Annotated[str, typer.Option(help="mnist5k, digits, a folder, or module:callable")],
    method: Annotated[list[str], typer.Option(help="a method; may be given several times")],
    size: images.Size = None,
    normalize: images.Normalize = "auto",
    augment: images.Augment = "auto",
    budget: Annotated[
        list[str] | None, typer.Option(help="a budget; may be given several times")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="name=value,value,... of the methods' options")
    ] = None,
    seeds: Annotated[int, typer.Option(help="how many seeds, from 0")] = 1,
    storage: Annotated[
        str | None, typer.Option(help="URL of Optuna's storage (default: study.db in --out)")
    ] = None,
    target: Annotated[str | None, typer.Option(help="where to measure milliseconds")] = None,
    threads: Annotated[int | None, typer.Option(help="of the target")] = None,
    epochs: Annotated[float, typer.Option(help="passes with the method; 0 calibrates")] = 0.0,
    finetune: Annotated[float, typer.Option(help="passes afterwards")] = 0.0,
    weights: Annotated[str | None, typer.Option(help="safetensors file, or a known name")] = None,
    out: Annotated[
        Path | None, typer.Option(help="folder of the runs (default: runs/MODEL-sweep)")
    ] = None,
) -> None:
    """Compress MODEL in many ways as one study; run it again, or elsewhere too, to go on."""
    plan = cases(method, budget or (), range(seeds), dict(map(_option, option or [])))
    place = out or Path(f"runs/{Path(model.partition(':')[2] or model).stem}-sweep")
    samples = load(data, **images.prepared(size, normalize, augment))
    found = source.find(model, weights=weights, classes=samples.class_count or None)
    train = Train(epochs=epochs, finetune=finetune) if epochs or finetune else None

    def keep(case: Case, result: Result) -> str:
        run = place / slug(case)
        extra = compress.extra(samples, found)
        told: dict[str, Any] = {"source": found.made_by, "extra": extra, "onnx": False}
        with folder.claimed(run, force=True, resume=False):
            folder.fill(run, result, samples.example(), **told)
        return str(run.relative_to(place) / "report.html")

    with Bars(quiet=False) as bars:
        rows = api.sweep(
            found.model, samples, plan, storage=storage or place / "study.db", keep=keep,
            watch=bars.count, train=train, name=found.name,
            target=measure.target_of(target, threads, None, asked=False),
        )  # fmt: skip
    shown = [{**each, "note": each.get("refused", "")} for each in rows]
    folder.write(place / "sweep.html", overview(shown, f"Sweep of {model}", _version()))
    console.out().print(table.many(shown))
    console.out().print(f"  {place / 'sweep.html'}", soft_wrap=True, markup=False)


def _option(text: str) -> tuple[str, list[Any]]:
    """Read ``alpha=0.01,0.1``."""
    name, _, values = text.partition("=")
    if not name.isidentifier() or not values:
        raise MethodError(f"An option is name=value,value,... such as p=0.8,0.9, not {text!r}.")
    return name, [_value(each) for each in values.split(",")]


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return {"True": True, "False": False, "None": None}.get(text, text)


def slug(case: Case) -> str:
    """Name the folder of a case; what a folder's name cannot say stands in it as a digest."""
    text = str(case)
    kept = "".join(c if c.isalnum() or c in "._=-" else "-" for c in text)
    name = "-".join(filter(None, kept.split("-")))
    if re.fullmatch(r"[a-z0-9._=(), -]{1,120}", text):
        return name
    return f"{name[:100]}-{digest_of(text)}"


def _rows(place: Path, page: Path) -> tuple[list[dict[str, Any]], list[Path]]:
    """Read every report below a folder as a row, and say which ones cannot be read."""
    found, damaged = [], []
    for path in sorted(place.rglob("report.json")):
        link = os.path.relpath(path.with_name("report.html"), page)
        try:
            _, report = folder.read_report(path)
            with folder.legible(path):
                found.append(row(str(path.parent.relative_to(place)), report, link))
        except PliantError:
            damaged.append(path)
    return found, damaged


def _told_apart(places: list[Path]) -> list[str]:
    """Name folders by their last part, by their whole path where two share it."""
    last = [place.resolve().name for place in places]
    return [n if last.count(n) == 1 else str(p) for n, p in zip(last, places, strict=True)]


def _version() -> str:
    from pliant import __version__

    return __version__
