"""What was found out about a network, as one HTML file with figures."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import Tensor

from pliant.render import canvas, png, words
from pliant.render.canvas import AFTER, BUDGET, DENSE, Plot
from pliant.render.document import cell, document, facts, method, section, table
from pliant.render.table import cell as written
from pliant.result import Curves, Finding, Heat

TINTS = (AFTER, BUDGET, DENSE, "#2f9e6e", "#9a6bd6")
HEIGHT = 320  # of a figure, in pixels


def finding_html(found: Finding, *, model: str = "", data: str = "") -> str:
    """Return a finding as one self-contained HTML page: a sentence, numbers, figures, a table.

    Args:
        found: as `pliant.analyze` gives it.
        model: what the network is called.
        data: what the data are called.
    """
    name = str(found.method.get("name", "finding"))
    lead = f"<p>{escape(found.text)}</p>"
    numbers = {k: v for k, v in found.values.items() if not isinstance(v, Tensor)}
    shapes = {k: _shape(v) for k, v in found.values.items() if isinstance(v, Tensor)}
    parts = [
        _plain("values", "Numbers", facts(words.facts(numbers))),
        *_figures(found.figures),
        _rows(found.rows),
        _plain("method", "Method", method(found.method, "") if found.method else ""),
        _plain("run", "Run", facts(words.facts(_run(found, model, data) | shapes))),
    ]
    title = f"{name.replace('_', ' ')} of {model}" if model else name.replace("_", " ")
    return document("Finding", title, lead, "\n".join(filter(None, parts)), _version())


def _version() -> str:
    try:
        return version("pliant")
    except PackageNotFoundError:  # run from a checkout that was never installed
        return ""


def _run(found: Finding, model: str, data: str) -> dict[str, Any]:
    about = {"network": model, "data": data}
    plain = {"seed": str(found.seed), "time": words.seconds(found.seconds)}
    return {name: text for name, text in about.items() if text} | plain


def _shape(value: Tensor) -> str:
    return f"{'x'.join(map(str, value.shape))} numbers"


def _plain(name: str, title: str, body: str) -> str:
    if not body:
        return ""
    heading = f'<h2 id="head-{name}">{title}</h2>'
    return f'<section aria-labelledby="head-{name}">{heading}{body}</section>'


def _rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of what was looked at, a column for each key."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    if not keys:
        return ""
    text = {key for key in keys if any(isinstance(row.get(key), str) for row in rows)}
    names = [(key.replace("_", " "), "" if key in text else "number") for key in keys]
    body = "".join(f"<tr>{_cells(row, keys, text)}</tr>" for row in rows)
    return _plain("rows", "Table", table("What was looked at", names, body, tall=True))


def _cells(row: Mapping[str, Any], keys: Iterable[str], text: set[str]) -> str:
    return "".join(cell(written(row.get(key)), "" if key in text else "number") for key in keys)


# ---------------------------------------------------------------- figures


def _figures(figures: Sequence[Curves | Heat]) -> list[str]:
    return [
        _heat(figure, f"figure-{number}")
        if isinstance(figure, Heat)
        else section(_curves(figure, f"curves-{number}"))
        for number, figure in enumerate(figures)
    ]


def _heat(figure: Heat, name: str) -> str:
    """Return every image, alone and below its map; all maps are in one scale."""
    top = float(figure.maps.abs().max()) if figure.maps.numel() else 1.0
    tiles = "".join(
        _tile(image, png.link(png.heat(values, top)), label)
        for image, values, label in zip(figure.images, figure.maps, figure.labels, strict=True)
    )
    scale = f"Strongest colour: {words.human(top)}."
    caption = f'<p class="caption">{escape(figure.caption)} {scale}</p>'
    return _plain(name, escape(figure.title), f'{caption}<div class="tiles">{tiles}</div>')


def _tile(image: Tensor, values: str, label: str) -> str:
    plain = png.link(png.picture(image))
    grey = png.link(png.picture(image.float().mean(0, keepdim=True)))
    said = escape(label)
    return (
        f'<figure class="tile"><div class="pair"><img alt="" src="{plain}">'
        f'<div class="over"><img alt="" src="{grey}"><img alt="{said}" src="{values}"></div></div>'
        f"<figcaption>{said}</figcaption></figure>"
    )


def _curves(figure: Curves, name: str) -> Plot:
    """Draw named lines, and shade where they are known to lie."""
    drawn = canvas.blank()
    for number, (line, points) in enumerate(figure.lines.items()):
        tint = TINTS[number % len(TINTS)]
        band = figure.bands.get(line, ())
        if band:
            around = [(x, high) for x, _, high in band] + [(x, low) for x, low, _ in band[::-1]]
            drawn.add_scatter(
                x=[x for x, _ in around], y=canvas.digits([y for _, y in around]), fill="toself",
                mode="none", fillcolor=tint, opacity=0.18, hoverinfo="skip", showlegend=False,
            )  # fmt: skip
        kept = canvas.thin(list(points), 400)
        drawn.add_scatter(
            name=canvas.text(line), x=[x for x, _ in kept], y=canvas.digits([y for _, y in kept]),
            mode="lines+markers" if len(kept) < 30 else "lines", line={"color": tint, "width": 2},
            marker={"size": 6}, hovertemplate="%{y:.4g} at %{x:.4g}<extra>%{fullData.name}</extra>",
        )  # fmt: skip
    drawn.update_layout(
        xaxis={"title": {"text": canvas.text(figure.x)}, "nticks": 9},
        yaxis={"title": {"text": canvas.text(figure.y)}, "automargin": True, "rangemode": "tozero"},
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
    )
    same = {"height": HEIGHT}
    whole = canvas.fit(canvas.style(drawn), same, same)
    return Plot(name, figure.title, figure.caption, whole)
