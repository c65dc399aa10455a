"""The bench of other people's networks: its list, what it tries, and what it claims of that."""

import json
from typing import Any

import pytest
import torch
from torch import nn

from bench import tries
from bench.experiments import Cell, architectures, load
from bench.networks import NETWORKS
from bench.networks.network import Network, image, tokens

SETTINGS = load("architectures").settings


def toy() -> nn.Module:
    body = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


class Answers:
    """Keeps what a process would send."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, Any]] = []

    def send(self, row: tuple[str, Any]) -> None:
        self.sent.append(row)


def work(make: Any = toy) -> tuple[tries._Work, Answers]:
    answers = Answers()
    return tries._Work(
        Network("toy", make, image(12, "input")), SETTINGS["tries"], answers
    ), answers


def test_there_are_more_than_a_hundred_networks_of_all_packages() -> None:
    packages = {network.package for network in NETWORKS.values()}
    assert len(NETWORKS) >= 150 and len(packages) == 8
    names = [cell.key["network"] for cell in architectures.cells(SETTINGS)]
    assert names == SETTINGS["networks"] and len(set(names)) == len(names) >= 100
    assert {NETWORKS[name].package for name in names} == packages
    every = architectures.cells({**SETTINGS, "networks": []})
    assert [cell.key["network"] for cell in every] == list(NETWORKS)


def test_a_network_is_the_same_every_time_and_its_norms_have_seen_noise() -> None:
    network = Network("toy", toy, image(12, "input"))
    first, second = network.build(), network.build()
    x = network.inputs(2)
    assert torch.equal(first(**x), second(**x))
    assert not torch.equal(first[1].running_mean, torch.zeros(16)) and not first[1].training
    ids = tokens(5, 50, "a b", {"more": 1})(3)
    assert ids["a"].shape == ids["b"].shape == (3, 5) and ids["more"] == 1


def test_every_column_tries_what_it_says() -> None:
    job, answers = work()
    assert job.network()["params"] == 2970
    assert job.ranks()["works"] and job.channels()["works"] and job.bits()["works"]
    assert job.files() == {"equal": True, "files": 3}
    assert [row for row in answers.sent if row[0] == "wrong"] == []
    assert job.answering() == {"6"}


def test_what_is_wrong_is_found() -> None:
    job, answers = work()
    job.network()
    job.ranks()
    job.before = [answer + 1 for answer in job.before]
    job._equal_at_full_rank(job.made["ranks"])
    assert "at full ranks the outputs change" in answers.sent[-1][1]


def test_raw_errors_are_told_from_refusals() -> None:
    def refuse() -> dict[str, Any]:
        raise tries.PliantError("No.")

    def fail() -> dict[str, Any]:
        raise KeyError("x")

    assert tries._tried(refuse) == {"why": "No."}
    assert tries._tried(fail) == {"why": "KeyError: 'x'", "raw": True}
    assert tries.general("a.b.c is tied to d.e") == "LAYER is tied to LAYER"


@pytest.mark.parametrize("works", [True, False])
def test_claims_count_what_works_what_is_wrong_and_raw_errors(works: bool) -> None:
    values = {
        **{name: {fact: works} for name, fact in architectures.CHECKS.items()},
        "wrong": [] if works else ["outputs"],
        "network": {"params": 5},
    }
    if not works:
        values["bits"] = {"why": "TypeError: x", "raw": True}
    cells = [{"key": cell.key, "values": values} for cell in architectures.cells(SETTINGS)]
    claims = architectures.claims(SETTINGS, cells)
    assert len(claims) == 8
    assert [c["value"] for c in claims[-2:]] == ([0, 0] if works else [len(cells)] * 2)
    assert claims[0]["value"] == (100 if works else 0)
    rows = architectures.summary(SETTINGS, cells)
    assert sum(row["networks"] for row in rows) == len(cells)
    json.dumps([table.rows for table in architectures.tables(SETTINGS, cells)])


def test_a_package_that_is_missing_leaves_its_rows_out() -> None:
    NETWORKS["missing"] = Network("no_such_package", toy, image(12, "input"))
    try:
        with pytest.raises(tries.MissingExtraError, match="not installed"):
            architectures.measure(Cell({"network": "missing"}, dict(SETTINGS)), print)
    finally:
        del NETWORKS["missing"]
