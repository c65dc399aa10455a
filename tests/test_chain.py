"""A chain across families, end to end on a real network: smaller ranks, int8, coded."""

from pathlib import Path

import pytest
import torch

import pliant
from pliant import zoo
from pliant.data import Data, load
from pliant.edits import Merge
from pliant.render.html import html
from pliant.render.markdown import markdown
from pliant.testing import check_method
from pliant.testing.trial import PLAN
from tests.cases.layers.fold import bottleneck


@pytest.fixture(scope="module")
def result() -> pliant.Result:
    chain = pliant.chain(
        pliant.Stage(pliant.method("nrmf(samples=64)"), pliant.Budget(params=0.5)),
        pliant.method("groupwise_ptq(bits=8, activations=8, independent=3, joint=3, samples=32)"),
        pliant.method("hac(prune=0.0)"),
    )
    data = load("mnist5k").subset(train=600, test=200)
    torch.manual_seed(0)
    train = pliant.Train(epochs=2, lr=0.05)
    return pliant.compress(zoo.build("lenet5"), data, chain, train=train)


@pytest.mark.slow  # three methods on one network
def test_each_stage_makes_the_file_smaller(result: pliant.Result) -> None:
    stages = [row for row in result.report.history if "finished" in row]
    assert [row["finished"] for row in stages] == ["nrmf", "groupwise_ptq", "hac"]
    nrmf, int8, hac = stages
    assert nrmf["params"] <= 0.5 * result.report.before.params
    assert int8["file"] < 0.4 * nrmf["file"] and hac["coded"] < int8["file"]
    assert all(0 <= row["accuracy"] <= 1 for row in stages)


@pytest.mark.slow  # the same, and onnxruntime
def test_the_file_rebuilds_and_exports(result: pliant.Result, tmp_path: Path) -> None:
    coded = result.save(tmp_path / "coded.pliant", encode="auto")
    assert coded.stat().st_size < result.save(tmp_path / "plain.pliant").stat().st_size
    loaded = pliant.load(coded, zoo.build("lenet5")).eval()
    images = torch.rand(4, 1, 28, 28)
    with torch.no_grad():
        assert torch.equal(loaded(images), result.model(images))
    written = pliant.to_onnx(loaded, tmp_path / "model.onnx", (images,), tolerance=0.05)
    assert written.bytes < result.report.before.bytes


@pytest.mark.slow  # the same
def test_the_report_draws_the_stages(result: pliant.Result) -> None:
    assert "## Stage by stage" in markdown(result.report)
    page = html(result.report)
    assert 'data-figure="figure-waterfall"' in page and "coded file" in page
    only = pliant.compress(
        zoo.build("lenet5"), None, "energy", example=(torch.zeros(1, 1, 28, 28),)
    )
    assert "Stage by stage" not in markdown(only.report)
    assert 'data-figure="figure-waterfall"' not in html(only.report)


@pytest.mark.slow  # many trainings, and onnxruntime
def test_what_was_factorized_is_merged_and_shipped() -> None:
    """All that holds for one method holds for a chain that ends in fewer layers."""
    images, labels = torch.randn(48, 3, 8, 8), torch.arange(48) % 4
    data = Data((images[:32], labels[:32]), (images[32:], labels[32:]), classes=4)
    first = pliant.Stage(pliant.method("nrmf(only=('3', '5'))"), pliant.Budget(macs=0.8))
    chain = pliant.chain(first, "fold")
    result = pliant.compress(bottleneck(), data, chain, train=PLAN)
    assert any(isinstance(edit, Merge) for edit in result.edits) and result.report.met
    check_method(chain, bottleneck(), data)
