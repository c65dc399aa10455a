"""Many networks beside one another: accuracy against what each costs, and a table to search."""

from __future__ import annotations

import csv
import io
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any
from urllib.parse import quote

from pliant.render import canvas, quantities, words
from pliant.render.canvas import AFTER, DENSE, Plot
from pliant.render.document import section, table

Row = Mapping[str, Any]
"""A network: ``name``, and any of accuracy, metric, score, unit, better, lost, params, macs, bytes,
latency_ms, seconds, note, link and ``chosen``."""

AXES = (
    ("params", "Size", "parameters", "%{x:,} parameters"),
    ("bytes", "Bytes", "bytes", "%{x:,} bytes"),
    ("latency_ms", "Time", "milliseconds", "%{x:.3g} ms"),
)
COSTS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("params", "params", words.human),
    ("macs", "MACs", words.human),
    ("bytes", "bytes", words.size),
    ("latency_ms", "ms", words.milliseconds),
    ("seconds", "took", words.seconds),
)


def front(rows: Sequence[Row], axis: str) -> list[Row]:
    """Return the networks that no other one beats in both cost and accuracy, by cost."""
    best: list[Row] = []
    for row in sorted(_drawn(rows, axis), key=lambda row: (row[axis], -_goodness(row))):
        if not best or _goodness(row) > _goodness(best[-1]):
            best.append(row)
    return best


def _drawn(rows: Sequence[Row], axis: str) -> list[Row]:
    return [r for r in rows if words.known(quantities.scored(r)) and words.known(r.get(axis))]


def _goodness(row: Row) -> float:
    """Return what a network scores, so that more is better."""
    value = quantities.scored(row) or 0.0
    return -value if row.get("better") == "lower" else value


def pareto(rows: Sequence[Row], title: str, name: str = "many") -> Plot:
    """Draw the score against every cost that was measured, with the line of the best."""
    metric = quantities.metric(rows)
    if metric == "score":
        return Plot(name, title, "These networks were judged by metrics that share no axis.")
    shown = [axis for axis in AXES if front(rows, axis[0])]
    if not shown:
        return Plot(name, title, "Nothing here has a score to draw.")
    first = front(rows, shown[0][0])[0]
    unit = "%" if first.get("unit", "share") == "share" else str(first["unit"])
    figure = canvas.blank(showlegend=False)
    for place, (axis, _, label, cost) in enumerate(shown):
        number = str(place + 1) if place else ""
        where = {"xaxis": f"x{number}", "yaxis": f"y{number}"}
        for kind, points, look in (
            (
                "tried",
                _drawn(rows, axis),
                {"mode": "markers", "marker": {"size": 8, "color": DENSE}},
            ),
            ("best", front(rows, axis), {"mode": "lines+markers", "line": {"color": AFTER}}),
        ):
            figure.add_scatter(
                name=kind, x=[row[axis] for row in points],
                y=canvas.digits([(100 if unit == "%" else 1) * score for score in
                                 map(quantities.scored, points) if score is not None]),
                customdata=[canvas.text(str(row["name"])) for row in points],
                hovertemplate=f"%{{y:.4g}} {unit} with {cost}<extra>%{{customdata}}</extra>",
                **look, **where,
            )  # fmt: skip
        figure.update_layout({f"xaxis{number}": {"title": {"text": label}, "nticks": 5}})
    score = ", ".join(filter(None, (canvas.text(metric), unit)))
    figure.update_layout(yaxis={"title": {"text": score}, "automargin": True})
    for place in range(1, len(shown)):
        figure.update_layout({f"yaxis{place + 1}": {"matches": "y"}})
    titles = [title for _, title, _, _ in shown]
    wide, narrow = canvas.panels(titles, len(titles), panel=280), canvas.panels(titles, 1)
    side = "lower" if first.get("better") == "lower" else "higher"
    said = (
        "The line joins the networks that no other beats in both; the "
        f"{side} and further left, the better."
    )
    return Plot(name, title, said, canvas.fit(canvas.style(figure), wide, narrow))


def listing(rows: Sequence[Row], label: str) -> str:
    """Return a table that sorts by any column and filters by what is typed."""
    columns = [each for each in _columns(rows) if any(each[1](row) is not None for row in rows)]
    noted = any(row.get("note") for row in rows)
    names = [("network", "first"), *((head, "number") for head, _, _ in columns)]
    body = "".join(_line(row, columns, noted=noted) for row in rows)
    return table(label, names + ([("", "")] if noted else []), body, tall=True, sort=True)


def _columns(rows: Sequence[Row]) -> list[tuple[str, Callable[[Row], Any], Callable[[Row], str]]]:
    """Return the columns of a table: a name, the number that sorts, and its text."""

    def cost(key: str, head: str, write: Callable[[Any], str]) -> Any:
        return head, lambda row: row.get(key), lambda row: write(row.get(key))

    metric = quantities.metric(rows)
    text = quantities.named_score if metric == "score" else quantities.score
    score = metric, quantities.scored, text
    lost = "points lost", lambda row: row.get("lost"), quantities.lost
    return [score, lost, *(cost(*each) for each in COSTS)]


def _line(row: Row, columns: Iterable[tuple[str, Any, Any]], *, noted: bool) -> str:
    name, link = escape(str(row["name"])), row.get("link")
    if link:  # a path, whatever its parts are called: no scheme, no fragment
        name = f'<a href="{escape(quote(str(link), safe="/="))}">{name}</a>'
    cells = [f'<th scope="row" class="name first">{name}</th>']
    for _, number, write in columns:
        value = number(row)
        sort = "" if value is None else f' data-value="{float(value)!r}"'
        cells.append(f'<td class="number"{sort}>{escape(write(row))}</td>')
    if noted:
        cells.append(f'<td class="why">{escape(str(row.get("note") or ""))}</td>')
    return f'<tr class="{"" if row.get("chosen", True) else "left"}">{"".join(cells)}</tr>'


def download(rows: Sequence[Row]) -> str:
    """Return a link that holds the rows as a file of comma-separated values."""
    names = list(dict.fromkeys(key for row in rows for key in row if key != "link"))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    coded = b64encode(text.getvalue().encode()).decode()
    return (
        f'<p><a download="networks.csv" href="data:text/csv;base64,{coded}">Download as CSV</a></p>'
    )


def together(rows: Sequence[Row], title: str, label: str, name: str = "many") -> str:
    """Return a section with the figure, the table and the download; nothing without rows."""
    if not rows:
        return ""
    return section(pareto(rows, title, name), listing(rows, label), download(rows), kind="long")
