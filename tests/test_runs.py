"""Pages over several runs: what they show of each, and where their links lead."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from typer.testing import CliRunner

from pliant.cli import app
from pliant.cli.folder import legible, read_report
from pliant.errors import PliantError
from pliant.render.many import front
from pliant.render.markdown import markdown
from pliant.render.runs import compare, overview, row
from pliant.result import Report
from tests.reports import resnet20


def _judged(report: Report, name: str, value: float, unit: str, better: str) -> Report:
    after = replace(report.after, accuracy=None, metrics={name: value})
    before = replace(report.before, accuracy=None, metrics={name: 2 * value})
    metrics = {name: {"unit": unit, "better": better}}
    return replace(report, before=before, after=after, metrics=metrics)


def test_pages_of_runs_show_the_metric_that_judges() -> None:
    """A regression is not without a score, nor a segmenter judged by its pixels."""
    small, large = resnet20(), replace(resnet20(), after=replace(resnet20().after, params=10**7))
    rows = [row(name, _judged(report, "PSNR", 31.25, "dB", "higher"), "x/report.html")
            for name, report in (("a", small), ("b", large))]  # fmt: skip
    page = overview(rows, "Runs")
    assert "31.25 dB" in page and ">PSNR<" in page and "accuracy" not in page.split("<main>")[0]
    lower = [{"name": n, "score": s, "metric": "RMSE", "unit": "", "better": "lower", "params": p}
             for n, s, p in (("a", 2.0, 10), ("b", 1.0, 20), ("c", 3.0, 30))]  # fmt: skip
    assert [each["name"] for each in front(lower, "params")] == ["a", "b"]
    mixed = overview([rows[0], row("c", resnet20())], "Runs")
    assert "share no axis" in mixed and "PSNR 31.25 dB" in mixed and "accuracy 9" in mixed


def test_runs_of_different_networks_have_each_its_own_before() -> None:
    one = resnet20()
    other = replace(one, before=replace(one.before, params=12_345))
    both = compare([("one", one), ("other", other)])
    assert "before one" in both and "before other" in both and "12.3k" in both
    assert "before one" not in compare([("one", one), ("again", one)])


@pytest.mark.parametrize("name", ["javascript:alert(1)", "a#b?c", "50%20"])
def test_a_link_to_a_run_is_a_path_whatever_its_folder_is_called(name: str) -> None:
    (link,) = re.findall(
        r'href="([^"]*report.html)"',
        overview([row(name, resnet20(), name + "/report.html")], "Runs"),
    )
    assert urlsplit(link).scheme == "" and urlsplit(link).netloc == ""
    assert unquote(urlsplit(link).path).removeprefix("./") == f"{name}/report.html"


ODD: tuple[Any, ...] = (None, "x", -1, 1e999, math.nan, [], {}, [1], {"a": 1}, True, 10**400)


def test_a_report_of_wrong_types_is_refused_in_a_sentence(tmp_path: Path) -> None:
    """Whatever stands in the file, no command ends in a traceback, and `runs` lists the rest."""
    good = json.loads(resnet20().to_json())
    good |= {"history": good["history"][:4], "layers": good["layers"][:3]}
    run, wrong = CliRunner().invoke, tmp_path / "wrong" / "report.json"
    wrong.parent.mkdir()
    places = [("after",), ("layers", 0), ("verdict",), ("history", 3), ("method",), ("budget",)]
    places += [("after", "params"), ("layers", 0, "before", "macs"), ("versions", "torch")]
    for number, path in enumerate(places):
        text = json.loads(json.dumps(good))
        at = text
        for key in path[:-1]:
            at = at[key]
        for odd in ODD[number % 2 :: 2]:
            at[path[-1]] = odd
            wrong.write_text(json.dumps(text))
            try:
                _, report = read_report(wrong)
                with legible(wrong):
                    markdown(report)
                    row("wrong", report)
            except PliantError as error:
                assert str(wrong) in str(error) and len(str(error)) < 400
    wrong.write_text(json.dumps(good | {"before": 1}))
    assert run(app, ["report", str(wrong.parent)]).exit_code == 2
    (tmp_path / "report.json").write_text(json.dumps(good))
    done = run(app, ["runs", str(tmp_path)])
    assert done.exit_code == 0 and "is no report and was left out" in done.output
