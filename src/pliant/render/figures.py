"""The figures of a report: what the network cost, how its ranks fell, how it was trained."""

from collections.abc import Callable, Sequence
from typing import Any

import plotly.graph_objects as go

from pliant.render import canvas, tables, words
from pliant.render.canvas import AFTER, BUDGET, DENSE, Plot
from pliant.render.spectra import ranks, spectrum
from pliant.render.tradeoff import has_tradeoff, tradeoff
from pliant.result import LayerRow, Report

BARS = 60  # layers in the bar chart
TINTS = {"training": AFTER, "validation": BUDGET}
POINTS = 400  # of one training curve
CURVES: tuple[tuple[str, dict[str, str]], ...] = (
    ("Loss", {"loss": "training", "val_loss": "validation"}),
    ("Accuracy, %", {"accuracy": "validation", "train_accuracy": "training"}),
    ("Learning rate", {"lr": "learning rate"}),
    ("Strength of the penalty (alpha)", {"alpha": "alpha"}),
)


def plots(report: Report) -> dict[str, Plot]:
    """Return all figures by name; one without data has a caption that says what is missing.

    Only chains have a waterfall, and only what was measured in time, in stages or at several
    sizes has a trade-off to draw.
    """
    makers: tuple[Callable[[Report], Plot], ...] = (
        costs, spectrum, ranks, training, layers, stages,
    )  # fmt: skip
    if tables.stages(report):
        makers = (*makers, waterfall)
    if has_tradeoff(report):
        makers = (*makers, tradeoff)
    return {plot.name: plot for plot in (make(report) for make in makers)}


def costs(report: Report) -> Plot:
    """Draw every cost after compressing in percent of the dense network's."""
    rows = []
    for axis, label, write in reversed(words.COSTS):
        before, after = getattr(report.before, axis), getattr(report.after, axis)
        if before and after is not None:
            rows.append((axis, label, 100 * after / before, write(before), write(after)))
    if not rows:
        return Plot("costs", "Costs", "No cost was measured on both sides.")
    figure = canvas.blank(barmode="group", bargap=0.3, bargroupgap=0.08)
    names = [row[1] for row in rows]
    after = [f"{row[4]} ({row[2]:.3g} %)" for row in rows]
    figure.add_bar(**_bars("after", names, [row[2] for row in rows], after, AFTER))
    figure.add_bar(**_bars("dense", names, [100.0] * len(rows), [row[3] for row in rows], DENSE))
    _budget_marks(figure, report, rows)
    figure.update_layout(xaxis={"title": {"text": "% of the dense network"}, "rangemode": "tozero"})
    figure.update_layout(yaxis={"automargin": True})
    top = max(100.0, *(row[2] for row in rows))
    legend = {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0, "traceorder": "reversed"}
    figure.update_layout(legend=legend)
    height = 66 * len(rows) + 90
    wide = {"height": height, "xaxis.range": [0, 1.2 * top]}
    narrow = {"height": height, "xaxis.range": [0, 1.5 * top]}
    caption = "Each cost as a share of the dense network's; absolute numbers beside the bars."
    if report.budget:
        caption += " The mark on a grey bar is the budget."
    return Plot(
        "costs",
        "Costs before and after",
        caption,
        canvas.fit(canvas.style(figure, lying=True), wide, narrow),
    )


def _bars(name: str, y: list[str], x: list[float], text: list[str], colour: str) -> dict[str, Any]:
    return {
        "name": name, "y": y, "x": x, "text": text, "orientation": "h", "textposition": "outside",
        "cliponaxis": False, "marker": {"color": colour},
        "hovertemplate": "%{y}: %{text}<extra>" + name + "</extra>",
    }  # fmt: skip


def _budget_marks(figure: go.Figure, report: Report, rows: Sequence[tuple[Any, ...]]) -> None:
    """Mark on a dense bar how much of it is allowed."""
    for place, (axis, *_) in enumerate(rows):
        key = "latency" if axis == "latency_ms" else axis
        limit = words.allowed(report, key) if key in report.budget else None
        if limit is not None:
            share = 100 * limit / getattr(report.before, axis)
            figure.add_shape(
                type="line", x0=share, x1=share, y0=place - 0.02, y1=place + 0.4,
                line={"color": BUDGET, "width": 3},
            )  # fmt: skip


