"""A report as one HTML file that opens without a network."""

from base64 import b64encode
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from plotly.offline import get_plotlyjs

from pliant.nn.genotype import Genotype
from pliant.render import words
from pliant.render.canvas import Plot
from pliant.render.figures import plots
from pliant.render.genotype import genotype_svg
from pliant.result import LayerRow, Report

# Whatever a report holds, a browser loads and sends nothing for this page.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; base-uri 'none'; form-action 'none'"
)
LAYER_COLUMNS = (
    ("#", "number"), ("layer", "first"), ("kind", ""), ("became", ""),
    ("params", "number"), ("after", "number"), ("saved", "number"), ("MACs", "number"),
    ("after", "number"), ("saved", "number"),
)  # fmt: skip
TIME_COLUMNS = (("ms", "number"), ("after", "number"))


def html(report: Report) -> str:
    """Return the report as one self-contained HTML page with interactive figures.

    It works on a desk and on a phone, in light and dark, and on paper; nothing is loaded.
    """
    drawn = plots(report)
    title = escape(words.headline(report))
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
<p class="kicker">Compression report</p>
<h1>{title}</h1>
{_verdict(report)}
<p>{escape(words.summary(report))}</p>
</header>
<main>
{_cards(report)}
<noscript><section><p>The figures need JavaScript; the tables hold every number.</p></section>
</noscript>
{_costs(report, drawn["costs"])}
{_tradeoff(report, drawn.get("tradeoff"))}
{_stages(report, drawn.get("waterfall"))}
{_section(drawn["spectrum"])}
{_section(drawn["ranks"])}
{_section(drawn["training"])}
{_cells_found(report)}
{_layers(report, drawn["layers"])}
{_method(report)}
{_run(report, drawn["stages"])}
</main>
<footer>Written by pliant {escape(report.versions.get("pliant", ""))}.</footer>
<script>{get_plotlyjs()}</script>
<script>{_file("report.js")}</script>
</body>
</html>
"""


def _file(name: str) -> str:
    return (files("pliant.render") / name).read_text(encoding="utf-8")


def _verdict(report: Report) -> str:
    judged = report.budget or words.lost(report)
    kind = "missed" if not words.fine(report) else "" if judged else "free"
    return f'<p class="verdict {kind}">{escape(words.verdict(report))}</p>'


def _cards(report: Report) -> str:
    cards = "".join(
        f'<div class="card"><dt>{escape(row.label)}</dt><dd class="big">{escape(row.after)}</dd>'
        f'<dd class="small">{_from(row)}</dd></div>'
        for row in words.comparisons(report)
        if row.label != "Loss"
    )
    return f'<dl class="cards" aria-label="Key numbers">{cards}</dl>'


def _from(row: words.Comparison) -> str:
    """Say where a number comes from; a line breaks between the two parts only."""
    if row.before == words.NONE:
        return "not measured before"
    said = [f"from {row.before},", row.said] if row.said != words.NONE else [f"from {row.before}"]
    return " ".join(f'<span class="nowrap">{escape(part)}</span>' for part in said)


def _section(plot: Plot, *more: str, kind: str = "") -> str:
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


def _costs(report: Report, plot: Plot) -> str:
    names = (("", ""), ("before", "number"), ("after", "number"), ("change", "number"))
    body = "".join(
        f'<tr><th scope="row">{escape(row.label)}</th>'
        + "".join(_cell(text, "number") for text in (row.before, row.after, row.change))
        + "</tr>"
        for row in words.comparisons(report)
    )
    left_out = ", ".join(report.after.uncounted)
    note = f'<p class="caption">MACs not counted for: {escape(left_out)}.</p>' if left_out else ""
    return _section(plot, _table("Scores and costs before and after", names, body), note)


def _tradeoff(report: Report, plot: Plot | None) -> str:
    """Show what accuracy costs, and the sizes of an elastic network; nothing without either."""
    if plot is None:
        return ""
    body = "".join(
        f'<tr><th scope="row" class="number">{escape(row[0])}</th>'
        + "".join(_cell(text, "number") for text in row[1:])
        + "</tr>"
        for row in words.sizes(report)
    )
    names = [(name, "number") for name in words.SIZE_COLUMNS]
    return _section(plot, _table("Every size in the file", names, body) if body else "")


def _stages(report: Report, plot: Plot | None) -> str:
    """Show the stages of a chain; nothing where there is one stage only."""
    if plot is None:
        return ""
    names = (("", ""), ("params", "number"), ("file", "number"), ("accuracy", "number"))
    body = "".join(
        f'<tr><th scope="row">{escape(row.name)}</th>'
        + "".join(_cell(text, "number") for text in row.cells())
        + "</tr>"
        for row in words.stages(report)
    )
    return _section(plot, _table("The network after each stage", names, body))


def _cells_found(report: Report) -> str:
    """Draw the cells that an architecture search ended with; nothing without one."""
    found = [row["genotype"] for row in report.history if "genotype" in row]
    if not found:
        return ""
    drawn = genotype_svg(Genotype.from_plain(found[-1]), "Cells found by the search")
    # As an image, so that its styles stay its own.
    source = f"data:image/svg+xml;base64,{b64encode(drawn.encode()).decode()}"
    return (
        '<section aria-labelledby="head-genotype"><h2 id="head-genotype">Architecture</h2>'
        '<p class="caption">A box per node, a row per edge with its operation.</p>'
        f'<img class="wide" alt="The cells that were found" src="{source}"></section>'
    )


def _layers(report: Report, plot: Plot) -> str:
    timed = words.has_times(report.layers)
    body = "".join(_layer(index, row, timed=timed) for index, row in enumerate(report.layers, 1))
    heading = "<h3>Every layer</h3>"
    columns = (*LAYER_COLUMNS, *(TIME_COLUMNS if timed else ()))
    table = _table("Every layer", columns, body, tall=True)
    return _section(plot, heading, table, kind="long")


def _layer(index: int, row: LayerRow, *, timed: bool) -> str:
    cells = [_cell(str(index), "number")]
    cells.append(f'<th scope="row" class="name first">{escape(row.layer)}</th>')
    why = words.why(row)
    reason = f'<br><span class="caption">{escape(why)}</span>' if why else ""
    cells.append(_cell(row.kind))
    cells.append(f'<td class="why">{escape(words.what(row))}{reason}</td>')
    for axis in ("params", "macs"):
        cells += [
            _cell(words.human(side.get(axis, 0)), "number") for side in (row.before, row.after)
        ]
        cells.append(_cell(words.saved(row, axis), "number"))
    if timed:
        cells += [_cell(text, "number") for text in words.layer_times(row)]
    return f'<tr class="{"" if words.is_changed(row) else "left"}">{"".join(cells)}</tr>'


def _cell(text: str, kind: str = "") -> str:
    return f'<td class="{kind}">{escape(text)}</td>'


def _table(label: str, names: Iterable[tuple[str, str]], body: str, *, tall: bool = False) -> str:
    head = "".join(f'<th scope="col" class="{kind}">{escape(name)}</th>' for name, kind in names)
    return (
        f'<div class="scroll{" tall" if tall else ""}" role="region" tabindex="0" '
        f'aria-label="{escape(label)}"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _method(report: Report) -> str:
    parts = "".join(_part(part, note) for part, note in words.parts(report.method))
    return (
        f'<section aria-labelledby="head-method"><h2 id="head-method">Method</h2>{parts}</section>'
    )


def _part(part: Any, note: str) -> str:
    name = str(part["name"])
    entry = words.entry(name)
    said = f"<h3>{escape(name)}{escape(f' ({note})' if note else '')}</h3>"
    if entry is not None:
        paper = entry.paper
        source = f"{paper.authors}. {paper.venue} {paper.year}."
        said += f"<p>{escape(entry.summary)}</p><p>{_link(paper.title, paper.url)}<br>"
        said += f'<span class="caption">{escape(source)}</span></p>'
    return said + _facts(words.facts(part.get("options", {})))


def _link(text: str, url: str) -> str:
    if not url.startswith(("https://", "http://")):
        return escape(text)
    return f'<a href="{escape(url)}" rel="noopener noreferrer">{escape(text)}</a>'


def _run(report: Report, plot: Plot) -> str:
    groups: Sequence[tuple[str, Sequence[tuple[str, str]]]] = (
        ("Training settings", list(words.facts(report.train))),
        ("Target", list(words.facts(report.target))),
        ("Export", list(words.facts(report.export))),
        (
            "Where and with what",
            [("device", report.device), ("seed", str(report.seed)), *report.versions.items()],
        ),
    )
    said = "".join(f"<h3>{name}</h3>{_facts(pairs)}" for name, pairs in groups if pairs)
    return _section(plot, said)


def _facts(pairs: Iterable[tuple[str, str]]) -> str:
    rows = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in pairs
    )
    return f'<dl class="facts">{rows}</dl>' if rows else ""
