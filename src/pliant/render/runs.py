"""Pages over several runs: one that lists them, and one that sets some side by side."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from pliant.render import canvas, words
from pliant.render.canvas import Plot, colour
from pliant.render.document import cell, document, section, table
from pliant.render.many import Row, download, listing, pareto, together
from pliant.result import Report, Side

Named = Sequence[tuple[str, Report]]
"""Runs by the names that tell them apart."""


def row(name: str, report: Report, link: str | None = None) -> dict[str, Any]:
    """Return one run as a row of a table of many networks."""
    after, found = report.after, report.verdict
    costs = {key: getattr(after, key) for key in ("params", "macs", "bytes", "latency_ms")}
    return {
        "name": name,
        "link": link,
        **costs,
        **report.judged(),
        "lost": found.lost if found else None,
        "seconds": sum(report.seconds.values()),
        "note": f"{report.model} on {report.data or 'no data'}: {words.plain(_names(report))}",
        "chosen": words.fine(report),
    }


def _names(report: Report) -> list[str]:
    return [str(part["name"]) for part, _ in words.parts(report.method)]


def overview(rows: Sequence[Row], title: str, version: str = "") -> str:
    """Return a page that lists networks: a figure, and a table to sort, filter and download.

    Args:
        rows: see `pliant.render.many.Row`.
        title: its heading.
        version: of pliant.
    """
    lead = f"<p>{len(rows)} networks. Grey rows miss their budget or lost more than they may.</p>"
    main = together(rows, "Scores against cost", "Every network")
    return document("Runs", title, lead, main or "<p>There are no runs here.</p>", version)


def compare(runs: Named, version: str = "") -> str:
    """Return a page with runs side by side: costs, curves of the training, layers."""
    rows = [row(name, report) for name, report in runs]
    plot = pareto(rows, "Scores against cost")
    main = section(plot, _numbers(runs), listing(rows, "Every run"), download(rows))
    main += section(_curves(runs)) + _layers(runs)
    title = " · ".join(name for name, _ in runs)
    return document("Runs side by side", title, "", main, version)


def _numbers(runs: Named) -> str:
    """Set scores and costs of all runs beside one another, those before them to their left."""
    same = len({_origin(report) for _, report in runs}) == 1
    named: list[tuple[str, Side, Report]] = []
    for name, report in runs:
        if not named or not same:
            named.append(("before" if same else f"before {name}", report.before, report))
        named.append((name, report.after, report))
    metrics = dict.fromkeys(name for _, side, _ in named for name in side.metrics or ("accuracy",))
    lines = [(m, [words.scored(report, side, m) for _, side, report in named]) for m in metrics]
    for axis, label, write in words.COSTS:
        lines.append((label, [write(getattr(side, axis)) for _, side, _ in named]))
    shown = [(label, texts) for label, texts in lines if set(texts) != {words.NONE}]
    body = "".join(
        f'<tr><th scope="row">{escape(label)}</th>'
        + "".join(cell(text, "number") for text in texts) + "</tr>"
        for label, texts in shown
    )  # fmt: skip
    return table("Scores and costs", [("", ""), *((name, "number") for name, _, _ in named)], body)


def _origin(report: Report) -> tuple[Any, ...]:
    """Return what tells the dense networks of runs apart."""
    before = report.before
    return before.params, before.macs, before.accuracy, tuple(before.metrics.items())


def _curves(runs: Named) -> Plot:
    """Draw loss and accuracy of the trainings over their epochs."""
    title, named = "Training", (("loss", "Loss"), ("accuracy", "Accuracy on validation"))
    panels = [panel for panel in named if any(_points(r, panel[0]) for _, r in runs)]
    if not panels:
        return Plot("curves", title, "None of these runs was trained.")
    figure = canvas.blank(showlegend=True, legend={"orientation": "h", "y": -0.2})
    for place, (key, _) in enumerate(panels):
        number = "2" if place else ""
        for index, (name, report) in enumerate(runs):
            points = _points(report, key)
            figure.add_scatter(
                x=[point["epoch"] for point in points],
                y=canvas.digits([point[key] for point in points]),
                name=canvas.text(name), legendgroup=str(index), showlegend=not place,
                line={"color": colour(index / max(1, len(runs) - 1))}, mode="lines+markers",
                xaxis=f"x{number}", yaxis=f"y{number}",
            )  # fmt: skip
        axes = {
            f"xaxis{number}": {"title": {"text": "epoch"}},
            f"yaxis{number}": {"automargin": True},
        }
        figure.update_layout(axes)
    titles = [label for _, label in panels]
    wide = canvas.panels(titles, len(titles), panel=260, bottom=90)
    narrow = canvas.panels(titles, 1, bottom=90)
    drawn = canvas.fit(canvas.style(figure), wide, narrow)
    return Plot("curves", title, "A line for every run that was trained.", drawn)


def _points(report: Report, key: str) -> list[dict[str, Any]]:
    """Return the epochs of a run, without its control, at which something was noted."""
    rows = [row for row in report.history if "loss" in row and not row.get("control")]
    return [row for row in rows if words.known(row.get(key))]


def _layers(runs: Named) -> str:
    """List what each layer became in every run."""
    names = list(dict.fromkeys(layer.layer for _, report in runs for layer in report.layers))
    found = [{layer.layer: layer for layer in report.layers} for _, report in runs]
    costly = [n for n in names if any(n in f and f[n].before.get("macs") for f in found)]
    body = ""
    for name in costly:
        cells = [cell(words.what(f[name]) if name in f else words.NONE) for f in found]
        body += f'<tr><th scope="row" class="name first">{escape(name)}</th>{"".join(cells)}</tr>'
    columns = [("layer", "first"), *((name, "") for name, _ in runs)]
    every = table("What each layer became", columns, body, tall=True, sort=True)
    heading = '<h2 id="head-layers">Layers</h2>'
    return f'<section class="long" aria-labelledby="head-layers">{heading}{every}</section>'