def training(report: Report) -> Plot:
    """Draw loss, accuracy, learning rate and alpha over the steps, phases shaded."""
    title = "Training"
    runs = [
        _clock([row for row in report.history if bool(row.get("control")) is side])
        for side in (False, True)
    ]
    shown = [(name, keys) for name, keys in CURVES if any(_has(runs[0], key) for key in keys)]
    if not shown:
        return Plot("training", title, "There are no training curves: nothing was trained.")
    figure = canvas.blank(shapes=_phases(runs[0], len(shown)))
    for index, (name, keys) in enumerate(shown):
        number = "" if index == 0 else str(index + 1)
        scale = 100 if name.startswith("Accuracy") else 1
        for run, suffix, dash in ((runs[0], "", "solid"), (runs[1], " (control)", "dot")):
            for key, label in keys.items():
                if _has(run, key):
                    trace = _curve(run, key, label + suffix, scale)
                    line = {
                        "color": DENSE if suffix else TINTS.get(label, AFTER),
                        "dash": dash,
                        "width": 2,
                    }
                    figure.add_scatter(**trace, line=line, xaxis=f"x{number}", yaxis=f"y{number}")
        x = {"title": {"text": "step"}, "range": [0, max(row["time"] for row in runs[0]) or 1]}
        figure.update_layout({f"xaxis{number}": x, f"yaxis{number}": {"automargin": True}})
    titles = [name for name, _ in shown]
    wide = canvas.panels(titles, 2 if len(titles) > 1 else 1, panel=210)
    narrow = canvas.panels(titles, 1, panel=190)
    figure.update_layout(showlegend=False)
    caption = "Shaded by phase: training in blue, validation in orange."
    if any(trace.line.dash == "dot" for trace in figure.data):
        caption += " Dotted: the control run without the penalty."
    return Plot("training", title, caption, canvas.fit(canvas.style(figure), wide, narrow))


def _has(rows: Sequence[dict[str, Any]], key: str) -> bool:
    return any(isinstance(row.get(key), (int, float)) for row in rows)


