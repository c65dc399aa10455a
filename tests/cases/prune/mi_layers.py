"""Layer pruning by information: estimators against what is known, and blocks that say nothing."""

import copy
import math
import tempfile
from pathlib import Path

import pytest
import torch
from sklearn.covariance import LedoitWolf
from sklearn.feature_selection import mutual_info_regression
from torch import Tensor, nn

from pliant import compress, load
from pliant.budget import Budget
from pliant.cost import cost, module_cost
from pliant.data import Data
from pliant.edits import Remove, replay
from pliant.errors import BudgetError, DataError
from pliant.families.prune.blocks import increments, information, units
from pliant.math.information import (
    components,
    distance_correlation,
    gaussian,
    ksg,
    probe,
    shrunk,
)
from pliant.methods.prune.mi_layers import MILayers
from pliant.run import start
from pliant.surgery.remove import appended, removable, without
from pliant.testing import Case
from pliant.zoo.resnet_cifar import CifarResNet
from tests.cases.prune import pair, run_of
from tests.cases.witness import on_many


def normals(count: int, correlations: tuple[float, ...], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two sides of these canonical correlations, each turned."""
    draws = torch.Generator().manual_seed(seed)
    size, r = len(correlations), torch.tensor(correlations).double()
    one, noise = torch.randn(2, count, size, generator=draws).double()
    other = r * one + (1 - r.square()).sqrt() * noise
    turns = torch.linalg.qr(torch.randn(2, size, size, generator=draws).double()).Q
    return one @ turns[0], other @ turns[1]


def estimates_are_near_the_analytic_value() -> None:
    """Within 0.05 nat at 5000 samples of 3 components, and near 0 for what is independent."""
    for correlations in ((0.7, 0.5, 0.0), (0.6, 0.3, 0.2)):
        one, other = normals(5000, correlations)
        wanted = -0.5 * sum(math.log(1 - r * r) for r in correlations)
        assert gaussian(one, other) == pytest.approx(wanted, abs=0.05)
        assert ksg(one, other) == pytest.approx(wanted, abs=0.05)
    one, other = normals(5000, (0.0, 0.0, 0.0))
    assert abs(gaussian(one, other)) < 0.05 and abs(ksg(one, other)) < 0.05


def neighbours_are_counted_as_elsewhere() -> None:
    one, other = normals(400, (0.8,))
    wanted = mutual_info_regression(one.numpy(), other[:, 0].numpy(), random_state=0)
    assert ksg(one / one.std(), other / other.std()) == pytest.approx(float(wanted[0]), abs=1e-3)


def what_is_not_linear_is_seen_by_neighbours() -> None:
    one = torch.rand(2000, 1, generator=torch.Generator().manual_seed(0)).double() - 0.5
    assert gaussian(one, one.square()) < 0.05 < 1 < ksg(one, one.square())
    assert distance_correlation(one, one.square()) > 0.1


def a_covariance_is_shrunk_as_elsewhere() -> None:
    rows = (
        torch.randn(40, 12, generator=torch.Generator().manual_seed(0)).double()
        @ torch.randn(12, 12, generator=torch.Generator().manual_seed(1)).double()
    )
    wanted = LedoitWolf().fit(rows.numpy()).covariance_
    assert torch.allclose(shrunk(rows), torch.from_numpy(wanted), atol=1e-10)


def distances_correlate_as_by_their_definition() -> None:
    """By loops, and as the package dcor says."""
    draws = torch.Generator().manual_seed(0)
    one, other = (torch.randn(9, size, generator=draws).double() for size in (3, 2))

    def centred(rows: Tensor) -> list[list[float]]:
        d = [[float((a - b).norm()) for b in rows] for a in rows]
        mean = [sum(row) / len(row) for row in d]
        whole = sum(mean) / len(mean)
        return [[d[i][j] - mean[i] - mean[j] + whole for j in range(len(d))] for i in range(len(d))]

    def inner(a: list[list[float]], b: list[list[float]]) -> float:
        return sum(
            x * y for one, two in zip(a, b, strict=True) for x, y in zip(one, two, strict=True)
        )

    a, b = centred(one), centred(other)
    wanted = inner(a, b) / math.sqrt(inner(a, a) * inner(b, b))
    assert distance_correlation(one, other) == pytest.approx(wanted, abs=1e-10)
    dcor = pytest.importorskip("dcor")
    theirs = dcor.distance_correlation_sqr(one.numpy(), other.numpy())
    assert distance_correlation(one, other) == pytest.approx(theirs, abs=1e-10)


def a_probe_finds_what_tells_classes_apart() -> None:
    labels = torch.arange(400) % 7 % 3
    known = torch.nn.functional.one_hot(labels, 3).double()
    chance = torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
    assert probe(known, labels) > 0.8 and probe(chance, labels) < 0.02


def components_are_uncorrelated_and_alike() -> None:
    rows = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    rows[:, 2], rows[:, 4] = 3.0, 2 * rows[:, 1]  # one is constant, two are one
    found = components(rows, 16)
    assert found.shape == (50, 4)
    assert torch.allclose(found.T @ found / 50, torch.eye(4).double(), atol=1e-10)
    assert not components(torch.ones(5, 3), 2).any()


def resnet(depth: int = 20) -> tuple[CifarResNet, Data]:
    torch.manual_seed(0)
    model = CifarResNet(depth)
    images = torch.randn(256, 3, 16, 16) * torch.rand(256, 3, 1, 1) + torch.randn(256, 3, 1, 1)
    data = Data((images, torch.arange(256) % 10), classes=10)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.3, 0.3)
    return model, data


def a_branch_that_gives_nothing_leaves_first() -> None:
    """It says nothing, by any estimator; by those that tell all blocks apart it leaves."""
    model, data = resnet(14)
    dead = "layer2.1"
    with torch.no_grad():
        block = model.get_submodule(dead)
        block.bn2.weight.zero_()  # type: ignore[union-attr, operator]
        block.bn2.bias.zero_()  # type: ignore[union-attr, operator]
    for estimator in ("gaussian", "ksg", "probe", "dcor"):
        method = MILayers(estimator=estimator, ratio=0.25)  # one of four
        run = start(copy.deepcopy(model), method, data=data, steps=2)
        found = run.log[0]["information"]
        assert found[dead] == 0
        if estimator in ("gaussian", "dcor"):
            assert min(value for name, value in found.items() if name != dead) > 0
            assert [edit.layer for edit in run.edits] == [dead]


def removal_leaves_logits_as_they_were() -> None:
    model, data = resnet()
    with torch.no_grad():
        model.layer1[1].bn2.weight.zero_()  # type: ignore[union-attr, operator]
        model.layer1[1].bn2.bias.zero_()  # type: ignore[union-attr, operator]
    model.eval()
    with torch.no_grad():
        images = torch.randn(4, 3, 16, 16)
        wanted = model(images)
        Remove("layer1.1").apply(model)
        assert torch.allclose(model(images), wanted, atol=1e-6)


def blocks_with_an_identity_may_leave() -> None:
    """Of ResNet-20 seven: those that change the width stay, and so do single layers of blocks."""
    model, data = resnet()
    run = start(model, MILayers(ratio=0.0), data=data, steps=2)
    reasons = dict(run.reasons)
    found = [edit.layer for edit in units(run)]
    assert found == [
        "layer1.0",
        "layer1.1",
        "layer1.2",
        "layer2.1",
        "layer2.2",
        "layer3.1",
        "layer3.2",
    ]
    assert reasons["conv1"] == "it changes shapes"
    assert "more about the answers" in reasons["layer1.0.conv1"]


def the_blocks_it_may_take_are_those_it_is_told() -> None:
    model, data = resnet()
    for options in ({"only": ("layer1.[01].*",)}, {"exclude": ("layer[23].*", "layer1.2.*")}):
        run = start(copy.deepcopy(model), MILayers(ratio=0.99, **options), data=data)
        run.finish()
        assert {edit.layer for edit in run.edits} <= {"layer1.0", "layer1.1"} and run.edits


def costs_fall_as_by_hand() -> None:
    """Two blocks of 16 channels: 2 (2 * 16 * 16 * 9 + 4 * 16) parameters less."""
    model, data = resnet()
    before = sum(p.numel() for p in model.parameters())
    run = start(model, MILayers(only=("layer1.[01].*",), ratio=0.99), data=data)
    run.finish()
    assert [edit.layer for edit in run.edits] == ["layer1.0", "layer1.1"] or len(run.edits) == 2
    assert sum(p.numel() for p in model.parameters()) == before - 2 * (2 * 16 * 16 * 9 + 4 * 16)
    per_block = 2 * 16 * 16 * 9 * 16 * 16
    assert run.planner.now().macs == run.cost.macs - 2 * per_block


def gains_count_within_a_stage() -> None:
    edits = [Remove("a.0"), Remove("a.1"), Remove("b.0"), Remove("b.1"), Remove("b.2")]
    assert increments([1.0, 3.0, 2.0, 0.5, 2.5], edits) == [1.0, 2.0, 2.0, -1.5, 0.5]


def disjoint_samples_agree() -> None:
    """Enough samples of one distribution give nearly the same values."""
    model, data = resnet()
    run = start(model, MILayers(ratio=0.0), data=data, steps=2)
    found, values = units(run), []
    for seed in (1, 2):
        images = torch.randn(512, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
        looks = {"estimator": "gaussian", "size": 8, "neighbours": 3}
        values.append(torch.tensor(information(model, run.example, found, [(images,)], **looks)))  # type: ignore[arg-type]
    ranks = [value.argsort().argsort().double() for value in values]
    assert float(torch.corrcoef(torch.stack(ranks))[0, 1]) > 0.7


def too_little_is_refused() -> None:
    with pytest.raises(DataError, match="looks at activations"):
        run_of(pair(1.0, 2.0), MILayers())
    model, data = resnet()
    with pytest.raises(DataError, match="at least 8 samples"):
        few = Data((torch.randn(4, 3, 16, 16), torch.arange(4)), classes=10)
        start(model, MILayers(), data=few)
    with pytest.raises(BudgetError, match="removing whole blocks"):
        start(model, MILayers(), Budget(params=0.01), data=data, steps=5)


class DenseLayer(nn.Module):
    """Appends four channels to what it reads, by a bottleneck of six."""

    def __init__(self, reads: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(reads), nn.Conv2d(reads, 6, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(self.norm1(x).relu())
        return torch.cat([x, self.conv2(self.norm2(hidden).relu())], 1)


def densenet() -> tuple[nn.Sequential, Data]:
    """Two dense blocks of three layers on eight channels, a transition to ten between them."""
    torch.manual_seed(0)
    halves = nn.BatchNorm2d(20), nn.ReLU(), nn.Conv2d(20, 10, 1, bias=False), nn.AvgPool2d(2)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.Sequential(*(DenseLayer(8 + 4 * place) for place in range(3))),
        nn.Sequential(*halves),
        nn.Sequential(*(DenseLayer(10 + 4 * place) for place in range(3))),
        *(nn.BatchNorm2d(22), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(22, 10),
    )
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for name in ("weight", "bias", "running_var"):
                    getattr(module, name).uniform_(0.2, 1.5)
    images = torch.randn(128, 3, 8, 8) * torch.rand(128, 3, 1, 1) + torch.randn(128, 3, 1, 1)
    return model.eval(), Data((images, torch.arange(128) % 10), classes=10)


def a_dense_layer_leaves_with_all_that_reads_it() -> None:
    """Logits are those where nothing reads its channels, 12 to 15; costs fall as by hand."""
    model, data = densenet()
    found = removable(model, data.example(2))[0]
    assert [edit.layer for edit in found] == ["1.0", "1.1", "1.2", "3.0", "3.1", "3.2"]
    masked, images = copy.deepcopy(model), data.train[0][:4]
    with torch.no_grad():
        for name in ("1.2.conv1", "2.2"):
            masked.get_submodule(name).weight[:, 12:16] = 0  # type: ignore[operator]
        before, wanted = cost(model, (images[:1],)), masked(images)
        replay(model, without(model, [Remove("1.1")], appended(model, (images,))))
        assert torch.allclose(model(images), wanted, atol=1e-5)
    after = cost(model, (images[:1],))
    alone = Remove("1.1").predict(module_cost(masked, (images[:1],), "1.1"))
    assert (alone.params, alone.output) == (0, (12, 8, 8))
    layer, readers = 2 * 12 + 12 * 6 + 2 * 6 + 6 * 4 * 9, 2 * 4 + 4 * 6 + 2 * 4 + 4 * 10
    assert before.params - after.params == layer + readers
    assert before.macs - after.macs == 64 * (12 * 6 + 6 * 4 * 9 + 4 * 6 + 4 * 10)


def dense_layers_that_say_nothing_leave_first() -> None:
    """Of both blocks in one cut, as many as the budget asks for; the file is whole."""
    model, data = densenet()
    with torch.no_grad():
        for name in ("1.1", "3.2"):
            model.get_submodule(f"{name}.conv2").weight.zero_()  # type: ignore[operator]
    result = compress(model, data, "mi_layers", "params=0.75")
    removed = {edit.layer for edit in result.edits if isinstance(edit, Remove)}
    assert removed == {"1.1", "3.2"} and result.report.met
    with tempfile.TemporaryDirectory() as folder:
        again = load(result.save(Path(folder) / "dense.pliant"), densenet()[0]).eval()
    images = data.train[0][:4]
    assert torch.equal(again(images), result.model.eval()(images))


NONE = "no block that can be removed"

CASES = (
    Case(
        "mi_layers",
        budget=Budget(params=0.8),  # of the grouped toy a quarter can leave
        toys=("plain", "residual", "grouped", "linear"),
        refuses={name: NONE for name in ("shared", "bare", "signal", "volume", "single")},
        variants=(
            'mi_layers(estimator="ksg", rounds=2)',
            'mi_layers(estimator="probe", score="increment")',
            'mi_layers(estimator="dcor", start=0.5)',
        ),
        witnesses={
            "only": the_blocks_it_may_take_are_those_it_is_told,
            "exclude": the_blocks_it_may_take_are_those_it_is_told,
            "samples": on_many("mi_layers", "samples", Budget(params=0.8)),
        },
        own=(
            estimates_are_near_the_analytic_value,
            neighbours_are_counted_as_elsewhere,
            what_is_not_linear_is_seen_by_neighbours,
            a_covariance_is_shrunk_as_elsewhere,
            distances_correlate_as_by_their_definition,
            a_probe_finds_what_tells_classes_apart,
            components_are_uncorrelated_and_alike,
            a_branch_that_gives_nothing_leaves_first,
            removal_leaves_logits_as_they_were,
            blocks_with_an_identity_may_leave,
            costs_fall_as_by_hand,
            gains_count_within_a_stage,
            disjoint_samples_agree,
            a_dense_layer_leaves_with_all_that_reads_it,
            dense_layers_that_say_nothing_leave_first,
            too_little_is_refused,
        ),
    ),
)
