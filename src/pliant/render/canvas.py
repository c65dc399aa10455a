"""What all figures share: colours that read on light and dark, and panels that stack on a phone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

DENSE, AFTER, BUDGET = "#98a3b3", "#3b82d6", "#dd6b20"
EARLY_TO_LATE = ((0.0, "#4b8fdb"), (0.4, "#9a6bd6"), (0.7, "#d9508a"), (1.0, "#e8702a"))
GRID, INK, QUIET = "rgba(128,140,155,0.28)", "#3d4756", "#808c9b"
SHADES = {"search": "#3b82d6", "train": "#3b82d6", "finetune": "#2f9e6e"}
TOP, BOTTOM, GAP = 34, 52, 76  # pixels around and between panels


@dataclass(frozen=True)
class Plot:
    """One figure of a report.

    Args:
        name: an identifier, unique in the report.
        title: its heading.
        caption: what there is to see.
        figure: the drawing; None if the report has no data for it, and the caption says so.
    """

    name: str
    title: str
    caption: str
    figure: go.Figure | None = None


def text(value: str) -> str:
    """Make a name safe where plotly would read tags in it."""
    return value.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def short(name: str, most: int = 26) -> str:
    """Shorten a layer's name in its middle, where it says least."""
    if len(name) <= most:
        return name
    half = (most - 1) // 2
    return f"{name[:half]}…{name[-half:]}"


def thin(items: Sequence[Any], most: int) -> list[Any]:
    """Keep at most ``most`` items, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def digits(values: Sequence[Any]) -> list[float | None]:
    """Round to four digits that matter: a page with many spectra stays small."""
    return [None if value is None else float(f"{value:.4g}") for value in values]


def colour(share: float) -> str:
    """Return the colour between early (0) and late (1)."""
    for (low, start), (high, end) in zip(EARLY_TO_LATE, EARLY_TO_LATE[1:], strict=False):
        if share <= high:
            weight = (share - low) / (high - low)
            pairs = zip(_rgb(start), _rgb(end), strict=True)
            return "rgb({},{},{})".format(*(round(a + weight * (b - a)) for a, b in pairs))
    return EARLY_TO_LATE[-1][1]


def _rgb(code: str) -> tuple[int, ...]:
    return tuple(int(code[i : i + 2], 16) for i in (1, 3, 5))


def blank(**layout: Any) -> go.Figure:
    """Return an empty figure without background, so that the page's own shows through."""
    figure = go.Figure(layout={"template": "none", **layout})
    return figure.update_layout(
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 12.5, "color": INK},
        margin={"l": 58, "r": 20, "t": TOP, "b": BOTTOM},
        hoverlabel={"font": {"size": 12.5}, "namelength": -1},
        barcornerradius=3,
    )


def style(figure: go.Figure, *, lying: bool = False) -> go.Figure:
    """Give every axis of a figure the same quiet look; bars may lie."""
    quiet = {"gridcolor": GRID, "linecolor": GRID, "zeroline": False, "ticks": "outside"}
    quiet |= {"ticklen": 6, "tickcolor": "rgba(0,0,0,0)", "title_font_size": 12.5}
    figure.update_xaxes(**quiet, showline=not lying, showgrid=lying, title_standoff=8)
    return figure.update_yaxes(**quiet, showline=lying, showgrid=not lying, title_standoff=6)


def panels(
    titles: Sequence[str], columns: int, *, panel: int = 240, gap: int = GAP, bottom: int = BOTTOM
) -> dict[str, Any]:
    """Lay out panels in columns as one flat dict of layout settings, pixels for heights."""
    rows = -(-len(titles) // columns)
    height = rows * panel + (rows - 1) * gap
    layout: dict[str, Any] = {"height": height + TOP + bottom, "annotations": []}
    for index, title in enumerate(titles):
        row, column = divmod(index, columns)
        number = "" if index == 0 else str(index + 1)
        width = (1 - 0.09 * (columns - 1)) / columns
        left, top = column * (width + 0.09), 1 - row * (panel + gap) / height
        layout[f"xaxis{number}.domain"] = [left, min(1.0, left + width)]  # rounded, it may be more
        layout[f"xaxis{number}.anchor"] = f"y{number}"
        layout[f"yaxis{number}.domain"] = [max(0.0, top - panel / height), top]
        layout[f"yaxis{number}.anchor"] = f"x{number}"
        layout["annotations"].append(_heading(title, left, top))
    return layout


def _heading(title: str, left: float, top: float) -> dict[str, Any]:
    return {
        "text": f"<b>{title}</b>", "x": left, "y": top, "xref": "paper", "yref": "paper",
        "xanchor": "left", "yanchor": "bottom", "yshift": 6, "showarrow": False,
    }  # fmt: skip


def fit(figure: go.Figure, wide: dict[str, Any], narrow: dict[str, Any]) -> go.Figure:
    """Lay a figure out for a wide screen and keep with it what a phone needs instead.

    Both are flat settings as ``Plotly.relayout`` takes them; the page applies ``meta.narrow`` or
    ``meta.wide`` when its width changes. They must name the same settings.
    """
    wide = {"dragmode": "zoom", "margin.l": 58, **wide}
    narrow = {"dragmode": False, "margin.l": 48, **narrow}
    figure.update_layout({key.replace(".", "_"): value for key, value in wide.items()})
    return figure.update_layout(meta={"wide": wide, "narrow": narrow})


def epoch_bar(first: int, last: int) -> go.layout.Coloraxis:
    """Return the colour scale of epochs, drawn below the panels."""
    bar = {
        "title": {"text": "epoch", "side": "right", "font": {"size": 12.5}},
        "orientation": "h", "thickness": 8, "len": 0.5, "lenmode": "fraction",
        "x": 0.5, "xanchor": "center", "yref": "container",
        "y": 0.0, "yanchor": "bottom", "outlinewidth": 0, "nticks": 7, "ticks": "",
    }  # fmt: skip
    scale = [list(stop) for stop in EARLY_TO_LATE]
    last = max(last, first + 1)
    return go.layout.Coloraxis(colorscale=scale, cmin=first, cmax=last, colorbar=bar)


def carrier(first: int) -> go.Scatter:
    """Return an invisible point: a colour scale is drawn only if a trace refers to it."""
    marker = {"color": [first], "coloraxis": "coloraxis", "opacity": 0}
    return go.Scatter(x=[None], y=[None], mode="markers", marker=marker, hoverinfo="skip")
