"""Searched cells as a picture: SVG, light and dark."""

from collections.abc import Mapping
from html import escape

from pliant.nn.genotype import Genotype, Nodes

TITLES = {"normal": "Normal cell", "reduce": "Reduction cell"}
INPUTS = ("last but one", "last cell")
TINTS = (
    ("sep_", "#3b82d6"),
    ("dil_", "#9a6bd6"),
    ("max_", "#dd6b20"),
    ("avg_", "#dd6b20"),
    ("skip", "#808c9b"),
)  # by the first letters of an operation
WIDTH, ROW, GAP, COLUMN, MARGIN, TOP = 132, 24, 18, 232, 16, 40  # pixels

Box = tuple[float, float, float]
"""Left, top and height of a state's box."""


def genotype_svg(genotype: Genotype, heading: str = "") -> str:
    """Draw both cells of a genotype: a box per node, in it a row per edge with its operation.

    A line runs from the state that an edge reads to the edge's row. The picture holds no scripts
    and follows the reader's choice of light or dark.
    """
    panels, top, wide = [], 34.0 if heading else 8.0, 0.0
    for kind, title in TITLES.items():
        drawn, width, height = _cell(getattr(genotype, kind), title, top)
        panels.append(drawn)
        top, wide = top + height, max(wide, width)
    name = escape(heading or "Genotype")
    said = f'<text x="{MARGIN}" y="22" font-weight="600">{name}</text>' if heading else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide:g} {top:g}" role="img" '
        f'font-family="system-ui, sans-serif" font-size="13"><title>{name}</title>'
        "<style>text{fill:#3d4756}.o{fill:#fff}path{fill:none;stroke-width:1.6}"
        "rect{stroke:#808c9b;fill:#f1f3f6}"
        "@media(prefers-color-scheme:dark){text{fill:#d5dce5}rect{fill:#232b37}}</style>"
        f"{said}{''.join(panels)}</svg>\n"
    )


def _cell(nodes: Nodes, title: str, top: float) -> tuple[str, float, float]:
    """Draw one cell; return it with its width and height."""
    boxes = _boxes(nodes, top + TOP)
    bottom = max(y + height for _, y, height in boxes.values())
    right = max(x for x, _, _ in boxes.values()) + COLUMN
    parts = [f'<text x="{MARGIN}" y="{top + 22:g}" font-weight="600">{title}</text>']
    for node, edges in enumerate(nodes):
        x, y, height = boxes[2 + node]
        parts += [
            _edge(boxes[state], x, y + ROW * (i + 1.5), op) for i, (op, state) in enumerate(edges)
        ]
        middle = y + height / 2
        end = (top + TOP + bottom) / 2
        parts.append(_curve(x + WIDTH, middle, right, end, "#808c9b", ".35"))
    for state, (x, y, height) in boxes.items():
        label = INPUTS[state] if state < 2 else f"node {state}"
        rows = [op for op, _ in nodes[state - 2]] if state > 1 else []
        parts.append(_box(x, y, height, label, rows))
    parts.append(_box(right, top + TOP, bottom - top - TOP, "output", []))
    return "".join(parts), right + WIDTH + MARGIN, bottom - top + 28


def _boxes(nodes: Nodes, top: float) -> Mapping[int, Box]:
    """Place the states in columns by depth, each column from the top."""
    depths = {0: 0, 1: 0}
    places: dict[int, Box] = {}
    filled: dict[int, float] = {}  # by column, down to where
    for node, edges in enumerate(nodes):
        depths[2 + node] = 1 + max((depths[state] for _, state in edges), default=0)
    for state, depth in depths.items():
        height = ROW * (1 + (len(nodes[state - 2]) if state > 1 else 0))
        y = filled.get(depth, top)
        places[state] = (float(MARGIN + COLUMN * depth), y, float(height))
        filled[depth] = y + height + GAP
    return places


def _edge(source: Box, x: float, y: float, op: str) -> str:
    return _curve(source[0] + WIDTH, source[1] + ROW / 2, x, y, _tint(op), "1")


def _curve(x0: float, y0: float, x1: float, y1: float, tint: str, strength: str) -> str:
    bend = (x1 - x0) / 2
    return (
        f'<path d="M{x0:g} {y0:g}C{x0 + bend:g} {y0:g} {x1 - bend:g} {y1:g} {x1:g} {y1:g}" '
        f'stroke="{tint}" stroke-opacity="{strength}"/>'
    )


def _box(x: float, y: float, height: float, label: str, rows: list[str]) -> str:
    parts = [f'<rect x="{x:g}" y="{y:g}" width="{WIDTH}" height="{height:g}" rx="5"/>']
    parts.append(f'<text x="{x + WIDTH / 2:g}" y="{y + 17:g}" text-anchor="middle">{label}</text>')
    for i, op in enumerate(rows):
        edge = y + ROW * (i + 1)
        parts.append(
            f'<rect x="{x + 4:g}" y="{edge:g}" width="{WIDTH - 8}" height="{ROW - 4}" rx="4" '
            f'style="fill:{_tint(op)};stroke:none"/>'
            f'<text class="o" x="{x + WIDTH / 2:g}" y="{edge + 15:g}" text-anchor="middle">'
            f"{escape(op)}</text>"
        )
    return "".join(parts)


def _tint(op: str) -> str:
    return next((tint for start, tint in TINTS if op.startswith(start)), "#2f9e6e")
