"""Accuracy against parameters and milliseconds: the figure, and the tables of sizes."""

import json
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from pliant.render import table, tables
from pliant.render.figures import plots
from pliant.render.html import html
from pliant.render.markdown import markdown
from pliant.result import Report, Side
from tests.reports import elastic, resnet20

DRAWN = 'data-figure="figure-tradeoff"'


def untimed(report: Report, **changes: Any) -> Report:
    sides = [replace(side, latency_ms=None) for side in (report.before, report.after)]
    return replace(report, before=sides[0], after=sides[1], **changes)


def figure_of(report: Report) -> Any:
    return plots(report)["tradeoff"].figure


def staged() -> Report:
    """The report of a chain of two, which was not timed."""
    row = {"params": 130_000, "file": 520_000, "coded": 500_000, "accuracy": 0.92}
    last = {"params": 70_078, "file": 286_000, "coded": 90_000, "accuracy": 0.9183}
    rows = ({"finished": "a<b>", **row}, {"finished": "hac", **last})
    return untimed(resnet20(history=rows))


def test_every_size_is_a_point_on_one_line_in_both_panels() -> None:
    report = elastic()
    figure = figure_of(report)
    lines = [trace for trace in figure.data if trace.name == "sizes"]
    assert [trace.xaxis for trace in lines] == ["x", "x2"]
    assert list(lines[0].x) == [size.params for size in report.sizes]
    assert list(lines[1].x) == [size.latency_ms for size in report.sizes]
    assert lines[0].y == lines[1].y and lines[0].y[0] == 91.83
    assert lines[0].customdata[7] == "size 8 of 8"
    assert figure.layout.yaxis2.matches == "y" and figure.layout.yaxis.matches is None
    assert "8 sizes" in plots(report)["tradeoff"].caption
    assert [a.text for a in figure.layout.annotations] == ["<b>Size</b>", "<b>Time</b>"]
    assert (figure.layout.xaxis.title.text, figure.layout.xaxis2.title.text) == (
        "parameters", "milliseconds",
    )  # fmt: skip


@pytest.mark.parametrize("report", [elastic(), elastic(count=2), resnet20(), staged()])
def test_every_point_is_within_its_axes(report: Report) -> None:
    figure = figure_of(report)
    low, high = figure.layout.yaxis.range
    for trace in figure.data:
        left, right = figure.layout[trace.xaxis.replace("x", "xaxis")].range
        assert all(left <= x < right for x in trace.x)
        assert all(low < y < high for y in trace.y)
    assert set(figure.layout.meta["wide"]) == set(figure.layout.meta["narrow"])


def test_two_networks_are_two_points_with_their_names() -> None:
    figure = figure_of(resnet20())
    assert [(t.text[0], t.xaxis) for t in figure.data] == [
        ("dense", "x"), ("after", "x"), ("dense", "x2"), ("after", "x2"),
    ]  # fmt: skip


def test_a_chain_is_a_dotted_way_from_stage_to_stage() -> None:
    report = staged()
    figure = figure_of(report)
    way, dense, after = figure.data
    assert way.line.dash == "dot" and list(way.y)[:3] == [92.16, 92, 91.83]
    assert list(way.customdata) == ["dense", "a&lt;b&gt;", "hac", "coded file"]
    assert (dense.x[0], after.x[0]) == (report.before.params, report.after.params)
    assert "Dotted" in plots(report)["tradeoff"].caption


def test_parameters_alone_are_not_drawn() -> None:
    assert "tradeoff" not in plots(untimed(resnet20()))
    assert DRAWN not in html(untimed(resnet20()))


def test_without_accuracy_the_caption_says_so() -> None:
    side = Side(1000, 9000, 4000, latency_ms=2.0)
    report = resnet20(before=side, after=side)
    plot = plots(report)["tradeoff"]
    assert plot.figure is None and "no accuracy" in plot.caption
    page = html(replace(report, sizes=(side,)))
    assert plot.caption in page and DRAWN not in page and "Every size in the file" in page


@pytest.mark.parametrize("timed", [True, False])
def test_tables_have_every_size(timed: bool) -> None:
    report = elastic(timed=timed)
    rows = tables.sizes(report)
    assert len(rows) == 8 and rows[0][3] == "91.83 %" and rows[7][3] == "88.45 %"
    assert (rows[0][4], rows[7][4]) == (("2.12", "1.45") if timed else ("–", "–"))
    console = Console(width=60, record=True, file=open("/dev/null", "w"), color_system=None)  # noqa: SIM115
    console.print(table.sizes(report))
    shown, page = console.export_text(), html(report)
    for row in rows:
        assert f"| {' | '.join(row)} |" in markdown(report)
        assert any(line.split() == " ".join(row).split() for line in shown.splitlines())
        assert all(f">{text}<" in page for text in row)
    assert DRAWN in page
    assert "Every size" not in markdown(resnet20()) + html(resnet20())


def test_a_report_without_sizes_is_still_read() -> None:
    report = elastic()
    assert Report.from_json(report.to_json()).sizes == report.sizes
    plain = json.loads(report.to_json())
    del plain["sizes"]
    assert Report.from_json(json.dumps(plain)).sizes == ()
