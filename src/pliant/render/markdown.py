"""A report as Markdown."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from pliant.render import tables, words
from pliant.result import LayerRow, Report


def markdown(report: Report) -> str:
    """Return the whole report as Markdown: all of the HTML page but its figures."""
    return (
        "\n\n".join(
            [
                f"# {_safe(words.headline(report))}",
                f"{_safe(words.verdict(report))} {_safe(words.summary(report))}",
                _costs(report),
                *_sizes(report),
                *_tried(report),
                *_stages(report),
                "## Layers",
                _layers(report.layers),
                "## Method",
                _methods(report),
                "## How it ran",
                _facts(provenance(report)),
            ]
        )
        + "\n"
    )


def provenance(report: Report) -> list[tuple[str, str]]:
    """Return what is needed to repeat the run, and what it took: pairs of name and text."""
    return [
        ("model", report.model),
        ("data", report.data or words.NONE),
        *words.facts(report.inputs, "inputs: "),
        *([("task", report.task)] if report.task else []),
        ("seed", str(report.seed)),
        ("device", report.device),
        *words.facts(report.train, "training: "),
        *((f"time: {stage}", words.seconds(time)) for stage, time in report.seconds.items()),
        *words.facts(report.target, "target: "),
        *words.facts(report.export, "export: "),
        *((f"version: {name}", version) for name, version in report.versions.items()),
    ]


def _costs(report: Report) -> str:
    rows = [(row.label, row.before, row.after, row.change) for row in words.comparisons(report)]
    table = _table(("", "before", "after", "change"), rows, align="lrrr")
    if not report.after.uncounted:
        return table
    return f"{table}\n\nMACs not counted for: {_safe(', '.join(report.after.uncounted))}."


def _sizes(report: Report) -> list[str]:
    """The table of the sizes of an elastic network; nothing where there is one size only."""
    table = _table(tables.SIZE_COLUMNS, tables.sizes(report), align="rrrrr")
    return ["## Every size in the file", table] if report.sizes else []


def _tried(report: Report) -> list[str]:
    """The table of what was tried where sizes or methods were searched; nothing otherwise."""
    table = _table(
        ("network", *map(_safe, tables.tried_columns(report)), ""),
        tables.tried_cells(report),
        align="lrrrrrrl",
    )
    return ["## What was tried", table] if report.tried else []


def _stages(report: Report) -> list[str]:
    """The table of the stages of a chain; nothing where there is one stage only."""
    rows = [(row.name, *row.cells()) for row in tables.stages(report)]
    table = _table(("after", "params", "file", "accuracy"), rows, align="lrrr")
    return ["## Stage by stage", table] if rows else []


def _layers(rows: Sequence[LayerRow]) -> str:
    names = (
        "layer", "kind", "became", "params before", "after", "MACs before", "after",
        "params saved", "why left alone",
    )  # fmt: skip
    if words.has_times(rows):
        timed = [(*_layer(row), *words.layer_times(row)) for row in rows]
        return _table((*names, "ms before", "after"), timed, align="lllrrrrrlrr")
    return _table(names, map(_layer, rows), align="lllrrrrrl")


def _layer(row: LayerRow) -> tuple[str, ...]:
    numbers = (
        words.human(side.get(axis, 0))
        for axis in ("params", "macs")
        for side in (row.before, row.after)
    )
    return (row.layer, row.kind, words.what(row), *numbers, words.saved(row), words.why(row))


def _methods(report: Report) -> str:
    return "\n".join(_method(part, note) for part, note in words.parts(report.method))


def _method(part: Any, note: str) -> str:
    name, entry = str(part["name"]), words.entry(str(part["name"]))
    lines = [f"- **{_safe(name)}**" + (f" ({_safe(note)})" if note else "")]
    if entry is not None:
        paper = entry.paper
        title = f"[{_safe(paper.title)}](<{paper.url}>)" if paper.url else _safe(paper.title)
        lines.append(f"  - {_safe(entry.summary)}")
        lines.append(f"  - {_safe(paper.authors)}: {title}, {_safe(paper.venue)} {paper.year}")
    if options := words.plain(part.get("options", {})):
        lines.append(f"  - {_safe(options)}")
    return "\n".join(lines)


def _facts(pairs: Iterable[tuple[str, str]]) -> str:
    return _table(("", ""), pairs, align="ll")


def _table(names: Sequence[str], rows: Iterable[Sequence[str]], *, align: str) -> str:
    marks = ["---:" if side == "r" else "---" for side in align]
    lines = [names, marks, *([_safe(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _safe(text: str) -> str:
    """Escape what Markdown or HTML would read as markup, and keep to one line."""
    text = re.sub(r"([\\`*_\[\]|<>#])", r"\\\1", text.replace("&", "&amp;"))
    return re.sub(r"\s+", " ", text)
