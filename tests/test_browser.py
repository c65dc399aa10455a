"""The page in a real browser: it draws everything, asks for nothing and fits a phone."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from pliant.render.html import html
from pliant.result import Report
from tests import browser
from tests.reports import resnet20

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
