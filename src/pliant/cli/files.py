"""`pliant report` and `pliant export`: other forms of what a run left behind."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from pliant.cli import console, folder, source
from pliant.errors import ArtifactError, OutputError
from pliant.files.onnx import to_onnx


@console.refusals
def report(
    run: Annotated[Path, typer.Argument(help="folder of a run, or its report.json")],
    as_json: Annotated[bool, typer.Option("--json", help="print the report as JSON")] = False,
) -> None:
    """Write report.html and report.md anew from report.json, and print the tables."""
    place, found = folder.read_report(run)
    with folder.legible(run):
        files = folder.write_reports(place, found, json_too=False)
    if as_json:
        console.print_json(json.loads(found.to_json()))
        return
    console.print_report(found, files)


@console.refusals
def export(
    file: Annotated[str, typer.Argument(help="a .pliant file, or any MODEL of compress")],
    onnx: Annotated[Path, typer.Option(help="where to write ONNX")],
    architecture: source.Architecture = None,
    weights: source.Weights = None,
    shape: source.Shape = None,
    force: Annotated[
        bool, typer.Option("--force", "--overwrite", help="replace an earlier ONNX file")
    ] = False,
    as_json: console.AsJson = False,
) -> None:
    """Write a compressed network as ONNX, and compare its outputs with onnxruntime."""
    if not onnx.parent.is_dir():
        raise ArtifactError(f"There is no folder {onnx.parent} to write to: make it first.")
    _check_free(onnx, (file, weights), force=force)
    found = source.find(file, weights=weights, architecture=architecture)
    done = to_onnx(found.model, onnx, source.example(found, shape))
    if as_json:
        rows = {"bytes": done.bytes, "opset": done.opset, "max_difference": done.max_difference}
        console.print_json({"path": str(done.path), **rows})
        return
    console.out().print(
        f"{done.path}: {done.bytes:,} bytes, opset {done.opset}; outputs differ from PyTorch's by "
        f"at most {done.max_difference:.2g}.",
        soft_wrap=True,
        markup=False,
    )


def _check_free(onnx: Path, inputs: Iterable[str | None], *, force: bool) -> None:
    """Refuse to write over an input, ever, and over what exists without being told."""
    if not onnx.exists():
        return
    if any(file and Path(file).exists() and onnx.samefile(file) for file in inputs):
        raise OutputError(f"{onnx} is the network that is exported: name another file for --onnx.")
    if not force:
        raise OutputError(f"{onnx} exists: name another file for --onnx, or add --force.")
