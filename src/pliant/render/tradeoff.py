"""What accuracy costs: the network dense, after, in between and at every size it holds."""

from collections.abc import Iterator, Sequence
from typing import Any

import plotly.graph_objects as go

from pliant.render import canvas, tables, words
from pliant.render.canvas import AFTER, DENSE, Plot
from pliant.render.tables import StageRow
from pliant.result import Report, Side

TITLE = "Size, accuracy and time"
PANELS = (
    ("params", "Size", "parameters", "%{x:,} parameters"),
    ("latency_ms", "Time", "milliseconds", "%{x:.3g} ms"),
)
ROOM = 0.14  # around the points, for their names
LEAST = 2.0  # percent that the axis of accuracy spans: less is often noise, and shall look small
Points = Sequence[Side | StageRow]


def has_tradeoff(report: Report) -> bool:
    """Say whether there is more to show than two networks and their parameters."""
    return bool(report.sizes or tables.stages(report) or report.after.latency_ms is not None)


def tradeoff(report: Report) -> Plot:
    """Draw accuracy against parameters and, where a target was named, milliseconds."""
    shown = [panel for panel in PANELS if any(_on(rows, panel[0]) for _, rows, _ in _all(report))]
    if not shown:
        said = "There is no accuracy to draw: a test or validation split with classes gives it."
        return Plot("tradeoff", TITLE, said)
    figure = canvas.blank(showlegend=False)
    for number, (axis, _, label, unit) in zip(("", "2"), shown, strict=False):
        for name, rows, look in _all(report):
            if trace := _trace(name, rows, axis, unit):
                figure.add_scatter(**trace, **look, xaxis=f"x{number}", yaxis=f"y{number}")
        x = {"title": {"text": label}, "range": _from_zero(figure, f"x{number}"), "nticks": 6}
        figure.update_layout({f"xaxis{number}": x})
    y = {"title": {"text": "accuracy, %"}, "range": _around(figure), "automargin": True}
    figure.update_layout(yaxis=y)
    if len(shown) > 1:
        figure.update_layout(yaxis2={"matches": "y"})
    titles = [title for _, title, _, _ in shown]
    wide, narrow = canvas.panels(titles, len(titles), panel=280), canvas.panels(titles, 1)
    return Plot("tradeoff", TITLE, _caption(report), canvas.fit(canvas.style(figure), wide, narrow))


def _all(report: Report) -> Iterator[tuple[str, Points, dict[str, Any]]]:
    """Yield what is drawn, the most important last: a name, networks, and how they look."""
    line = {"mode": "lines+markers", "marker": {"size": 7}}
    yield "stages", tables.stages(report), {**line, "line": {"color": DENSE, "dash": "dot"}}
    yield "sizes", report.sizes, {**line, "line": {"color": AFTER, "width": 2}}
    yield "dense", [report.before], _named("dense", DENSE, "top center")
    yield "after", [report.after], _named("after", AFTER, "bottom right")


def _named(name: str, tint: str, place: str) -> dict[str, Any]:
    look = {"size": 12, "color": tint}
    return {
        "mode": "markers+text", "marker": look, "text": [name], "textposition": place,
        "cliponaxis": False,
    }  # fmt: skip


def _on(rows: Points, axis: str) -> list[int]:
    """Return the places of the networks that have an accuracy and a cost on an axis."""
    return [
        place
        for place, row in enumerate(rows)
        if words.known(row.accuracy) and getattr(row, axis, None) is not None
    ]


def _trace(name: str, rows: Points, axis: str, unit: str) -> dict[str, Any]:
    places = _on(rows, axis)
    if not places:
        return {}
    kept = [rows[place] for place in places]
    return {
        "name": name,
        "x": [getattr(row, axis) for row in kept],
        "y": canvas.digits([100 * row.accuracy for row in kept if row.accuracy is not None]),
        "customdata": [_label(name, rows, place) for place in places],
        "hovertemplate": "%{y:.4g} % with " + unit + "<extra>%{customdata}</extra>",
    }


def _label(name: str, rows: Points, place: int) -> str:
    """Say which network a point is."""
    row = rows[place]
    if isinstance(row, StageRow):
        return canvas.text(row.name)
    return f"size {place + 1} of {len(rows)}" if name == "sizes" else name


def _from_zero(figure: go.Figure, axis: str) -> list[float]:
    most = max(x for trace in figure.data if trace.xaxis == axis for x in trace.x)
    return [0, (1 + ROOM) * most or 1]


def _around(figure: go.Figure) -> list[float]:
    values = [y for trace in figure.data for y in trace.y]
    span = max(values) - min(values)
    room = max(ROOM * span, (LEAST - span) / 2)
    return [min(values) - room, max(values) + room]


def _caption(report: Report) -> str:
    said = "The higher and the further left, the better."
    if report.sizes:
        said += f" The line is the one file at each of its {len(report.sizes)} sizes."
    if any(words.known(row.accuracy) for row in tables.stages(report)):
        said += " Dotted: from stage to stage of the chain."
    return said
