"""Draws the README's pictures from a run of the demo: python docs/images/draw.py runs/demo."""

import base64
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from pliant.render.svg import spectrum_svg  # noqa: E402
from pliant.result import Report  # noqa: E402
from tests.browser import Page, chromium, find  # noqa: E402

WIDE, HIGH = 1100, 800


def screenshot(page: Page, report: Path) -> bytes:
    """Photograph the top of a report, without scroll bars."""
    page.call("Emulation.setScrollbarsHidden", hidden=True)
    page.open(report.resolve(), width=WIDE, height=HIGH)
    return base64.b64decode(page.call("Page.captureScreenshot")["data"])


def main(run: Path) -> None:
    """Write demo.json, spectrum.svg and report.png beside this file."""
    text = (run / "report.json").read_text(encoding="utf-8")
    (HERE / "demo.json").write_text(text, encoding="utf-8")  # what the pictures were drawn from
    report = Report.from_json(text)
    (HERE / "spectrum.svg").write_text(spectrum_svg(report), encoding="utf-8")
    browser = find()
    if browser is None:
        sys.exit("The picture of the report needs Chromium, and there is none on the PATH.")
    with chromium(browser) as page:
        (HERE / "report.png").write_bytes(screenshot(page, run / "report.html"))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo"))
