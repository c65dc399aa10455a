"""The page in a real browser: it draws everything, asks for nothing and fits a phone."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pliant.render.html import html
from pliant.render.runs import compare, overview, row
from pliant.render.sensitivity import sensitivity_html
from pliant.result import Finding, Report
from tests import browser
from tests.reports import elastic, resnet20

CHROMIUM = browser.find()
FIGURES = 7
GRAPHS = "[...document.querySelectorAll('.graph')]"
SPECTRUM = "document.querySelector('[data-figure=figure-spectrum]')"


def choose(page: browser.Page, index: int) -> None:
    page.run(f"select = document.querySelector('select'); select.selectedIndex = {index}")
    page.run("select.dispatchEvent(new Event('change'))")
    page.settle()


pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,  # a browser starts and draws for seconds
    pytest.mark.timeout(600),  # and longer where others use the machine
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
]


@pytest.fixture(scope="module")
def page() -> Iterator[browser.Page]:
    assert CHROMIUM is not None
    with browser.chromium(CHROMIUM) as opened:
        yield opened


@pytest.fixture(autouse=True)
def clean(page: browser.Page) -> Iterator[None]:
    page.errors.clear()
    page.requests.clear()
    yield
    assert page.errors == []
    asked = [url for url in page.requests if not url.startswith(("file:", "data:", "blob:"))]
    assert asked == []


def test_these_tests_would_see_an_error_and_a_request(page: browser.Page, tmp_path: Path) -> None:
    path = tmp_path / "broken.html"
    path.write_text("<script src='http://host.invalid/x.js'></script><script>nothing()</script>")
    page.open(path)
    assert any("nothing is not defined" in error for error in page.errors)
    assert "http://host.invalid/x.js" in page.requests
    page.errors.clear()
    page.requests.clear()


def drawn(page: browser.Page) -> int:
    return int(page.run(f"{GRAPHS}.filter(g => g.querySelector('.main-svg')).length"))


def test_a_report_on_a_desk_and_on_a_phone(page: browser.Page, tmp_path: Path) -> None:
    """One opening for all that can be asked of it: drawing takes seconds."""
    path = tmp_path / "report.html"
    path.write_text(html(resnet20()), encoding="utf-8")
    page.open(path)
    assert drawn(page) == FIGURES
    _fits(page, 1280)
    assert page.run(f"{SPECTRUM}.layout.xaxis2.domain[0]") > 0.5
    _spectra_can_be_chosen(page)
    ink = "getComputedStyle(document.querySelector('.main-svg .xtitle')).fill"
    light = page.run(ink)
    page.look(width=390, dark=True)
    page.settle()
    _fits(page, 390)
    assert page.run(f"{SPECTRUM}.layout.xaxis2.domain[0]") == 0, "panels stack on a phone"
    assert page.run(ink) != light


def _fits(page: browser.Page, width: int) -> None:
    assert page.run("document.documentElement.scrollWidth") <= width
    outside = "g.querySelector('.main-svg').getBoundingClientRect().width > g.clientWidth + 1"
    assert page.run(f"{GRAPHS}.filter(g => {outside}).length") == 0


def _spectra_can_be_chosen(page: browser.Page) -> None:
    before = page.run(f"{SPECTRUM}.data[0].y.join()")
    choose(page, 5)
    assert page.run(f"{SPECTRUM}.data[0].y.join()") != before
    choose(page, 0)
    assert page.run(f"{SPECTRUM}.data[0].y.join()") == before
    assert "rank 18" in page.run(f"JSON.stringify({SPECTRUM}.layout.shapes)")


def test_a_phone_draws_a_report_from_the_start(page: browser.Page, tmp_path: Path) -> None:
    path = tmp_path / "phone.html"
    path.write_text(html(resnet20(control=False)), encoding="utf-8")
    page.open(path, width=390)
    assert drawn(page) == FIGURES
    _fits(page, 390)


def test_a_hostile_name_runs_nothing(page: browser.Page, tmp_path: Path) -> None:
    text = resnet20().to_json()
    evil = "</script><script>window.hit=1</script><img src=x onerror='window.hit=1'>"
    path = tmp_path / "evil.html"
    path.write_text(html(Report.from_json(text.replace("layer3.2.conv2", evil))), encoding="utf-8")
    page.open(path)
    assert page.run("window.hit") is None
    assert drawn(page) == FIGURES
    assert "<script>window.hit" in page.run("document.querySelector('select').textContent")


def test_a_bare_report_opens(page: browser.Page, tmp_path: Path) -> None:
    path = tmp_path / "bare.html"
    path.write_text(html(resnet20(history=(), seconds={}, layers=(), budget={})), encoding="utf-8")
    page.open(path)
    assert drawn(page) == 2  # costs, and accuracy against them


# ---------------------------------------------------------------- pages over many networks

SHADE = """(element, what) => {
  const parts = getComputedStyle(element)[what].match(/[\\d.]+/g).map(Number);
  return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
}"""


def smaller(report: Report, share: float) -> Report:
    after = report.after
    accuracy = (after.accuracy or 0) - 0.1 * (1 - share)
    costs: dict[str, Any] = {"params": round(share * after.params), "latency_ms": 2.1 * share}
    return replace(report, after=replace(after, accuracy=accuracy, **costs))


def runs() -> list[tuple[str, Report]]:
    report = resnet20(control=False)
    return [(f"run-{n}", smaller(report, share)) for n, share in enumerate((0.5, 1.0, 0.75))]


def tried() -> tuple[dict[str, Any], ...]:
    """Rows of a search, one refused, as a report of `smallest` has them."""
    rows: list[dict[str, Any]] = [
        {"share": share, "params": round(1000 * share), "macs": 10, "bytes": 10, "seconds": 1.0,
         "accuracy": 0.9 * share, "lost": 90 * (1 - share), "within": share > 0.5}
        for share in (0.2, 0.9, 0.6)
    ]  # fmt: skip
    refused = {"share": 0.01, "refused": "too small"}
    return (*rows[:2], rows[2] | {"chosen": True, "why": "the smallest"}, refused)


def sensitive() -> Finding:
    names = [f"layer{s}.{block}.conv{n}" for s in (1, 2) for block in (0, 1) for n in (1, 2)]
    rows: list[dict[str, Any]] = [
        {"layer": name, "share": share, "became": f"svd {round(64 * share)}",
         "params": round(100_000 - 10_000 * (1 - share)), "macs": 2_000_000,
         "score": 0.9, "loss": 0.3 + 0.1 * place, "lost": place * (1 - share)}
        for place, name in enumerate(names)
        for share in (0.5, 0.1)
    ]  # fmt: skip
    values = {"accuracy": 0.92, "loss": 0.3, "params": 100_000, "macs": 2_000_000}
    return Finding(values, tuple(rows), "said", method={"name": "sensitivity to rank"})


PAGES = {
    "search": lambda: html(replace(elastic(), tried=tried())),
    "runs": lambda: overview([row(*run) for run in runs()], "Runs of a folder"),
    "compare": lambda: compare(runs()),
    "sensitivity": lambda: sensitivity_html(sensitive(), model="resnet20", data="cifar10"),
}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_fits_and_reads_on_every_screen(
    name: str, page: browser.Page, tmp_path: Path
) -> None:
    """No overflow on a phone or a desk; text stands out from what it is on, light and dark."""
    path = tmp_path / f"{name}.html"
    path.write_text(PAGES[name](), encoding="utf-8")
    page.open(path)
    for width, dark in ((1280, False), (390, False), (390, True)):
        page.look(width=width, dark=dark)
        page.settle()
        _fits(page, width)
        paper = page.run(f"({SHADE})(document.body, 'backgroundColor')")
        shades = page.run(
            f"[...document.querySelectorAll('p, th, td, dt, h2, label')]"
            f".map(one => ({SHADE})(one, 'color'))"
        )
        assert (paper < 60) is dark and len(shades) > 10
        assert all(abs(shade - paper) > 60 for shade in shades), sorted(shades)


def column(page: browser.Page, number: int) -> list[str]:
    rows = "[...document.querySelectorAll('table[data-sort] tbody tr:not([hidden])')]"
    found: list[str] = page.run(f"{rows}.map(r => r.cells[{number}].textContent.trim())")
    return found


def press(page: browser.Page, head: str) -> None:
    buttons = "[...document.querySelectorAll('table[data-sort] thead button')]"
    page.run(f"{buttons}.find(b => b.textContent === {head!r}).click()")


def put(page: browser.Page, where: str, value: str, event: str) -> None:
    page.run(f"one = document.querySelector({where!r}); one.value = {value!r}")
    page.run(f"one.dispatchEvent(new Event({event!r}))")


def test_runs_sort_by_numbers_and_filter(page: browser.Page, tmp_path: Path) -> None:
    path = tmp_path / "runs.html"
    path.write_text(PAGES["runs"](), encoding="utf-8")
    page.open(path)
    assert column(page, 0) == ["run-0", "run-1", "run-2"]
    press(page, "params")
    assert column(page, 0) == ["run-0", "run-2", "run-1"]
    assert page.run("document.querySelector('[aria-sort]').textContent") == "params"
    press(page, "params")
    assert column(page, 0) == ["run-1", "run-2", "run-0"]
    put(page, "input[type=search]", "RUN-2", "input")
    assert column(page, 0) == ["run-2"]
    put(page, "input[type=search]", "", "input")
    assert len(column(page, 0)) == 3


def test_what_if_adds_up_what_was_measured(page: browser.Page, tmp_path: Path) -> None:
    path = tmp_path / "sensitivity.html"
    path.write_text(PAGES["sensitivity"](), encoding="utf-8")
    page.open(path)

    def sums() -> list[str]:
        found: list[str] = page.run(
            "[...document.querySelectorAll('[data-sum]')].map(e => e.textContent)"
        )
        return found

    assert sums() == ["100k", "2M", "0.0", "0.300"]
    put(page, "tr[data-layer='layer1.0.conv2'] select", "0.1", "change")
    assert sums() == ["91k", "2M", "0.9", "0.400"]
    assert "svd 6" in column(page, 2) and column(page, 2).count("as it is") == 7
    spec = page.run("document.querySelector('[data-spec]').textContent")
    assert '"layer1.0.conv1"' in spec and '"layer1.0.conv2"' not in spec
    put(page, "[data-all]", "0.5", "change")
    assert sums() == ["60k", "2M", "14.0", "3.10"]
    put(page, "[data-most]", "50", "input")  # a quarter of the largest loss, 6.3
    assert page.run("document.querySelector('[data-most-said]').textContent") == "1.57"
    chosen = page.run("[...document.querySelectorAll('tr[data-layer] select')].map(s => s.value)")
    assert chosen == ["0.1", "0.1", "0.5", "0.5", "1", "1", "1", "1"]
    press(page, "stays")
    assert column(page, 0)[-1] == "layer2.1.conv2"
