"""Ways of showing and sharing results that rest on the renderers: files, notebooks, folders."""

from __future__ import annotations

from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from pliant.cost import Example
from pliant.errors import OutputError
from pliant.files import hub
from pliant.files.onnx import to_onnx
from pliant.render import words
from pliant.result import Report, Result


def save_report(report: Report, folder: str | Path) -> list[Path]:
    """Write a report as HTML, JSON and Markdown into a folder.

    Raises:
        OutputError: the folder cannot be made or written.
    """
    from pliant.render.html import html  # plotly, which nothing else needs
    from pliant.render.markdown import markdown

    texts = {
        "report.html": html(report),
        "report.json": report.to_json() + "\n",
        "report.md": markdown(report),
    }
    place = _folder(folder)
    return [hub.write(place / name, text) for name, text in texts.items()]


def save_pretrained(
    result: Result,
    folder: str | Path,
    *,
    source: str | None = None,
    onnx: Example = (),
) -> Path:
    """Write a folder to share: the network, its report, a model card and its settings.

    Args:
        result: of a compression.
        folder: where to; files of the same names in it are replaced.
        source: what builds the dense network, for commands: a zoo name or module:callable.
        onnx: inputs of one forward call; with them the network is written as ONNX too.

    Raises:
        OutputError: the folder cannot be made or written, or it holds a README.md or config.json
            and no network: somebody else's.
    """
    from pliant.render.card import card

    place, report = _folder(folder), result.report
    theirs = [name for name in (hub.CARD, hub.CONFIG) if (place / name).exists()]
    if theirs and not (place / hub.MODEL).exists():
        raise OutputError(
            f"{place / theirs[0]} is not of a shared network and would be lost: choose another "
            "folder."
        )
    result.save(place / hub.MODEL, source=source)
    if onnx:
        done = to_onnx(result.model, place / "model.onnx", onnx)
        row = {"bytes": done.bytes, "opset": done.opset, "max_difference": done.max_difference}
        report = replace(report, export={"onnx": {"path": "model.onnx", **row}})
    save_report(report, place)
    hub.write_config(place, hub.config(result.model, {f: getattr(report, f) for f in KEPT}))
    hub.write(place / hub.CARD, card(report, place.resolve().name))
    return place


KEPT = ("method", "budget", "seed", "versions")


def push_to_hub(result: Result, repo: str, folder: str | Path, **asked: Any) -> str:
    """Write a folder and upload what was written, and nothing else that may lie in it.

    See `save_pretrained` and `pliant.files.hub.push`.
    """
    asked = {"only": hub.WRITTEN, **asked}
    where = {name: asked.pop(name) for name in ("source", "onnx") if name in asked}
    return hub.push(save_pretrained(result, folder, **where), repo, **asked)


def notebook(report: Report) -> str:
    """Return what a notebook shows of a report: the verdict and the numbers before and after."""
    tint = "inherit" if words.fine(report) else "#c0392b"
    rows = "".join(
        f"<tr><th>{escape(row.label)}</th>"
        + "".join(f"<td>{escape(text)}</td>" for text in (row.before, row.after, row.change))
        + "</tr>"
        for row in words.comparisons(report)
    )
    head = "".join(f"<th>{name}</th>" for name in ("", "before", "after", "change"))
    return (
        f"<b>{escape(words.headline(report))}</b><br>"
        f'<span style="color:{tint}">{escape(words.verdict(report))}</span>'
        f"<table><tr>{head}</tr>{rows}</table>"
    )


def _folder(folder: str | Path) -> Path:
    place = Path(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"The folder {place} cannot be made ({error.strerror or error}): choose another."
        ) from error
    return place
