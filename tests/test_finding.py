"""The page of a finding: pictures that say what the numbers say, and nothing that breaks out."""

import io
import json
import re
from base64 import b64decode
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from pliant.cli import app
from pliant.render import png
from pliant.render.finding import finding_html
from pliant.result import Curves, Finding, Heat
from tests import browser
from tests.test_render import EVIL, read

CHROMIUM = browser.find()


def finding(**changes: object) -> Finding:
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    maps = torch.tensor([[[1.0, -2.0], [0.0, 0.5]], [[0.1, 0.2], [0.3, 4.0]]])
    lines = {"evidence": [(0.0, 0.9), (1.0, 0.1)], "random": [(0.0, 0.9), (1.0, 0.4)]}
    bands = {"evidence": [(0.0, 0.8, 1.0), (1.0, 0.0, 0.2)]}
    given: dict[str, object] = {
        "values": {"agreement": 0.25, "evidence": maps},
        "rows": ({"what": "tiles", "agreement": 0.25}, {"what": "layer", "shifted": 0.5}),
        "text": "Half of it stays.",
        "method": {"name": "pointwise_activation", "options": {"steps": 20}},
        "figures": (
            Heat("Evidence", "Where it comes from.", images, maps, ("a cat", "a dog")),
            Curves("Deletion", "How fast it goes.", lines, "share", "probability", bands),
        ),
    }
    return Finding(**{**given, **changes})  # type: ignore[arg-type]


def test_a_page_holds_sentence_numbers_table_and_method():
    page = finding_html(finding(), model="resnet20", data="digits")
    seen = " ".join(" ".join(read(page).words).split())
    for words in (
        *("pointwise activation of resnet20", "Half of it stays.", "agreement 0.25", "tiles"),
        *("a cat", "Strongest colour: 4.", "How fast it goes.", "How Does DCNN Make Decisions?"),
        *("steps 20", "2x2x2 numbers", "digits"),
    ):
        assert words in seen, words
    figures = re.findall(r'<script type="application/json" id="(.*?)">(.*?)</script>', page)
    drawn = json.loads(figures[0][1])
    assert [trace.get("name") for trace in drawn["data"]] == [None, "evidence", "random"]
    assert drawn["data"][0]["y"] == [1.0, 0.2, 0.0, 0.8]  # along the top and back


def test_a_finding_without_anything_is_a_page_too():
    page = finding_html(Finding({"sensitivity": 0.5}, text="It moves."))
    assert "It moves." in page and "0.5" in page
    read(page)


def test_names_cannot_break_out_of_the_page():
    lines = {EVIL: [(0.0, 1.0)]}
    images, maps = torch.zeros(1, 1, 2, 2), torch.zeros(1, 2, 2)
    figures = (Heat(EVIL, EVIL, images, maps, (EVIL,)), Curves(EVIL, EVIL, lines, EVIL, EVIL))
    evil = finding(
        values={EVIL: 1.0}, rows=({EVIL: EVIL},), text=EVIL, figures=figures, method={"name": EVIL}
    )
    page = read(finding_html(evil, model=EVIL, data=EVIL))
    assert "alert" not in {tag for tag, _ in page.tags}
    assert not any(attrs.get("onerror") for _, attrs in page.tags)


def opened(source: str) -> Tensor:
    image = pytest.importorskip("PIL.Image").open(io.BytesIO(b64decode(source.split(",")[1])))
    numpy = pytest.importorskip("numpy")
    return torch.as_tensor(numpy.asarray(image).copy())


def test_pictures_can_be_read_by_others():
    pixels = torch.randint(256, (5, 7, 3), generator=torch.Generator().manual_seed(0)).byte()
    assert torch.equal(opened(png.link(pixels)), pixels)
    covered = torch.randint(256, (3, 2, 4), generator=torch.Generator().manual_seed(0)).byte()
    assert torch.equal(opened(png.link(covered)), covered)


