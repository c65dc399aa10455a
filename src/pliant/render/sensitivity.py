"""What every layer is worth, as one HTML page: a picture, a table, and a what-if."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from pliant.render import canvas, words
from pliant.render.canvas import Plot
from pliant.render.document import document, facts, section, table
from pliant.result import Finding

Row = Mapping[str, Any]
SUM = (
    "Predictions add up what each layer cost alone. Layers make up for one another or get in each "
    "other's way, so take them for the order in which to try, and measure what you choose."
)


def sensitivity_html(found: Finding, *, model: str = "", data: str = "", version: str = "") -> str:
    """Return what `pliant.api.sensitivity` found as one self-contained HTML page.

    Args:
        found: what it gave.
        model: what the network is called.
        data: what the data are called.
        version: of pliant.
    """
    layers = by_layer(found.rows)
    kind = str(found.method.get("name", "sensitivity")).rpartition(" ")[2]
    about = {"network": model, "data": data, "seed": str(found.seed)}
    about |= {"time": words.seconds(found.seconds)}
    main = "\n".join((
        _what_if(found, layers),
        section(picture(found, layers)),
        '<section aria-labelledby="head-run"><h2 id="head-run">Run</h2>'
        + facts([(name, text) for name, text in about.items() if text] + _dense(found))
        + "</section>",
    ))  # fmt: skip
    title = f"What the {kind} of every layer is worth" + (f" to {model}" if model else "")
    return document("Sensitivity", title, f"<p>{escape(found.text)}</p>", main, version)


def by_layer(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the rows of each layer, in the order of the network, the largest size first."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(str(row["layer"]), []).append(row)
    return {name: sorted(each, key=lambda row: -row["share"]) for name, each in found.items()}


def shares_of(rows: Sequence[Row]) -> list[float]:
    """Return the shares that were tried, the largest first."""
    return sorted({float(row["share"]) for row in rows}, reverse=True)


def picture(found: Finding, layers: Mapping[str, Sequence[Row]]) -> Plot:
    """Draw what is lost against how much of a layer stays, a line for every layer."""
    title = "What a layer costs when it shrinks alone"
    if not layers:
        return Plot("sensitivity", title, "No layer can be made smaller at these shares.")
    figure = canvas.blank(showlegend=len(layers) <= 12, legend={"orientation": "h", "y": -0.25})
    for place, (name, rows) in enumerate(layers.items()):
        figure.add_scatter(
            name=canvas.text(canvas.short(name)),
            x=[100] + [100 * row["share"] for row in rows],
            y=canvas.digits([0.0] + [_finite(row["lost"]) for row in rows]),
            customdata=["as it is"] + [canvas.text(str(row["became"])) for row in rows],
            hovertemplate="%{y:.3g} lost at %{x:.0f} %: %{customdata}",
            mode="lines+markers", line={"color": canvas.colour(place / max(1, len(layers) - 1))},
        )  # fmt: skip
    figure.update_layout(
        xaxis={"title": {"text": "of the layer stays, %"}, "autorange": "reversed"},
        yaxis={"title": {"text": "lost"}, "automargin": True},
    )
    said = "Blue lines are layers near the input, orange ones near the output. Low lines can go."
    bottom = 110 if len(layers) <= 12 else canvas.BOTTOM
    wide = canvas.panels([""], 1, panel=360, bottom=bottom)
    narrow = canvas.panels([""], 1, panel=300, bottom=bottom + 40 * (len(layers) <= 12))
    return Plot("sensitivity", title, said, canvas.fit(canvas.style(figure), wide, narrow))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _dense(found: Finding) -> list[tuple[str, str]]:
    return [(name, f"{value:,.6g}") for name, value in found.values.items()]


def _what_if(found: Finding, layers: Mapping[str, Sequence[Row]]) -> str:
    """Let a share be chosen for every layer, and add up what was measured."""
    if not layers:
        return ""
    shares = shares_of(found.rows)
    data = {
        "params": found.values["params"],
        "macs": found.values["macs"],
        "loss": found.values.get("loss"),
        "layers": {
            name: [
                [row["share"], row["params"], row["macs"], _finite(row["lost"]),
                 _finite(row["loss"]), str(row["became"])]
                for row in rows
            ]
            for name, rows in layers.items()
        },
    }  # fmt: skip
    plain = json.dumps(data)
    for mark in "<>&":
        plain = plain.replace(mark, f"\\u{ord(mark):04x}")
    cards = "".join(
        f'<div class="card"><dt>{label}</dt><dd class="big" data-sum="{key}">–</dd>'
        f'<dd class="small" data-from="{key}"></dd></div>'
        for key, label in (
            ("params", "Parameters"), ("macs", "MACs"),
            ("lost", "Lost, predicted"), ("loss", "Loss, predicted"),
        )
    )  # fmt: skip
    every = "".join(f'<option value="{share!r}">{share:.0%}</option>' for share in (1.0, *shares))
    columns = [("layer", "first"), ("stays", ""), ("becomes", "")]
    columns += [(f"at {share:.0%}", "number") for share in shares]
    body = "".join(_line(name, rows, shares) for name, rows in layers.items())
    return (
        '<section class="long" aria-labelledby="head-what-if"><h2 id="head-what-if">What if</h2>'
        f'<p class="caption">{escape(SUM)}</p>'
        "<noscript><p>Choosing needs JavaScript; the table holds every number.</p></noscript>"
        f'<dl class="cards" aria-live="polite">{cards}</dl>'
        f'<p><label class="pick">All layers at <select data-all>{every}</select></label> '
        '<label class="pick">Each may lose up to <input type="range" data-most min="0" max="100" '
        'value="0"> <output data-most-said></output></label></p>'
        '<p class="caption">Below: what the network loses when a layer alone is made that small, '
        "in points, or in percent of a metric that is no share.</p>"
        f"{table('What every layer costs at every size', columns, body, tall=True, sort=True)}"
        '<p class="caption" data-spec></p>'
        f'<script type="application/json" id="what-if">{plain}</script></section>'
    )


def _line(name: str, rows: Sequence[Row], shares: Sequence[float]) -> str:
    choices = '<option value="1">100%</option>' + "".join(
        f'<option value="{row["share"]!r}">{row["share"]:.0%}</option>' for row in rows
    )
    known = {row["share"]: row for row in rows}
    cells = ""
    for share in shares:
        row = known.get(share)
        value = None if row is None else _finite(row["lost"])
        sort = "" if value is None else f' data-value="{value!r}"'
        cells += f'<td class="number"{sort}>{words.NONE if value is None else f"{value:.2f}"}</td>'
    label = escape(name)
    return (
        f'<tr data-layer="{label}"><th scope="row" class="name first">{label}</th>'
        f'<td data-value="1"><span class="pick"><select aria-label="{label} stays at">{choices}'
        f'</select></span></td><td class="why" data-became>as it is</td>{cells}</tr>'
    )
