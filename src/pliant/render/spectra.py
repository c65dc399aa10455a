"""The paper's pictures: singular values of a layer, and the rank of every layer, by epoch."""

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from pliant.render import canvas
from pliant.render.canvas import Plot
from pliant.result import LayerRow, Report

EPOCHS = 12  # lines in one panel
LAYERS = 12  # choices of the spectrum figure
POINTS = 160  # singular values of one line
SIDES = {"in": "input channels", "out": "output channels"}
RANK_SIDE = {"input": ("in",), "output": ("out",), "tucker2": ("in", "out"), "svd": ("in", "out")}
Rows = Sequence[Mapping[str, Any]]
Lines = list[tuple[int, list[float]]]  # (epoch, singular values)


def spectrum(report: Report) -> Plot:
    """Draw the singular values of a layer, one line per epoch, with a choice of layers.

    With a control run in the history, the panels are with and without the penalty; else the two
    unfoldings of the kernel.
    """
    title = "Singular values while training"
    rows, control = _split(report.history, "spectra")
    chosen = interesting(report, rows)
    if not chosen:
        return Plot("spectrum", title, "There are no spectra: the method recorded none.")
    choices = _choices(chosen, rows, control)
    first, last = _ends(rows)
    figure = canvas.blank(coloraxis=canvas.epoch_bar(first, last))
    _draw(figure, choices[0][1], first, last)
    marks = _marks({row.layer: row for row in report.layers})
    figure.update_layout(shapes=_lines(marks, choices[0][2]), showlegend=False)
    if len(choices) > 1:
        figure.update_layout(updatemenus=[_menu(choices, marks)])
    titles = _titles(control)
    for number in ("", "2"):
        figure.update_layout(
            {f"xaxis{number}": {"title": {"text": "index"}, "rangemode": "tozero"}}
        )
    figure.update_layout(
        yaxis={"title": {"text": "singular value"}, "rangemode": "tozero"},
        yaxis2={"matches": "y"},
        xaxis2={"matches": "x"} if control else {},
    )
    wide = canvas.panels(titles, 2, panel=320, bottom=108)
    narrow = canvas.panels(titles, 1, panel=230, bottom=108)
    for layout in (wide, narrow):
        layout["margin.b"] = 108
    caption = _caption(report, len(chosen), control=bool(control))
    return Plot("spectrum", title, caption, canvas.fit(canvas.style(figure), wide, narrow))


def still(report: Report) -> tuple[str, list[str], list[Lines]] | None:
    """Return what the spectrum figure shows first: a layer, its panels' titles and lines."""
    rows, control = _split(report.history, "spectra")
    chosen = interesting(report, rows)
    if not chosen:
        return None
    label, panels, _ = _choices(chosen[:1], rows, control)[0]
    return label, _titles(control), panels


def _titles(control: Rows) -> list[str]:
    return ["with the penalty", "without the penalty"] if control else list(SIDES.values())


def _caption(report: Report, count: int, *, control: bool) -> str:
    said = "Singular values of a kernel's channel unfoldings, one line per epoch, early to late."
    if control:
        said += (
            " Beside the compressed run: the same training without the penalty, on the same axes."
        )
    said += " The dashed line is the rank that was kept, where the form has one."
    return said + (f" The {count} layers that lost most parameters." if count == LAYERS else "")


def interesting(report: Report, rows: Rows) -> list[str]:
    """Return the layers with spectra that lost most parameters, the one that lost most first."""
    seen = {layer for row in rows for layer in row["spectra"]}
    lost = {row.layer: row.before["params"] - row.after["params"] for row in report.layers}
    size = {row.layer: row.before["params"] for row in report.layers}
    order = sorted(seen, key=lambda layer: (-lost.get(layer, 0), -size.get(layer, 0), layer))
    place = {row.layer: index for index, row in enumerate(report.layers)}
    top = order[:1]
    return top + sorted(order[1:LAYERS], key=lambda layer: place.get(layer, 0))


def _split(history: Rows, key: str) -> tuple[Rows, Rows]:
    """Return the rows with a key, thinned to few epochs: of the run, and of its control."""
    rows = [row for row in history if row.get(key)]
    sides: tuple[list[Any], list[Any]] = ([], [])
    for row in rows:
        sides[bool(row.get("control"))].append(row)
    return canvas.thin(sides[0], EPOCHS), canvas.thin(sides[1], EPOCHS)


