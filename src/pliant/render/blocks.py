"""What a search chose for the layers of a row, as a picture: SVG, light and dark."""

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from pliant.nn.operations import SKIP

SIDE, GAP, MARGIN, TOP = 9, 26, 16, 44  # pixels: of one pixel of a kernel, between layers, around
WIDTH, LINE, ROW = 72, 16, 12  # least width of a layer; height of a line; layers side by side
FILL = "#3b82d6"
_KERNEL = re.compile(r"k(\d+)")


def chosen(history: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return what the last search in a history chose for each layer, by its name or number.

    Kernel sizes ("sizes"), blocks ("ops") and depths of stages ("depths"); nothing without any.
    """
    for row in reversed(history):
        if "sizes" in row:
            return {layer: f"k{size}" for layer, size in row["sizes"].items()}
        for name, word in (("ops", ""), ("depths", " blocks")):
            if name in row:
                return {str(n): f"{one}{word}" for n, one in enumerate(row[name], 1)}
    return {}


def blocks_svg(found: Mapping[str, str], heading: str = "") -> str:
    """Draw a layer beside the other: a square as large as its kernel, and what it is.

    Args:
        found: what was chosen for each layer: "k5", "mbconv_k5_e3", or any other word.
        heading: of the picture.
    """
    reach = max([_kernel(word) for word in found.values()] + [1]) * SIDE
    tall, parts = reach + 2 * LINE + GAP, []
    wide = max([WIDTH] + [8 * len(text) for row in found.items() for text in row]) + 8
    for place, (layer, word) in enumerate(found.items()):
        x = MARGIN + wide * (place % ROW + 0.5)
        y = TOP + tall * (place // ROW)
        side = _kernel(word) * SIDE
        parts.append(
            f'<rect x="{x - side / 2:g}" y="{y + (reach - side) / 2:g}" width="{side}" '
            f'height="{side}" fill="{FILL}"/>'
            f'<text x="{x:g}" y="{y + reach + LINE:g}">{escape(short(word))}</text>'
            f'<text class="n" x="{x:g}" y="{y + reach + 2 * LINE:g}">{escape(layer)}</text>'
        )
    columns, rows = min(len(found), ROW), -(-len(found) // ROW)
    box = f"0 0 {2 * MARGIN + wide * columns:g} {TOP + tall * rows:g}"
    name = escape(heading or "What was chosen")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}" role="img" '
        f'font-family="system-ui, sans-serif" font-size="13" text-anchor="middle">'
        f"<title>{name}</title><style>text{{fill:#3d4756}}.n{{font-size:11px}}"
        "@media(prefers-color-scheme:dark){text{fill:#d5dce5}}</style>"
        f'<text x="{MARGIN}" y="22" font-weight="600" text-anchor="start">{name}</text>'
        f"{''.join(parts)}</svg>\n"
    )


def short(word: str) -> str:
    """Write a choice for people: k5 e3 for an inverted bottleneck."""
    return "skip" if word == SKIP else word.removeprefix("mbconv_").replace("_", " ")


def _kernel(word: str) -> int:
    """Return the kernel that a word names; 0 if it names none."""
    found = _KERNEL.search(word)
    return int(found[1]) if found else 0