def test_images_are_scaled_and_colours_tell_for_from_against():
    image = torch.tensor([[[-2.0, 0.0], [1.0, 2.0]]])
    assert png.picture(image)[..., 0].tolist() == [[0, 128], [191, 255]]
    assert torch.equal(png.picture(image)[..., 0], png.picture(image)[..., 2])
    colours = png.picture(torch.stack([image[0], image[0], -image[0]]))
    assert colours[1, 1].tolist() == [255, 255, 0]
    assert png.picture(torch.ones(1, 2, 2)).unique().tolist() == [0]
    shown = png.heat(torch.tensor([[1.0, -1.0, 0.0, 0.25, 9.0]]), 1.0)[0]
    assert shown[0].tolist() == [221, 107, 32, 255] and shown[1].tolist() == [59, 130, 214, 255]
    assert shown[2, 3] == 0 and shown[3, 3] == 128 and shown[4, 3] == 255


def test_every_map_of_a_figure_has_one_scale():
    page = finding_html(finding())
    sources = re.findall(r'<img alt="a (?:cat|dog)" src="(.*?)"', page)
    cat, dog = (opened(source) for source in sources)
    assert dog[1, 1, 3] == 255 and cat[0, 0, 3] == round(255 * 0.25**0.5)
    assert cat[0, 1, 2] == 214  # against: blue


def test_plain_data_leave_the_tensors_out():
    plain = json.loads(json.dumps(finding().plain()))
    assert plain["figures"][0]["maps"] == {"shape": [2, 2, 2]}
    assert plain["figures"][1]["lines"]["evidence"] == [[0.0, 0.9], [1.0, 0.1]]


@pytest.mark.slow  # 200 digits are divided and shuffled
def test_a_folder_holds_the_page_and_the_numbers(tmp_path: Path):
    out = tmp_path / "found"
    method = "output_sensitivity"
    words = ["analyze", "lenet5", "--data", "mnist5k", "--method", method, "--out", str(out)]
    said = CliRunner().invoke(app, words)
    assert said.exit_code == 0, said.output
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "report.json"]
    assert "report.html" in said.output
    saved = json.loads((out / "report.json").read_text())
    assert saved["model"] == "lenet5" and saved["figures"] == []
    page = (out / "report.html").read_text()
    assert "output sensitivity of lenet5" in page and "moves the mean of 10 outputs" in page
    assert CliRunner().invoke(app, words).exit_code == 0  # what it wrote itself it may replace
    (out / "mine.txt").write_text("kept")
    refused = CliRunner().invoke(app, words)
    assert refused.exit_code == 2 and "mine.txt" in refused.output


@pytest.mark.browser
@pytest.mark.slow  # a browser starts and draws for seconds
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_a_browser_draws_all_of_it_and_asks_for_nothing(tmp_path: Path):
    assert CHROMIUM is not None
    path = tmp_path / "report.html"
    path.write_text(finding_html(finding(), model="resnet20"), encoding="utf-8")
    with browser.chromium(CHROMIUM) as page:
        for width, dark in ((1280, False), (390, True)):
            page.open(path, width=width, dark=dark)
            assert page.run("document.querySelectorAll('.graph .main-svg').length") > 0
            wide = page.run("[...document.images].map(i => i.naturalWidth)")
            assert wide == [8, 8, 2, 8, 8, 2]
            assert page.run("document.documentElement.scrollWidth") <= width
            over = page.run(
                "[...document.querySelectorAll('.over')].every(o => { const [a, b] = "
                "[...o.children].map(i => i.getBoundingClientRect()); return a.width > 50 && "
                "Math.abs(a.width - b.width) < 1 && Math.abs(a.height - b.height) < 1; })"
            )
            assert over, "a map must cover its image"
        assert page.errors == []
        asked = [url for url in page.requests if not url.startswith(("file:", "data:", "blob:"))]
        assert asked == []