def _clock(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add to each row its time, which goes on where a later phase counts steps from 0 again."""
    offset, last, timed = 0, 0, []
    for row in rows:
        step = int(row.get("step", 0))
        if step < last:
            offset += last
        last = step
        timed.append({**row, "time": offset + step})
    return timed


def _curve(rows: Sequence[dict[str, Any]], key: str, name: str, scale: float) -> dict[str, Any]:
    kept = canvas.thin([row for row in rows if isinstance(row.get(key), (int, float))], POINTS)
    return {
        "name": name, "mode": "lines" if len(kept) > 20 else "lines+markers", "marker": {"size": 5},
        "x": [row["time"] for row in kept], "y": canvas.digits([scale * row[key] for row in kept]),
        "customdata": [row.get("epoch") for row in kept],
        "hovertemplate": "%{y:.4g} at step %{x}, epoch %{customdata}<extra>" + name + "</extra>",
    }  # fmt: skip


def _phases(rows: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Return a shaded box for each phase in each panel."""
    spans: list[list[Any]] = []
    for row in rows:
        if "phase" in row and (not spans or spans[-1][0] != row["phase"]):
            start = spans[-1][2] if spans else 0
            spans.append([row["phase"], start, row["time"]])
        elif "phase" in row:
            spans[-1][2] = row["time"]
    axes = ["" if index == 0 else str(index + 1) for index in range(count)]
    return [
        _shade(span[0], span[1], span[2], axis)
        for span in spans
        if span[1] < span[2]
        for axis in axes
    ]


def _shade(phase: str, start: int, end: int, axis: str) -> dict[str, Any]:
    return {
        "type": "rect", "layer": "below", "line": {"width": 0}, "opacity": 0.1,
        "fillcolor": canvas.SHADES.get(phase, DENSE), "x0": start, "x1": end, "xref": f"x{axis}",
        "y0": 0, "y1": 1, "yref": f"y{axis} domain", "label": {
            "text": canvas.text(str(phase)), "textposition": "top center", "font": {"size": 11}
        },
    }  # fmt: skip


def layers(report: Report) -> Plot:
    """Draw the parameters of every layer before and after, one bar each."""
    title = "Parameters, layer by layer"
    rows = _bar_rows(report.layers)
    if not rows:
        return Plot("layers", title, "No layer has parameters.")
    names, places = [canvas.text(canvas.short(row.layer)) for row in rows], list(range(len(rows)))
    hover = [f"{canvas.text(row.layer)}: {canvas.text(words.what(row))}" for row in rows]
    figure = canvas.blank(barmode="overlay", bargap=0.25)
    for label, side, tint, opacity, width in (
        ("dense", "before", DENSE, 0.45, 0.72), ("after", "after", AFTER, 1, 0.5),
    ):  # fmt: skip
        values = [getattr(row, side).get("params", 0) for row in rows]
        figure.add_bar(
            name=label, y=places, x=values, orientation="h", marker={"color": tint},
            opacity=opacity, customdata=hover, width=width,
            hovertemplate="%{customdata}<br>%{x:,} parameters<extra>" + label + "</extra>",
        )  # fmt: skip
    figure.update_layout(
        yaxis={"range": [len(rows) - 0.4, -0.6], "automargin": True, "tickmode": "array"},
        yaxis_tickvals=places,
        yaxis_ticktext=names,
        xaxis={"title": {"text": "parameters"}, "nticks": 6},
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
    )
    height = 20 * len(rows) + 100
    caption = "Parameters of each layer, dense and after; pointing at a bar tells the layer's form."
    if len(rows) < sum(1 for row in report.layers if row.before.get("params")):
        caption += " Layers too small to see are in the table only."
    wide, narrow = (
        {"height": height, "yaxis.tickfont.size": 12},
        {"height": height, "yaxis.tickfont.size": 10},
    )
    return Plot(
        "layers", title, caption, canvas.fit(canvas.style(figure, lying=True), wide, narrow)
    )


def _bar_rows(rows: Sequence[LayerRow]) -> list[LayerRow]:
    """Return the layers worth a bar: changed, or not tiny; the largest if there are many."""
    most = max((row.before.get("params", 0) for row in rows), default=0)
    seen = [
        row
        for row in rows
        if row.before.get("params", 0) > 0
        and (words.is_changed(row) or row.before["params"] >= 0.01 * most)
    ]
    large = sorted(seen, key=lambda row: -row.before["params"])[:BARS]
    return [row for row in seen if row in large]


def waterfall(report: Report) -> Plot:
    """Draw the size of the file and the accuracy after each stage of a chain."""
    rows = tables.stages(report)
    figure = canvas.blank(bargap=0.35)
    sizes = [float(row.bytes) for row in rows]
    labels = [f"{words.size(row.bytes)}{row.said}" for row in rows]
    figure.add_bar(**_bars("bytes", [canvas.text(r.name) for r in rows], sizes, labels, AFTER))
    figure.update_layout(
        yaxis={"autorange": "reversed", "automargin": True, "type": "category"},
        xaxis={"title": {"text": "bytes on disk"}, "rangemode": "tozero"},
        showlegend=False,
    )
    height, top = 40 * len(rows) + 90, max(sizes)
    wide = {"height": height, "xaxis.range": [0, 1.35 * top]}
    narrow = {"height": height, "xaxis.range": [0, 2.0 * top]}
    caption = "The file after each stage of the chain, and what the network scored then."
    return Plot(
        "waterfall",
        "Stage by stage",
        caption,
        canvas.fit(canvas.style(figure, lying=True), wide, narrow),
    )


def stages(report: Report) -> Plot:
    """Draw the seconds of each stage."""
    title = "How it ran"
    rows = [(name, value) for name, value in report.seconds.items() if value is not None]
    if not rows:
        return Plot("stages", title, "No times were recorded.")
    figure = canvas.blank(bargap=0.35)
    values = [value for _, value in rows]
    labels = [words.seconds(value) for value in values]
    names = [canvas.text(name.replace("_", " ")) for name, _ in rows]
    figure.add_bar(**_bars("seconds", names, canvas.digits(values), labels, AFTER))  # type: ignore[arg-type]  # none is None
    figure.update_layout(
        yaxis={"autorange": "reversed", "automargin": True, "type": "category"},
        xaxis={"title": {"text": "seconds"}, "rangemode": "tozero"},
        showlegend=False,
    )
    height, top = 34 * len(rows) + 90, max(values) or 1
    wide = {"height": height, "xaxis.range": [0, 1.12 * top]}
    narrow = {"height": height, "xaxis.range": [0, 1.3 * top]}
    caption = f"{words.seconds(sum(values))} in all, on {report.device}."
    return Plot(
        "stages", title, caption, canvas.fit(canvas.style(figure, lying=True), wide, narrow)
    )
