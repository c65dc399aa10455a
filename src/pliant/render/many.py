"""Many networks beside one another: accuracy against what each costs, and a table to search."""

from __future__ import annotations

import csv
import io
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from pliant.render import canvas, words
from pliant.render.canvas import AFTER, DENSE, Plot
from pliant.render.document import section, table

Row = Mapping[str, Any]
"""A network: ``name``, and any of accuracy, lost, params, macs, bytes, latency_ms, seconds, note,
link and ``chosen``."""

AXES = (
    ("params", "Size", "parameters", "%{x:,} parameters"),
    ("bytes", "Bytes", "bytes", "%{x:,} bytes"),
    ("latency_ms", "Time", "milliseconds", "%{x:.3g} ms"),
)
COLUMNS: tuple[tuple[str, str, Any], ...] = (
    ("accuracy", "accuracy", lambda value: words.percent(value, 2)),
    ("lost", "points lost", lambda value: words.NONE if value is None else f"{value:.2f}"),
    ("params", "params", words.human),
    ("macs", "MACs", words.human),
    ("bytes", "bytes", words.size),
    ("latency_ms", "ms", words.milliseconds),
    ("seconds", "took", words.seconds),
)


def front(rows: Sequence[Row], axis: str) -> list[Row]:
    """Return the networks that no other one beats in both cost and accuracy, by cost."""
    known = [row for row in rows if words.known(row.get("accuracy")) and row.get(axis) is not None]
    best: list[Row] = []
    for row in sorted(known, key=lambda row: (row[axis], -row["accuracy"])):
        if not best or row["accuracy"] > best[-1]["accuracy"]:
            best.append(row)
    return best


def pareto(rows: Sequence[Row], title: str, name: str = "many") -> Plot:
    """Draw accuracy against every cost that was measured, with the line of the best."""
    shown = [axis for axis in AXES if front(rows, axis[0])]
    if not shown:
        return Plot(name, title, "Nothing here has an accuracy to draw.")
    figure = canvas.blank(showlegend=False)
    for place, (axis, _, label, unit) in enumerate(shown):
        number = str(place + 1) if place else ""
        where = {"xaxis": f"x{number}", "yaxis": f"y{number}"}
        rest = [r for r in rows if words.known(r.get("accuracy")) and r.get(axis) is not None]
        for kind, points, look in (
            ("tried", rest, {"mode": "markers", "marker": {"size": 8, "color": DENSE}}),
            ("best", front(rows, axis), {"mode": "lines+markers", "line": {"color": AFTER}}),
        ):
            figure.add_scatter(
                name=kind, x=[row[axis] for row in points],
                y=canvas.digits([100 * row["accuracy"] for row in points]),
                customdata=[canvas.text(str(row["name"])) for row in points],
                hovertemplate="%{y:.4g} % with " + unit + "<extra>%{customdata}</extra>",
                **look, **where,
            )  # fmt: skip
        figure.update_layout({f"xaxis{number}": {"title": {"text": label}, "nticks": 5}})
    figure.update_layout(yaxis={"title": {"text": "accuracy, %"}, "automargin": True})
    for place in range(1, len(shown)):
        figure.update_layout({f"yaxis{place + 1}": {"matches": "y"}})
    titles = [title for _, title, _, _ in shown]
    wide, narrow = canvas.panels(titles, len(titles), panel=280), canvas.panels(titles, 1)
    said = (
        "The line joins the networks that no other beats in both; the higher and left, the better."
    )
    return Plot(name, title, said, canvas.fit(canvas.style(figure), wide, narrow))


def listing(rows: Sequence[Row], label: str) -> str:
    """Return a table that sorts by any column and filters by what is typed."""
    columns = [column for column in COLUMNS if any(row.get(column[0]) is not None for row in rows)]
    noted = any(row.get("note") for row in rows)
    names = [("network", "first"), *((head, "number") for _, head, _ in columns)]
    body = "".join(_line(row, columns, noted=noted) for row in rows)
    return table(label, names + ([("", "")] if noted else []), body, tall=True, sort=True)


def _line(row: Row, columns: Iterable[tuple[str, str, Any]], *, noted: bool) -> str:
    name, link = escape(str(row["name"])), row.get("link")
    if link:
        name = f'<a href="{escape(link)}">{name}</a>'
    cells = [f'<th scope="row" class="name first">{name}</th>']
    for key, _, write in columns:
        value = row.get(key)
        sort = "" if value is None else f' data-value="{float(value)!r}"'
        cells.append(f'<td class="number"{sort}>{escape(write(value))}</td>')
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
