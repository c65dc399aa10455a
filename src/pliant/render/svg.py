"""The spectrum figure as a still picture, for pages that run no scripts."""

from collections.abc import Sequence
from html import escape

from pliant.errors import PliantError
from pliant.render import canvas, spectra
from pliant.result import Report

WIDTH, HEIGHT, LEFT, TOP, GAP = 400, 260, 46, 58, 40  # of one panel and around it, in pixels


def spectrum_svg(report: Report) -> str:
    """Return the spectrum of the layer that lost most parameters as SVG, light and dark.

    Raises:
        PliantError: the report has no spectra.
    """
    view = spectra.still(report)
    if view is None:
        raise PliantError("A spectrum figure needs spectra in the history: this report has none.")
    name, titles, panels = view
    top = max(max(values) for lines in panels for _, values in lines) or 1.0
    epochs = [epoch for lines in panels for epoch, _ in lines]
    span = (min(epochs), max(epochs))
    wide, high = LEFT + len(panels) * (WIDTH + GAP), TOP + HEIGHT + 44
    drawn = "".join(
        _panel(LEFT + i * (WIDTH + GAP), title, lines, top, span)
        for i, (title, lines) in enumerate(zip(titles, panels, strict=True))
    )
    heading = f"Singular values of {name} by index, epoch {span[0]} (blue) to {span[1]} (orange)"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" role="img" '
        f'font-family="system-ui, sans-serif" font-size="13"><title>{escape(heading)}</title>'
        "<style>text{fill:#3d4756}path{fill:none}@media(prefers-color-scheme:dark){text{fill:#d5dce5}}"
        f'</style><text x="{LEFT}" y="20" font-weight="600">{escape(heading)}</text>{drawn}</svg>\n'
    )


def _panel(left: int, title: str, lines: spectra.Lines, top: float, span: tuple[int, int]) -> str:
    parts = [f'<text x="{left}" y="{TOP - 10}">{escape(title)}</text>']
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = TOP + HEIGHT * (1 - share)
        parts.append(f'<path d="M{left} {y}h{WIDTH}" stroke="#808c9b" stroke-opacity=".3"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{top * share:.2g}</text>')
    count = max((len(values) for _, values in lines), default=1)
    for epoch, values in lines:
        tint = canvas.colour((epoch - span[0]) / max(1, span[1] - span[0]))
        parts.append(f'<path d="{_path(left, values, top)}" stroke="{tint}" stroke-width="1.8"/>')
    parts.append(f'<text x="{left}" y="{TOP + HEIGHT + 22}">1</text>')
    parts.append(
        f'<text x="{left + WIDTH}" y="{TOP + HEIGHT + 22}" text-anchor="end">{count}</text>'
    )
    return "".join(parts)


def _path(left: int, values: Sequence[float], top: float) -> str:
    step = WIDTH / max(1, len(values) - 1)
    index = canvas.thin(range(len(values)), spectra.POINTS)
    return "M" + "L".join(
        f"{left + i * step:.1f} {TOP + HEIGHT * (1 - values[i] / top):.1f}" for i in index
    )