def _ends(rows: Rows) -> tuple[int, int]:
    epochs = [int(row.get("epoch", 0)) for row in rows]
    return min(epochs), max(epochs)


def _lines_of(rows: Rows, layer: str, side: str) -> Lines:
    found = []
    for row in rows:
        values = row["spectra"].get(layer, {}).get(side)
        if values:
            found.append((int(row.get("epoch", 0)), list(values)))
    return found


Choice = tuple[str, list[Lines], list[tuple[str, str]]]  # label, panels, (layer, side) of each


def _choices(chosen: Sequence[str], rows: Rows, control: Rows) -> list[Choice]:
    if not control:
        return [
            (layer, [_lines_of(rows, layer, side) for side in SIDES], [(layer, s) for s in SIDES])
            for layer in chosen
        ]
    return [
        (
            f"{layer}, {SIDES[side]}",
            [_lines_of(part, layer, side) for part in (rows, control)],
            [(layer, side)],
        )
        for layer in chosen
        for side in SIDES
        if _lines_of(rows, layer, side)
    ]


def _draw(figure: go.Figure, panels: Sequence[Lines], first: int, last: int) -> None:
    """Add EPOCHS lines to each panel; a choice with fewer leaves some of them empty."""
    for number, lines in zip(("", "2"), panels, strict=True):
        for epoch, x, y in _padded(lines):
            share = ((epoch or 0) - first) / max(1, last - first)
            figure.add_scatter(
                x=x, y=y, mode="lines", line={"color": canvas.colour(share), "width": 1.8},
                xaxis=f"x{number}", yaxis=f"y{number}", name=f"epoch {epoch}",
                hovertemplate="σ<sub>%{x}</sub> = %{y:.3g}<extra>%{fullData.name}</extra>",
            )  # fmt: skip
    figure.add_trace(canvas.carrier(first))


def _padded(lines: Lines) -> list[tuple[int | None, list[int], list[float | None]]]:
    rows: list[tuple[int | None, list[int], list[float | None]]] = []
    for epoch, values in lines:
        index = canvas.thin(range(len(values)), POINTS)
        rows.append((epoch, [i + 1 for i in index], canvas.digits([values[i] for i in index])))
    return rows + [(None, [], [])] * (EPOCHS - len(rows))


def _menu(choices: Sequence[Choice], marks: Mapping[tuple[str, str], int]) -> dict[str, Any]:
    """Return the drop-down: choosing puts another layer's numbers into the same lines."""
    buttons = []
    for label, panels, places in choices:
        lines = [line for panel in panels for line in _padded(panel)]
        data = {"x": [line[1] for line in lines], "y": [line[2] for line in lines]}
        layout = {"shapes": _lines(marks, places)}
        args = [data, layout, list(range(len(lines)))]
        buttons.append({"label": canvas.text(label), "method": "update", "args": args})
    return {"buttons": buttons, "name": "Layer", "x": 1, "xanchor": "right", "y": 1.12}


def _marks(rows: Mapping[str, LayerRow]) -> dict[tuple[str, str], int]:
    """Return the rank kept by layer and unfolding, where its form has one."""
    found = {}
    for layer, row in rows.items():
        ranks = row.ranks * 2 if row.form == "svd" else row.ranks  # one rank for both unfoldings
        for side, rank in zip(RANK_SIDE.get(row.form, ()), ranks, strict=False):
            found[layer, side] = rank
    return found


def _lines(marks: Mapping[tuple[str, str], int], places: Sequence[tuple[str, str]]) -> list[Any]:
    """Return a dashed vertical line at the kept rank of each panel."""
    lines = []
    for number, place in zip(("", "2"), places, strict=False):
        if place in marks:
            lines.append({
                "type": "line", "xref": f"x{number}", "x0": marks[place] + 0.5,
                "x1": marks[place] + 0.5, "yref": f"y{number} domain", "y0": 0, "y1": 1,
                "line": {"dash": "dash", "width": 1.5, "color": canvas.QUIET},
                "label": {"text": f"rank {marks[place]}", "textposition": "end",
                          "textangle": 0, "xanchor": "left", "yanchor": "top", "padding": 4},
            })  # fmt: skip
    return lines


