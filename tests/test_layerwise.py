"""Every layer made smaller alone: the rows are what was measured, the page adds them up."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from pliant import zoo
from pliant.api import sensitivity as room
from pliant.api.sensitivity import sensitivity
from pliant.cli import app
from pliant.cost import cost, layer_costs
from pliant.data import Data
from pliant.drivers.score import evaluate
from pliant.errors import DataError, MethodError
from pliant.method import Method
from pliant.render.sensitivity import by_layer, sensitivity_html
from pliant.result import Finding
from pliant.run import start


@pytest.fixture(scope="module")
def lenet() -> nn.Module:
    return zoo.build("lenet5", weights="mnist5k").eval()


@pytest.fixture(scope="module")
def few(mnist5k: Data) -> Data:
    return mnist5k.subset(train=200, val=200, test=10)


@pytest.fixture(scope="module")
def found(lenet: nn.Module, few: Data) -> Finding:
    before = {name: tensor.clone() for name, tensor in lenet.state_dict().items()}
    finding = sensitivity(lenet, few, shares=(0.5, 0.2), samples=128)
    assert all(torch.equal(tensor, before[name]) for name, tensor in lenet.state_dict().items())
    return finding


@pytest.mark.parametrize("kind", ["rank", "width"])
def test_only_one_layer_shrinks_and_costs_are_those_of_the_network(
    kind: Any, lenet: nn.Module, few: Data
) -> None:
    run = start(zoo.build("lenet5", weights="mnist5k"), Method(), data=few)
    dense = layer_costs(lenet, run.example)
    for row, smaller in room._TRIES[kind](run, (0.5, 0.2), 64, (), ()):
        after = cost(smaller, run.example)
        assert (row["params"], row["macs"]) == (after.params, after.macs)
        assert sum(p.numel() for p in smaller.parameters()) == row["params"]
        if kind == "rank":
            layer = smaller.get_submodule(row["layer"])
            own = sum(p.numel() for p in layer.parameters())
            assert own <= row["share"] * dense[row["layer"]].params
            others = [n for n in dense if n != row["layer"]]
            for name in others:
                now = smaller.get_submodule(name).weight
                assert torch.equal(now, lenet.get_submodule(name).weight)
        else:
            kept, units = (int(word) for word in row["became"].split() if word.isdigit())
            assert len(smaller.get_submodule(row["layer"]).weight) == kept
            assert kept == max(1, round(row["share"] * units))


def test_values_are_those_of_the_dense_network(found: Finding, lenet: nn.Module, few: Data) -> None:
    score = evaluate(lenet, few, "val")
    assert found.values["accuracy"] == score.accuracy and found.values["params"] == 61706
    for row in found.rows:
        assert row["lost"] == pytest.approx(100 * (score.accuracy - row["score"]), abs=1e-4)
    assert list(by_layer(found.rows)) == ["conv2", "fc1", "fc2", "fc3"]
    last = {row["layer"]: row["lost"] for row in found.rows}
    worst = max(last, key=lambda layer: last[layer])
    assert f"{worst} loses most, {last[worst]:.1f}" in found.text


def test_layers_can_be_chosen(lenet: nn.Module, few: Data) -> None:
    told: list[str] = []
    some = sensitivity(
        lenet, few, shares=(0.5,), samples=0, only=("fc*",), exclude=("fc3",),
        watch=lambda row: told.append(row["phase"]),
    )  # fmt: skip
    assert [row["layer"] for row in some.rows] == ["fc1", "fc2"]
    assert told == ["fc1 at 50%", "fc2 at 50%"]


def test_what_cannot_be_measured_is_refused(lenet: nn.Module, few: Data) -> None:
    with pytest.raises(MethodError, match="not by 'depth'"):
        sensitivity(lenet, few, "depth")  # type: ignore[arg-type]
    with pytest.raises(MethodError, match="between 0 and 1"):
        sensitivity(lenet, few, shares=(1.5,))
    with pytest.raises(DataError, match="validation or test split"):
        sensitivity(lenet, Data(few.train))


def test_the_page_holds_every_number_and_no_tag_of_a_name(found: Finding) -> None:
    page = sensitivity_html(found, model="lenet5", data="mnist5k")
    held = json.loads(page.partition('id="what-if">')[2].partition("</script>")[0])
    assert held["params"] == 61706 and list(held["layers"]) == ["conv2", "fc1", "fc2", "fc3"]
    sizes = [size for rows in held["layers"].values() for size in rows]
    assert [size[1] for size in sizes] == [row["params"] for row in found.rows]
    evil = "</script><script>window.hit=1</script>"
    row = {**found.rows[0], "layer": evil, "lost": float("inf"), "loss": float("nan")}
    named = sensitivity_html(Finding(found.values, (row,), method=found.method), model=evil)
    assert (
        "<script>window.hit" not in named and "NaN" not in named.partition('id="what-if">')[2][:400]
    )
    assert "No layer can be made smaller" in sensitivity_html(Finding(found.values))


def test_the_command_writes_page_and_numbers(tmp_path: Path, monkeypatch: Any) -> None:
    def quick(model: nn.Module, data: Data, kind: Any, **asked: Any) -> Finding:
        return sensitivity(model, data.subset(train=50, val=50), kind, shares=(0.5,), samples=32)

    monkeypatch.setattr("pliant.cli.sensitivity.sensitivity", quick)
    asked = ["inspect", "lenet5", "--weights", "mnist5k", "--data", "mnist5k"]
    for name in ("page.html", "page.json"):
        done = CliRunner().invoke(
            app, [*asked, "--sensitivity", "width", "--out", str(tmp_path / name)]
        )
        assert done.exit_code == 0 and "at 50%" in done.output, done.output
    assert "What if" in (tmp_path / "page.html").read_text()
    assert len(json.loads((tmp_path / "page.json").read_text())["rows"]) == 4


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--sensitivity", "rank"], "--data"),
        (["--out", "x.html"], "--sensitivity"),
        (["--sensitivity", "rank", "--data", "mnist5k", "--out", "x.txt"], ".html or .json"),
        (["--sensitivity", "deep", "--data", "mnist5k"], "by rank or by width"),
    ],
)
def test_the_command_refuses_before_any_work(more: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["inspect", "lenet5", *more])
    assert done.exit_code == 2 and message in " ".join(done.output.split())
