"""The folder of a run: claimed before the work, filled at its end, every file whole or absent."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pliant.api import CONTROL
from pliant.codecs.container import check_replaceable, is_pliant, replacing
from pliant.cost import Example
from pliant.drivers.checkpoint import NAME as CHECKPOINT
from pliant.errors import ArtifactError, MissingExtraError, ModelError, OutputError
from pliant.files import artifact
from pliant.files.onnx import to_onnx
from pliant.render.html import html
from pliant.render.markdown import markdown
from pliant.result import Report, Result

REPORTS = ("report.html", "report.json", "report.md")
MODEL, ONNX = "model.pliant", "model.onnx"
OURS = {*REPORTS, MODEL, ONNX, ONNX + ".data", CHECKPOINT, CONTROL}


def claim(out: Path, *, force: bool, resume: bool, own: bool = False) -> None:
    """Make the folder, or refuse one that holds something.

    Args:
        out: the folder.
        force: replace the files of a run in it.
        resume: go on with the run in it.
        own: replace its content without being told, if it is nothing but a run.

    Raises:
        OutputError: it holds something, or a model.pliant that is none, or cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        held = sorted((path.name for path in out.iterdir()), key=lambda name: (name in OURS, name))
    except OSError as error:
        raise OutputError(
            f"The folder {out} cannot be made ({error.strerror or error}): choose another --out."
        ) from error
    if resume and "report.json" in held and CHECKPOINT not in held:
        raise OutputError(
            f"The run in {out} is complete, so there is nothing to resume; "
            "--force does it once more."
        )
    if not held or force or resume or (own and OURS.issuperset(held)):
        check_replaceable(out / MODEL, ".pliant", is_pliant)
        return
    raise OutputError(
        f"{out} exists and holds {', '.join(held[:3])}{' and more' if len(held) > 3 else ''}: "
        "choose another --out, or go on with --resume, or replace it with --force."
    )


@dataclass(frozen=True)
class Written:
    """What lies in a run folder, and the report with what was exported."""

    files: tuple[Path, ...]
    report: Report
    note: str = ""  # why there is no ONNX file


def fill(
    out: Path,
    result: Result,
    example: Example,
    *,
    source: str | None,
    extra: Mapping[str, Any],
    onnx: bool = True,
    encode: str | None = None,
) -> Written:
    """Write the network, its ONNX form and the reports; then the checkpoints go.

    Raises:
        OutputError: the folder cannot be written.
    """
    kept: dict[str, Any] = {"source": source, "extra": extra, "encode": encode}
    model = artifact.save(out / MODEL, result.model, result.edits, **kept)
    (out / ONNX).unlink(missing_ok=True)  # an earlier run's; `claim` was told to replace it
    exported, note = _export(out / ONNX, result, example) if onnx else ({}, "")
    report = replace(result.report, export=exported)
    files = [*write_reports(out, report), model]
    if "path" in exported.get("onnx", {}):
        files.append(out / ONNX)
    _tidy(out, keep_onnx=len(files) > len(REPORTS) + 1)
    return Written(tuple(files), report, note)


def write_reports(out: Path, report: Report, *, json_too: bool = True) -> list[Path]:
    """Write a report as HTML, JSON and Markdown.

    Raises:
        OutputError: the folder cannot be written.
    """
    texts = {"report.html": html(report), "report.json": report.to_json() + "\n"}
    texts["report.md"] = markdown(report)
    if not json_too:
        del texts["report.json"]
    return [write(out / name, text) for name, text in texts.items()]


def write(path: Path, text: str) -> Path:
    """Replace a file by a whole new one.

    Raises:
        OutputError: it cannot be written; an existing one stays as it was.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def read_report(path: Path) -> tuple[Path, Report]:
    """Read the report of a run folder, or of a report.json.

    Raises:
        ArtifactError: there is none, or it is not a report.
    """
    file = path / "report.json" if path.is_dir() else path
    try:
        return file.parent, Report.from_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(
            f"{path} must be the folder of a run or its report.json, but {file} cannot be read "
            f"({error.strerror or error}): check the path."
        ) from error
    except (json.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(
            f"{file} must be a report of pliant compress, but is not "
            f"({type(error).__name__}: {str(error)[:100]})."
        ) from error


def _export(path: Path, result: Result, example: Example) -> tuple[dict[str, Any], str]:
    """Write ONNX if that is possible here; everything else does not depend on it."""
    try:
        done = to_onnx(result.model, path, example)
    except MissingExtraError as error:
        return {"onnx": {"not_written": str(error)}}, f"No ONNX file: {error}"
    except (ModelError, ArtifactError) as error:
        return {"onnx": {"not_written": str(error)}}, f"No ONNX file: {error}"
    row = {"path": path.name, "bytes": done.bytes, "opset": done.opset}
    return {"onnx": {**row, "max_difference": done.max_difference}}, ""


def _tidy(out: Path, *, keep_onnx: bool) -> None:
    """Remove checkpoints, and the ONNX file of an earlier run that is not this one's."""
    stale = [out / CHECKPOINT] + ([] if keep_onnx else [out / ONNX, out / (ONNX + ".data")])
    for path in stale:
        path.unlink(missing_ok=True)
    shutil.rmtree(out / CONTROL, ignore_errors=True)
