"""A page of HTML that opens without a network: its frame, and the parts that all pages share."""

from collections.abc import Iterable
from html import escape
from importlib.resources import files
from typing import Any

from plotly.offline import get_plotlyjs

from pliant.render import words
from pliant.render.canvas import Plot

# Whatever a report holds, a browser loads and sends nothing for this page.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; base-uri 'none'; form-action 'none'"
)


def document(kicker: str, title: str, lead: str, main: str, version: str) -> str:
    """Return a whole page, with everything in it that it needs.

    Args:
        kicker: what kind of page it is.
        title: its heading, as text.
        lead: HTML below the heading.
        main: HTML of its sections.
        version: of pliant.
    """
    title = escape(title)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{_file("report.css")}</style>
</head>
<body>
<header>
<p class="kicker">{escape(kicker)}</p>
<h1>{title}</h1>
{lead}
</header>
<main>
{main}
</main>
<footer>Written by pliant {escape(version)}.</footer>
<script>{get_plotlyjs()}</script>
<script>{_file("report.js")}</script>
</body>
</html>
"""


def _file(name: str) -> str:
    return (files("pliant.render") / name).read_text(encoding="utf-8")


def section(plot: Plot, *more: str, kind: str = "") -> str:
    """Return a section that a figure gives its heading."""
    identifier = f"head-{plot.name}"
    return (
        f'<section class="{kind}" aria-labelledby="{identifier}">'
        f'<h2 id="{identifier}">{escape(plot.title)}</h2>{_graph(plot)}{"".join(more)}</section>'
    )


def _graph(plot: Plot) -> str:
    caption = f'<p class="caption">{escape(plot.caption)}</p>'
    if plot.figure is None:
        return caption
    data = plot.figure.to_json(pretty=False)
    for mark in "<>&":  # no tag can end the script, whatever a layer is called
        data = data.replace(mark, f"\\u{ord(mark):04x}")
    label = escape(f"{plot.title}. {plot.caption}")
    return (
        f'{caption}<div class="graph" role="figure" aria-label="{label}" '
        f'data-figure="figure-{plot.name}"></div>'
        f'<script type="application/json" id="figure-{plot.name}">{data}</script>'
    )


def cell(text: str, kind: str = "") -> str:
    """Return one cell of a table."""
    return f'<td class="{kind}">{escape(text)}</td>'


def table(
    label: str,
    names: Iterable[tuple[str, str]],
    body: str,
    *,
    tall: bool = False,
    sort: bool = False,
) -> str:
    """Return a table that scrolls by itself: columns (name, class), rows as HTML.

    One to sort can be sorted by its columns and filtered, by the numbers in ``data-value``.
    """
    head = "".join(f'<th scope="col" class="{kind}">{escape(name)}</th>' for name, kind in names)
    return (
        f'<div class="scroll{" tall" if tall else ""}" role="region" tabindex="0" '
        f'aria-label="{escape(label)}"><table{" data-sort" if sort else ""}>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def method(part: Any, note: str) -> str:
    """Say what a method is and does, and how its options were set."""
    name = str(part["name"])
    entry = words.entry(name)
    said = f"<h3>{escape(name)}{escape(f' ({note})' if note else '')}</h3>"
    if entry is not None:
        paper = entry.paper
        source = f"{paper.authors}. {paper.venue} {paper.year}."
        said += f"<p>{escape(entry.summary)}</p><p>{_link(paper.title, paper.url)}<br>"
        said += f'<span class="caption">{escape(source)}</span></p>'
    return said + facts(words.facts(part.get("options", {})))


def _link(text: str, url: str) -> str:
    if not url.startswith(("https://", "http://")):
        return escape(text)
    return f'<a href="{escape(url)}" rel="noopener noreferrer">{escape(text)}</a>'


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Return names and what they stand for, side by side."""
    rows = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in pairs
    )
    return f'<dl class="facts">{rows}</dl>' if rows else ""
