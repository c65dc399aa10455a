"""A report as one HTML file that opens without a network."""

from base64 import b64encode
from collections.abc import Sequence
from html import escape

from pliant.nn.genotype import Genotype
from pliant.render import tables, words
from pliant.render.blocks import blocks_svg, chosen
from pliant.render.canvas import Plot
from pliant.render.document import cell, document, facts, method, section, table
from pliant.render.figures import plots
from pliant.render.genotype import genotype_svg
from pliant.render.many import together
from pliant.result import LayerRow, Report

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
    title = words.headline(report)
    lead = f"{_verdict(report)}\n<p>{escape(words.summary(report))}</p>"
    main = f"""{_cards(report)}
<noscript><section><p>The figures need JavaScript; the tables hold every number.</p></section>
</noscript>
{_costs(report, drawn["costs"])}
{_tradeoff(report, drawn.get("tradeoff"))}
{together(tables.tried(report), "What was tried", "Every network that was tried", "tried")}
{_stages(report, drawn.get("waterfall"))}
{section(drawn["spectrum"])}
{section(drawn["ranks"])}
{section(drawn["training"])}
{_cells_found(report)}
{_layers(report, drawn["layers"])}
{_method(report)}
{_run(report, drawn["stages"])}"""
    return document("Compression report", title, lead, main, report.versions.get("pliant", ""))


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


def _costs(report: Report, plot: Plot) -> str:
    names = (("", ""), ("before", "number"), ("after", "number"), ("change", "number"))
    body = "".join(
        f'<tr><th scope="row">{escape(row.label)}</th>'
        + "".join(cell(text, "number") for text in (row.before, row.after, row.change))
        + "</tr>"
        for row in words.comparisons(report)
    )
    left_out = ", ".join(report.after.uncounted)
    note = f'<p class="caption">MACs not counted for: {escape(left_out)}.</p>' if left_out else ""
    return section(plot, table("Scores and costs before and after", names, body), note)


def _tradeoff(report: Report, plot: Plot | None) -> str:
    """Show what accuracy costs, and the sizes of an elastic network; nothing without either."""
    if plot is None:
        return ""
    body = "".join(
        f'<tr><th scope="row" class="number">{escape(row[0])}</th>'
        + "".join(cell(text, "number") for text in row[1:])
        + "</tr>"
        for row in tables.sizes(report)
    )
    names = [(name, "number") for name in tables.SIZE_COLUMNS]
    return section(plot, table("Every size in the file", names, body) if body else "")


def _stages(report: Report, plot: Plot | None) -> str:
    """Show the stages of a chain; nothing where there is one stage only."""
    if plot is None:
        return ""
    names = (("", ""), ("params", "number"), ("file", "number"), ("accuracy", "number"))
    body = "".join(
        f'<tr><th scope="row">{escape(row.name)}</th>'
        + "".join(cell(text, "number") for text in row.cells())
        + "</tr>"
        for row in tables.stages(report)
    )
    return section(plot, table("The network after each stage", names, body))


def _cells_found(report: Report) -> str:
    """Draw what an architecture search ended with: cells, or a choice for each layer."""
    found = [row["genotype"] for row in report.history if "genotype" in row]
    if found:
        said = "A box per node, a row per edge with its operation."
        drawn = genotype_svg(Genotype.from_plain(found[-1]), "Cells found by the search")
    elif layers := chosen(report.history):
        said = "A square as large as its kernel for each layer, and what was chosen for it."
        drawn = blocks_svg(layers, "Found by the search")
    else:
        return ""
    # As an image, so that its styles stay its own.
    source = f"data:image/svg+xml;base64,{b64encode(drawn.encode()).decode()}"
    return (
        '<section aria-labelledby="head-genotype"><h2 id="head-genotype">Architecture</h2>'
        f'<p class="caption">{said}</p>'
        f'<img class="wide" alt="What the search found" src="{source}"></section>'
    )


def _layers(report: Report, plot: Plot) -> str:
    timed = words.has_times(report.layers)
    body = "".join(_layer(index, row, timed=timed) for index, row in enumerate(report.layers, 1))
    heading = "<h3>Every layer</h3>"
    columns = (*LAYER_COLUMNS, *(TIME_COLUMNS if timed else ()))
    every = table("Every layer", columns, body, tall=True, sort=True)
    return section(plot, heading, every, kind="long")


def _layer(index: int, row: LayerRow, *, timed: bool) -> str:
    cells = [cell(str(index), "number")]
    cells.append(f'<th scope="row" class="name first">{escape(row.layer)}</th>')
    why = words.why(row)
    reason = f'<br><span class="caption">{escape(why)}</span>' if why else ""
    cells.append(cell(row.kind))
    cells.append(f'<td class="why">{escape(words.what(row))}{reason}</td>')
    for axis in ("params", "macs"):
        cells += [
            cell(words.human(side.get(axis, 0)), "number") for side in (row.before, row.after)
        ]
        cells.append(cell(words.saved(row, axis), "number"))
    if timed:
        cells += [cell(text, "number") for text in words.layer_times(row)]
    return f'<tr class="{"" if words.is_changed(row) else "left"}">{"".join(cells)}</tr>'


def _method(report: Report) -> str:
    parts = "".join(method(part, note) for part, note in words.parts(report.method))
    return (
        f'<section aria-labelledby="head-method"><h2 id="head-method">Method</h2>{parts}</section>'
    )


def _run(report: Report, plot: Plot) -> str:
    groups: Sequence[tuple[str, Sequence[tuple[str, str]]]] = (
        ("Inputs", list(words.facts(report.inputs))),
        ("Training settings", list(words.facts(report.train))),
        ("Target", list(words.facts(report.target))),
        ("Export", list(words.facts(report.export))),
        (
            "Where and with what",
            [
                ("task", report.task or "none"),
                ("device", report.device),
                ("seed", str(report.seed)),
                *report.versions.items(),
            ],
        ),
    )
    said = "".join(f"<h3>{name}</h3>{facts(pairs)}" for name, pairs in groups if pairs)
    return section(plot, said)
