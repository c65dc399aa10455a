"""Renderers: plain data in, text out."""

import json
import re
from base64 import b64decode
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console
from rich.table import Table

from pliant.errors import PliantError
from pliant.nn.genotype import Genotype
from pliant.registry import Entry, Paper
from pliant.render import canvas, runs, table, words
from pliant.render.figures import plots
from pliant.render.html import html
from pliant.render.markdown import markdown
from pliant.render.spectra import EPOCHS, LAYERS
from pliant.render.svg import spectrum_svg
from pliant.result import LayerRow, Report, Side
from tests.reports import resnet20

EVIL = '</script><script>alert("x")</script><img src=x onerror=alert(1)> & |`*_'
COSTS = ("Parameters", "MACs", "Bytes on disk")
VOID = {"meta", "br", "img", "link", "input", "hr"}


def text_of(shown: Table, width: int = 80) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"), color_system=None)  # noqa: SIM115
    console.print(shown)
    return console.export_text()


class Reader(HTMLParser):
    """Checks that tags nest, and collects what a browser would see."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.scripts: list[dict[str, Any]] = []
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


def bare(**changes: Any) -> Report:
    """A report in which nothing was trained, measured or exported."""
    side = Side(params=1000, macs=9000, bytes=4000)
    return resnet20(
        before=side, after=side, layers=(), history=(), seconds={}, budget={}, train={}, export={},
        versions={}, **changes,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (0, "0"), (7, "7"), (999, "999"), (1000, "1.00k"), (9994, "9.99k"), (99_950, "100k"),
        (269_722, "270k"), (999_600, "1.00M"), (40_600_000, "40.6M"), (4.5e9, "4.50G"),
        (-2500, "-2.50k"), (0.01234, "0.0123"), (None, "–"), (float("nan"), "–"),
        (7e15, "7000T"),
    ],
)  # fmt: skip
def test_numbers_have_three_digits(value: float | None, written: str) -> None:
    assert words.human(value) == written


def test_sizes_times_and_shares() -> None:
    assert words.size(1_083_000) == "1.08 MB"
    assert words.size(512) == "512 B"
    assert words.seconds(0.42) == "0.42 s"
    assert words.seconds(125) == "2 min 05 s"
    assert words.seconds(59.7) == "1 min 00 s"
    assert words.seconds(4320) == "1 h 12 min"
    assert words.percent(0.9183) == "91.8 %"
    assert words.times(100, 25) == "4.0×"
    assert words.times(0, 25) == "–"


def test_headline_says_what_happened() -> None:
    assert words.headline(resnet20()) == (
        "resnet20 on cifar10: 3.8× smaller, 1.6× faster, 92.2 % → 91.8 %"
    )


def test_headline_of_a_network_that_grew_and_was_not_scored() -> None:
    report = resnet20(before=Side(10, 10, 1000), after=Side(10, 10, 2000))
    assert words.headline(report) == "resnet20 on cifar10: 2.0× larger"
    assert words.headline(bare()) == "resnet20 on cifar10: no smaller"


def test_scores_that_are_not_numbers_are_not_shown() -> None:
    side = Side(10, 10, 1000, accuracy=float("nan"), loss=float("nan"))
    report = resnet20(before=side, after=side)
    assert words.headline(report) == "resnet20 on cifar10: no smaller"
    assert [row.label for row in words.comparisons(report)] == list(COSTS)
    half = words.comparisons(resnet20(after=side))
    assert (half[0].after, half[0].change) == ("–", "–")


def test_verdict_names_budget_and_misses() -> None:
    assert words.verdict(resnet20()) == "Budget met: params ≤ 40 % of dense (108k)."
    missed = resnet20(met=False, misses=("params is 120,000 where 107,889 was allowed",))
    assert "missed" in words.verdict(missed) and "120,000" in words.verdict(missed)
    assert words.verdict(bare()) == "No budget was set."
    assert "macs ≤ 12.0M" in words.verdict(resnet20(budget={"macs": 12_000_000}))


def test_verdict_says_when_much_of_the_time_is_left() -> None:
    def said(bounds: dict[str, Any]) -> str:
        return words.verdict(resnet20(budget=bounds))  # takes 2.12 of 3.4 ms

    assert said({"latency": 2.2}) == "Budget met: latency ≤ 2.2 ms."
    assert "(2.73 ms), of which 22 % is left" in said({"latency": "80%"})
    assert "left" not in said({"latency": "80%", "params": 0.4}), "params may be what binds"
    assert "left" not in said({"latency": 10.0}), "the dense network takes less"


def test_parts_of_composed_methods_are_listed_with_their_budgets() -> None:
    inner = {"name": "together", "methods": [{"name": "b", "options": {}}, {"name": "c"}]}
    method = {
        "name": "chain",
        "stages": [
            {"method": {"name": "a", "options": {"p": 0.9}}, "budget": {"params": 0.5}, "share": 2},
            {"method": inner, "budget": None, "share": 1.0},
        ],
    }
    found = [(part["name"], note) for part, note in words.parts(method)]
    assert found == [("a", "share 2, budget params = 0.5"), ("b", ""), ("c", "")]
    assert "(share 2, budget params = 0.5)" in html(resnet20(method=method))


@pytest.mark.parametrize("width", [60, 80, 120])
def test_terminal_tables_fit(width: int) -> None:
    report = resnet20()
    for shown in (table.before_after(report), table.layers(report)):
        lines = text_of(shown, width).splitlines()
        assert max(map(len, lines)) <= width


def test_terminal_tables_say_it_all() -> None:
    report = resnet20()
    costs, rows = text_of(table.before_after(report)), text_of(table.layers(report))
    for part in ("91.83 %", "70.1k", "3.8×", "286 kB", "2.12 ms", "Budget met"):
        assert part in costs
    for part in ("layer3.2.conv2", "tucker2 18/18", "36.9k → 5.22k", "−86 %", "excluded by fc*"):
        assert part in rows
    assert "19 layers without MACs" in rows


def test_terminal_tables_take_square_brackets_as_they_are() -> None:
    cost = {"params": 1, "macs": 1, "bytes": 4}
    row = LayerRow("a[red]b[/nope]", "X", "dense", (), None, cost, cost, "[bold]no")
    shown = text_of(table.layers(resnet20(layers=(row,))))
    assert "a[red]b[/nope]" in shown and "[bold]no" in shown


def test_methods_table_at_80_columns() -> None:
    class Shrink:
        """Makes it small, in one sentence that is long enough to be wrapped in a terminal."""

    entry = Entry(
        "shrink", Shrink, Paper("T", "A", "ICPR", 2020, "https://a.b"), ("params",), "lowrank"
    )
    shown = text_of(table.methods([entry]))
    assert "shrink" in shown and "lowrank" in shown and "ICPR 2020" in " ".join(shown.split())
    assert max(map(len, shown.splitlines())) <= 80


def test_inspect_table_shortens_numbers_and_draws_spectra() -> None:
    rows = [
        {"layer": "conv1", "params": 36_864, "ranks": [8, 12], "spectrum": [4.0, 2, 1, 0.5, 0]},
        {"layer": "fc", "why": "too small"},
    ]
    shown = text_of(table.inspect(rows))
    for part in ("36.9k", "8/12", "█▄▂▁▁", "too small", "–"):
        assert part in shown
    assert table.inspect([]).row_count == 0
    assert table.spark([0.0] * 40) == "▁" * table.SPARK


def test_markdown_has_every_layer_and_every_fact() -> None:
    report = resnet20()
    text = markdown(report)
    for row in report.layers:
        assert f"| {row.layer} |" in text
    for part in ("excluded by fc", "torch", "2.13.0", "seed", "max difference", "3 min 03 s"):
        assert part in text
    columns = {len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if "conv" in line}
    assert columns == {10}


def test_markdown_escapes_names() -> None:
    cost = {"params": 1, "macs": 1, "bytes": 4}
    row = LayerRow(EVIL, "X", "dense", (), None, cost, cost, "a\nb")
    text = markdown(resnet20(layers=(row,), model=EVIL))
    assert "<script" not in text.replace("\\<", "")
    assert (
        len(
            re.findall(
                r"(?<!\\)\|",
                next(li for li in text.splitlines() if "onerror" in li and li[0] == "|"),
            )
        )
        == 10
    )


def test_page_is_one_accessible_file() -> None:
    page = html(resnet20())
    seen = read(page)
    assert len(page) < 6_000_000
    assert page.count("plotly.js v") == 1
    names = dict(seen.tags)
    assert names["html"]["lang"] == "en" and "viewport" in str(seen.tags)
    for tag, attributes in seen.tags:
        assert tag not in ("link", "iframe", "img")
        assert "src" not in attributes
    for _, attributes in seen.tags:
        if "role" in attributes:
            assert attributes["aria-label"]
    identifiers = [a["id"] for _, a in seen.tags if "id" in a]
    assert len(identifiers) == len(set(identifiers))
    assert all(a["aria-labelledby"] in identifiers for _, a in seen.tags if "aria-labelledby" in a)


def test_page_draws_the_cells_that_a_search_ended_with() -> None:
    first, last = (Genotype.of(((op, 0), (op, 1))) for op in ("skip_connect", "sep_conv_3x3"))
    rows = tuple(
        {"step": n, "epoch": n, "genotype": g.plain()} for n, g in enumerate((first, last))
    )
    images = [a for tag, a in read(html(resnet20(history=rows))).tags if tag == "img"]
    drawn = b64decode(images[0]["src"].removeprefix("data:image/svg+xml;base64,")).decode()
    assert len(images) == 1 and images[0]["alt"]
    assert "sep_conv_3x3" in drawn and "skip_connect" not in drawn


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"sizes": {"conv1": 3, "stage.<0>": 7}}, ["k3", "conv1", "k7", "stage.<0>"]),
        ({"ops": ["mbconv_k5_e3", "skip_connect"]}, ["k5 e3", "1", "skip", "2"]),
        ({"depths": [2, 3]}, ["2 blocks", "1", "3 blocks", "2"]),
    ],
)
def test_page_draws_the_sizes_and_blocks_that_a_search_ended_with(
    row: dict[str, Any], said: list[str]
) -> None:
    first = {"step": 0, "epoch": 0, **{key: type(value)() for key, value in row.items()}}
    history = (first, {"step": 1, "epoch": 1, **row}, {"step": 2, "epoch": 2, "loss": 1.0})
    images = [a for tag, a in read(html(resnet20(history=history))).tags if tag == "img"]
    drawn = b64decode(images[0]["src"].removeprefix("data:image/svg+xml;base64,")).decode()
    parts = ElementTree.fromstring(drawn)
    kind = "{http://www.w3.org/2000/svg}"
    assert [text.text for text in parts.iter(f"{kind}text")][1:] == said
    sides = [float(square.attrib["width"]) for square in parts.iter(f"{kind}rect")]
    kernels = [int(word[1]) if word[0] == "k" else 0 for word in said[::2]]
    assert sides == [9 * kernel for kernel in kernels]


def test_page_has_every_layer_and_every_fact() -> None:
    report = resnet20()
    said = " ".join(read(html(report)).words)
    for row in report.layers:
        assert row.layer in said
        assert row.reason in said
    for part in (
        words.headline(report),
        "Budget met",
        "max difference",
        "2.13.0",
        "cosine",
        "seed",
    ):
        assert part in said


def test_page_escapes_everything_a_user_can_name() -> None:
    report = json.loads(resnet20().to_json().replace("layer3.2.conv2", "NAME"))
    report |= {"model": EVIL, "data": EVIL, "device": EVIL, "misses": [EVIL], "met": False}
    report |= {"versions": {EVIL: EVIL}, "export": {EVIL: EVIL}, "train": {EVIL: EVIL}}
    report["method"] = {"name": EVIL, "options": {EVIL: EVIL}}
    report["seconds"] = {EVIL: 1.0}
    text = json.dumps(report).replace("NAME", json.dumps(EVIL)[1:-1])
    page = html(Report.from_json(text))
    seen = read(page)
    assert [tag for tag, _ in seen.tags].count("img") == 0
    assert [tag for tag, _ in seen.tags].count("script") == 2 + len(plots(resnet20()))
    assert not any(key.startswith("on") for _, attributes in seen.tags for key in attributes)


def test_links_lead_to_the_web_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for url, linked in (("https://arxiv.org/abs/2105.04218", True), ("javascript:alert(1)", False)):
        entry = Entry("nrmf", Report, Paper("Title", "A. Author", "ICPR", 2020, url), (), "lowrank")
        monkeypatch.setattr(words, "entry", lambda name, entry=entry: entry)
        page = html(resnet20())
        assert ("href" in str(read(page).tags)) is linked
        assert "A. Author. ICPR 2020." in page


def test_figures_without_data_are_left_out_with_a_sentence() -> None:
    report = bare()
    found = plots(report)
    missing = {name for name, plot in found.items() if plot.figure is None}
    assert missing == {"spectrum", "ranks", "training", "layers", "stages"}
    seen = read(html(report))
    assert sum(a.get("class") == "graph" for _, a in seen.tags) == 1
    for name in missing:
        assert found[name].caption in " ".join(seen.words)
    markdown(report)
    text_of(table.before_after(report))


def test_spectrum_compares_with_the_control_on_the_same_axes() -> None:
    figure = plots(resnet20())["spectrum"].figure
    lines = [trace for trace in figure.data if trace.name]
    assert {trace.xaxis for trace in lines} == {"x", "x2"}
    assert figure.layout.yaxis2.matches == "y" and figure.layout.xaxis2.matches == "x"
    assert [a.text for a in figure.layout.annotations] == [
        "<b>with the penalty</b>", "<b>without the penalty</b>",
    ]  # fmt: skip
    buttons = figure.layout.updatemenus[0].buttons
    assert len(buttons) == 2 * LAYERS
    assert buttons[0].label == "layer3.2.conv2, input channels"  # lost most parameters
    assert list(buttons[0].args[0]["y"][0]) == list(lines[0].y)
    assert figure.layout.shapes[0].x0 == 18.5  # its rank


@pytest.mark.parametrize("control", [True, False])
def test_the_still_picture_is_well_formed(control: bool) -> None:
    text = spectrum_svg(resnet20(control=control))
    root = ElementTree.fromstring(text)
    lines = [
        path for path in root.iter("{http://www.w3.org/2000/svg}path") if "L" in path.get("d", "")
    ]
    assert len(lines) == 2 * 9
    with pytest.raises(PliantError, match="needs spectra"):
        spectrum_svg(bare())


def test_spectrum_without_control_shows_both_unfoldings() -> None:
    figure = plots(resnet20(control=False))["spectrum"].figure
    assert [a.text for a in figure.layout.annotations] == [
        "<b>input channels</b>", "<b>output channels</b>",
    ]  # fmt: skip
    assert len(figure.layout.updatemenus[0].buttons) == LAYERS


def test_long_histories_are_thinned() -> None:
    spectra = {"a": {"in": [float(i) for i in range(2048, 0, -1)], "out": [1.0, 0.5]}}
    rows = tuple(
        {"step": e, "epoch": e, "loss": 1 / (e + 1), "spectra": spectra, "ranks": {"a": [9, 1]}}
        for e in range(3000)
    )
    cost = {"params": 9, "macs": 9, "bytes": 36}
    layer = LayerRow("a", "Linear", "dense", (), None, cost, cost)
    found = plots(resnet20(history=rows, layers=(layer,)))
    drawn = [trace for trace in found["spectrum"].figure.data if trace.x and trace.xaxis == "x"]
    drawn = [trace for trace in drawn if trace.name]
    assert len(drawn) == EPOCHS
    assert drawn[0].name == "epoch 0" and drawn[-1].name == "epoch 2999"
    assert len(drawn[0].x) <= 160 and drawn[0].x[-1] == 2048
    assert max(len(trace.x) for trace in found["training"].figure.data) <= 400


def test_ranks_are_shares_of_full_rank() -> None:
    figure = plots(resnet20())["ranks"].figure
    values = [y for trace in figure.data if trace.name for y in trace.y]
    assert min(values) > 0 and max(values) <= 100
    assert "layer1.0.conv1" in figure.layout.xaxis2.ticktext


def test_phases_are_shaded_and_steps_go_on_when_a_phase_counts_anew() -> None:
    rows = [{"step": s, "epoch": 0, "loss": 1.0, "phase": "search"} for s in (0, 5, 10)]
    rows += [{"step": s, "epoch": 0, "loss": 0.5, "phase": "finetune"} for s in (0, 5)]
    figure = plots(resnet20(history=tuple(rows)))["training"].figure
    assert list(figure.data[0].x) == [0, 5, 10, 10, 15]
    spans = [(shape.label.text, shape.x0, shape.x1) for shape in figure.layout.shapes]
    assert spans == [("search", 0, 10), ("finetune", 10, 15)]


def test_bars_show_the_budget_on_the_dense_bar() -> None:
    figure = plots(resnet20())["costs"].figure
    (mark,) = figure.layout.shapes
    assert mark.x0 == pytest.approx(40.0)
    assert list(figure.data[0].y)[3] == "Parameters" and 3 < mark.y1 < 3.5
    assert not plots(bare())["costs"].figure.layout.shapes


def test_wide_and_narrow_layouts_name_the_same_settings() -> None:
    for plot in plots(resnet20()).values():
        meta = plot.figure.layout.meta
        assert set(meta["wide"]) == set(meta["narrow"])


def test_values_that_are_not_finite_break_nothing() -> None:
    report = resnet20()
    after = replace(report.after, loss=float("nan"))
    rows = tuple({**row, "loss": None} for row in report.history)
    html(resnet20(history=rows, after=after))


@pytest.mark.parametrize("count", range(1, 7))
def test_panels_side_by_side_stay_within_the_page(count: int) -> None:
    layout = canvas.panels([str(n) for n in range(count)], count)
    ends = [value for key, value in layout.items() if key.endswith("axis.domain") or "axis" in key]
    spans = [span for span in ends if isinstance(span, list)]
    assert len(spans) == 2 * count and all(0 <= low < high <= 1 for low, high in spans)


def test_networks_with_three_costs_are_drawn_and_listed() -> None:
    after = replace(resnet20().after, latency_ms=1.0)
    named = [(str(n), replace(resnet20(), after=replace(after, params=n))) for n in (1, 2)]
    page = runs.overview([runs.row(*each) for each in named], "Runs")
    assert page.count('"matches":"y"') == 2 and "networks.csv" in page
