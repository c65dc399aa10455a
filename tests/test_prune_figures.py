"""What pages of pruning methods say was measured is what the committed results say."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from bench.claim import shown
from pliant.registry import entries

RESULTS = Path(__file__).resolve().parents[1] / "bench" / "results"
SAID = re.compile(
    r"bench ``(?P<bench>[\w-]+)``\): with (?P<share>\d+) % of its (?P<axis>[a-z-]+), trained for "
    r"(?P<epochs>\d+) epochs on (?P<images>[\d,]+) images, (?P<network>.*?) was right on "
    r"(?P<own>[\d.]+) % by ``(?P<spec>[^`]+)`` and on (?P<other>[\d.]+) % by ``magnitude``"
)
AXES = {"multiply-accumulates": "macs", "parameters": "params"}
BEHIND = {"prune-family", "prune-vgg16"}
METHODS = {entry.name: entry for entry in entries(family="prune")}


def result(bench: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{bench}.json").read_text())
    return found


def said(name: str) -> list[dict[str, str]]:
    text = " ".join((METHODS[name].kind.__doc__ or "").split())
    return [match.groupdict() for match in SAID.finditer(text)]


@pytest.mark.parametrize("name", METHODS)
def test_figures_are_those_of_the_results(name: str) -> None:
    for row in said(name):
        found = result(row["bench"])
        settings = found["settings"]
        means = {r["rival"]: r for r in found["summary"]}
        (rival,) = (r for r, spec in settings["rivals"].items() if spec == row["spec"])
        axis = AXES[row["axis"]]
        share = means[rival][axis]["mean"] / means["dense"][axis]["mean"]
        assert row["share"] == f"{100 * share:.0f}"
        for which, key in ((rival, "own"), ("magnitude", "other")):
            assert row[key] == f"{100 * means[which]['accuracy']['mean']:.1f}", (name, which)
        assert int(row["epochs"]) == settings["train"]["epochs"]
        assert int(row["images"].replace(",", "")) == settings["images"]["train"]


@pytest.mark.parametrize("bench", sorted(BEHIND))
def test_who_does_not_beat_magnitude_says_so(bench: str) -> None:
    found = result(bench)
    for row in found["claims"]:
        name = row["claim"].removesuffix(" is better than magnitude")
        if name in METHODS and name != row["claim"] and row["state"] != "holds":
            assert bench in [each["bench"] for each in said(name)], name


def test_pages_say_which_claims_of_their_papers_did_not_show() -> None:
    for row in result("prune-items")["claims"]:
        name, _, text = row["claim"].partition(": ")
        page = " ".join((METHODS[name].kind.__doc__ or "").split())
        assert (f"{text} ({shown(row)})" in page) is (row["state"] != "holds"), (name, text)
