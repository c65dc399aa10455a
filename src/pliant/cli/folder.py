"""The folder of a run: claimed before the work, filled at its end, every file whole or absent."""

import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pliant.api import CONTROL
from pliant.codecs.container import check_replaceable, is_pliant, replacing
from pliant.codecs.disk import regular
from pliant.cost import Example
from pliant.drivers import checkpoint
from pliant.drivers.checkpoint import NAME as CHECKPOINT
from pliant.drivers.checkpoint import PART
from pliant.drivers.lock import NAME as LOCK
from pliant.drivers.lock import owned
from pliant.errors import ArtifactError, MissingExtraError, ModelError, OutputError
from pliant.files import artifact
from pliant.files.onnx import to_onnx
from pliant.render.html import html
from pliant.render.markdown import markdown
from pliant.result import Report, Result

REPORTS = ("report.html", "report.json", "report.md")
MODEL, ONNX = "model.pliant", "model.onnx"
OURS = {*REPORTS, MODEL, ONNX, ONNX + ".data", CHECKPOINT, CONTROL}
_WHOLE = "|".join(map(re.escape, (*REPORTS, MODEL, ONNX)))
_LEFT = re.compile(rf"\.({_WHOLE})\.[0-9a-z_]{{8}}|{re.escape(PART)}")  # by a kill


@contextmanager
def claimed(
    out: Path, *, force: bool = False, resume: bool = False, own: bool = False, run: bool = True
) -> Iterator[None]:
    """Make the folder and hold it, or refuse one that holds something.

    What a kill left half written is removed, and with `force` the checkpoints of the run before.
    A folder that was made and stays empty goes again.

    Args:
        out: the folder.
        force: replace the files of a run in it.
        resume: go on with the run in it.
        own: replace its content without being told, if it is nothing but a run.
        run: whether the command has --resume and --force.

    Raises:
        OutputError: it holds something, or a model.pliant that is none, or cannot be written to,
            or another process writes to it.
    """
    with owned(out):
        held = _held(out)
        if resume and "report.json" in held and CHECKPOINT not in held and CONTROL not in held:
            raise OutputError(
                f"The run in {out} is complete, so there is nothing to resume; "
                "--force does it once more."
            )
        own = own and OURS.issuperset(held)
        if held and not (force or resume or own):
            ways = ", or go on with --resume, or replace it with --force" if run else ""
            raise OutputError(
                f"{out} exists and holds {', '.join(held[:3])}{' and more' if held[3:] else ''}: "
                f"choose another --out{ways}."
            )
        check_replaceable(out / MODEL, ".pliant", is_pliant)
        if force and not resume:
            checkpoint.forget(out)
        yield


def _held(out: Path) -> list[str]:
    """Name what a folder holds, others' first, after removing what a kill left half written."""
    try:
        names = [path.name for path in out.iterdir() if path.name != LOCK]
        for path in (out / name for name in names if _LEFT.fullmatch(name)):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(
            f"The folder {out} cannot be used ({error.strerror or error}): choose another --out."
        ) from error
    kept = [name for name in names if not _LEFT.fullmatch(name)]
    return sorted(kept, key=lambda name: (name in OURS, name))


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
        with legible(file):
            return file.parent, Report.from_json(_text(file))
    except OSError as error:
        raise ArtifactError(
            f"{path} must be the folder of a run or its report.json, but {file} cannot be read "
            f"({error.strerror or error}): check the path."
        ) from error


@contextmanager
def legible(file: Path | str) -> Iterator[None]:
    """Refuse a report that holds what no compression writes, while it is read or drawn.

    Raises:
        ArtifactError: it holds such a thing.
    """
    try:
        yield
    except OutputError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ArtifactError(
            f"{file} must be a report of pliant compress, but is not "
            f"({type(error).__name__}: {str(error)[:100]})."
        ) from error


def _text(path: Path) -> str:
    with regular(path) as file:
        return file.read().decode()


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