def ranks(report: Report) -> Plot:
    """Draw the rank of every layer over the layers in order, one line per epoch."""
    title = "Rank of every layer while training"
    rows, _ = _split(report.history, "ranks")
    order = [row.layer for row in report.layers if any(row.layer in r["ranks"] for r in rows)]
    if not order:
        return Plot("ranks", title, "There are no ranks by epoch: the method recorded none.")
    first, last = _ends(rows)
    full = _full(rows, order, report.history)
    figure = canvas.blank(coloraxis=canvas.epoch_bar(first, last), showlegend=False)
    names = [canvas.text(canvas.short(layer, 18)) for layer in order]
    for index, number in enumerate(("", "2")):
        for row in rows:
            share = (int(row.get("epoch", 0)) - first) / max(1, last - first)
            _rank_line(figure, row, order, index, full, canvas.colour(share), number)
        _kept(figure, report, order, index, full, number)
    figure.add_trace(canvas.carrier(first))
    percent = {"range": [0, 105], "ticksuffix": " %"}
    span = {"range": [-0.5, len(order) - 0.5]}
    places = {"tickmode": "array", "tickvals": _ticks(names), "tickangle": -60}
    places |= span
    places["ticktext"] = [names[i] for i in _ticks(names)]
    bottom = 150
    titles = [f"{side}: rank / full rank" for side in SIDES.values()]
    figure.update_layout(
        yaxis=percent, yaxis2=percent, margin={"b": bottom},
        xaxis={**places, "showticklabels": False, "matches": "x2"}, xaxis2=places,
    )  # fmt: skip
    wide = canvas.panels(titles, 1, panel=200, gap=44, bottom=bottom)
    narrow = canvas.panels(titles, 1, panel=180, gap=44, bottom=bottom)
    wide["xaxis2.tickfont.size"], narrow["xaxis2.tickfont.size"] = 11, 9
    caption = (
        "Rank as a share of full rank for the layers in their order, one line per epoch, early to "
        "late. Diamonds are the ranks that were kept."
    )
    return Plot("ranks", title, caption, canvas.fit(canvas.style(figure), wide, narrow))


def _ticks(names: Sequence[str]) -> list[int]:
    return list(range(0, len(names), -(-len(names) // 40)))


def _full(rows: Rows, order: Sequence[str], history: Rows) -> dict[tuple[str, int], int]:
    """Return the full rank by layer and unfolding: its spectrum's length, or the highest seen."""
    full: dict[tuple[str, int], int] = {}
    for layer in order:
        for index, side in enumerate(SIDES):
            lengths = [
                len(r["spectra"].get(layer, {}).get(side, ())) for r in history if r.get("spectra")
            ]
            seen = [
                r["ranks"][layer][index] for r in rows if len(r["ranks"].get(layer, ())) > index
            ]
            full[layer, index] = max([*lengths, *seen, 1])
    return full


def _rank_line(
    figure: go.Figure,
    row: Mapping[str, Any],
    order: Sequence[str],
    index: int,
    full: Mapping[tuple[str, int], int],
    tint: str,
    number: str,
) -> None:
    points = [
        (place, layer, row["ranks"][layer][index])
        for place, layer in enumerate(order)
        if len(row["ranks"].get(layer, ())) > index
    ]
    figure.add_scatter(
        x=[place for place, _, _ in points],
        y=canvas.digits([100 * rank / full[layer, index] for _, layer, rank in points]),
        customdata=[f"{canvas.text(layer)}: {r} of {full[layer, index]}" for _, layer, r in points],
        mode="lines+markers", line={"color": tint, "width": 1.6}, marker={"size": 4},
        xaxis=f"x{number}", yaxis=f"y{number}", name=f"epoch {row.get('epoch', 0)}",
        hovertemplate="%{customdata}<extra>%{fullData.name}</extra>",
    )  # fmt: skip


def _kept(
    figure: go.Figure,
    report: Report,
    order: Sequence[str],
    index: int,
    full: Mapping[tuple[str, int], int],
    number: str,
) -> None:
    marks = _marks({row.layer: row for row in report.layers})
    side = list(SIDES)[index]
    points = [(i, name, marks[name, side]) for i, name in enumerate(order) if (name, side) in marks]
    figure.add_scatter(
        x=[place for place, _, _ in points],
        y=canvas.digits([100 * rank / full[layer, index] for _, layer, rank in points]),
        customdata=[f"{canvas.text(layer)}: {r} of {full[layer, index]}" for _, layer, r in points],
        mode="markers", marker={"symbol": "diamond-open", "size": 9, "color": canvas.QUIET},
        xaxis=f"x{number}", yaxis=f"y{number}", name="kept",
        hovertemplate="%{customdata}<extra>kept</extra>",
    )  # fmt: skip
