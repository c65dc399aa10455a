"""`pliant recover`, `cluster` and `analyze`: from files to files, by the same calls as Python."""

import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from torch import Tensor

from pliant import api
from pliant.cli import console, folder, images, source
from pliant.codecs.disk import regular
from pliant.data import load
from pliant.errors import DataError, OutputError
from pliant.render import table, words
from pliant.render.finding import finding_html
from pliant.result import Finding, Solution

SEED = Annotated[int, typer.Option(help="of everything random")]
OUT = Annotated[
    Path | None, typer.Option(help="where to write: .npy the main value, .npz all values")
]


@console.refusals
def recover(
    file: Annotated[Path, typer.Argument(help="a tensor: an .npy file")],
    known: Annotated[
        Path | None,
        typer.Option(help="a mask of its shape, true where it is known; without one, errors"),
    ] = None,
    method: Annotated[str, typer.Option(help="a name, or one with options")] = "nonconvex_tsvd",
    out: OUT = None,
    seed: SEED = 0,
    as_json: console.AsJson = False,
) -> None:
    """Fill in what is missing of a tensor, or take out gross errors."""
    _check_place(out)
    mask = None if known is None else _array(known)
    found = api.recover(_array(file), mask, method, seed=seed)
    _tell(found, out, as_json)


@console.refusals
def cluster(
    file: Annotated[
        Path, typer.Argument(help="an .npy file: (samples, features) or sets of vectors")
    ],
    groups: Annotated[int, typer.Option(help="how many groups")],
    view: Annotated[
        list[Path] | None, typer.Option(help="another view of the same samples; may be repeated")
    ] = None,
    method: Annotated[
        str, typer.Option(help="a name, or one with options")
    ] = "product_grassmann_lrr",
    out: OUT = None,
    seed: SEED = 0,
    as_json: console.AsJson = False,
) -> None:
    """Divide samples into groups."""
    _check_place(out)
    views = [_array(path) for path in (file, *(view or ()))]
    if len(views) > 1:
        views = [one[..., None] if one.ndim == 2 else one for one in views]
    found = api.cluster(views if len(views) > 1 else views[0], groups, method, seed=seed)
    if not as_json:
        sizes = np.bincount(np.asarray(found.value), minlength=groups)
        console.out().print(f"Samples in each group: {', '.join(map(str, sizes))}.")
    _tell(found, out, as_json)


@console.refusals
def analyze(
    model: source.Model,
    data: Annotated[str, typer.Option(help="mnist5k, digits, a folder of images, module:callable")],
    method: Annotated[str, typer.Option(help="a name, or one with options")] = "output_sensitivity",
    size: images.Size = None,
    normalize: images.Normalize = "auto",
    augment: images.Augment = "auto",
    weights: source.Weights = None,
    architecture: source.Architecture = None,
    out: Annotated[
        Path | None,
        typer.Option(help="where to write: a .json file, or a folder for that and a page"),
    ] = None,
    seed: SEED = 0,
    as_json: console.AsJson = False,
) -> None:
    """Find something out about a network, and leave it as it is."""
    with _place_of(out):
        samples = load(data, **images.prepared(size, normalize, augment))
        found = source.find(
            model,
            weights=weights,
            architecture=architecture,
            classes=samples.class_count or None,
            seed=seed,
        )
        finding = api.analyze(found.model, samples, method, seed=seed)
        plain = {"model": found.name, "data": samples.name, **finding.plain()}
        files = [] if out is None else _save_finding(out, finding, plain)
    if as_json:
        console.print_json(plain)
        return
    shown = console.out()
    shown.print(f"{found.name} on {samples.name}: {finding.text}", markup=False, soft_wrap=True)
    shown.print(_numbers(finding))
    if finding.rows:
        shown.print(table.inspect(finding.rows))
    for path in files:
        shown.print(f"  {path}", soft_wrap=True, markup=False)


# ---------------------------------------------------------------- files


def _array(path: Path) -> np.ndarray:
    try:
        with regular(path) as file:
            found = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"{path} must be an .npy file of numbers, but it cannot be read ({error}); write it "
            "with numpy.save."
        ) from error
    if not isinstance(found, np.ndarray):
        raise DataError(f"{path} must be an .npy file of one array, not an archive of several.")
    return found


def _check_place(out: Path | None, suffixes: tuple[str, ...] = (".npy", ".npz")) -> None:
    """Refuse what cannot be written, before any work is done.

    Raises:
        OutputError: the suffix says no known form, or there is no such folder.
    """
    if out is not None and (out.suffix not in suffixes or not out.parent.is_dir()):
        raise OutputError(
            f"--out must be a file ending in {' or '.join(suffixes)} in a folder that exists, not "
            f"{out}."
        )


def _place_of(out: Path | None) -> AbstractContextManager[None]:
    """Hold the folder of a finding, or see that its file can be written."""
    if out is None or out.suffix == ".json":
        _check_place(out, (".json",))
        return nullcontext()
    return folder.claimed(out, own=True, run=False)


def _write(path: Path, write: Any) -> None:
    try:
        write()
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({error}); choose another place.") from error


def _save_finding(out: Path, finding: Finding, plain: dict[str, Any]) -> list[Path]:
    """Write a finding as JSON, and in a folder as a page as well."""
    text = json.dumps(plain, indent=1) + "\n"
    if out.suffix == ".json":
        return [folder.write(out, text)]
    page = finding_html(finding, model=plain["model"], data=plain["data"])
    return [folder.write(out / "report.html", page), folder.write(out / "report.json", text)]


def _save(path: Path, found: Solution) -> None:
    values = {name: np.asarray(value) for name, value in found.values.items()}
    if path.suffix == ".npz":
        _write(path, lambda: np.savez(path, **values))  # type: ignore[arg-type]
    else:
        _write(path, lambda: np.save(path, np.asarray(found.value)))


# ---------------------------------------------------------------- what is said


def _tell(found: Solution, out: Path | None, as_json: bool) -> None:
    """Write the values and say how it went."""
    if out is not None:
        _save(out, found)
    if as_json:
        console.print_json(found.plain())
        return
    shown = console.out()
    ended = "converged" if found.converged else "not converged"
    shown.print(
        f"{found.method['name']}: {ended} after {found.iterations:,} iterations, "
        f"{words.seconds(found.seconds)}.",
        markup=False,
        soft_wrap=True,
    )
    if found.history:
        shown.print(table.inspect(found.history))
    for name, value in found.values.items():
        shown.print(f"  {name}: {'x'.join(map(str, value.shape))}", markup=False)
    if out is not None:
        shown.print(f"  {out}", soft_wrap=True, markup=False)


def _numbers(found: Finding) -> str:
    said = [
        f"{name} {words.plain(value)}"
        for name, value in found.values.items()
        if not isinstance(value, Tensor)
    ]
    return ", ".join(said)
