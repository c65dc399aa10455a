"""SSPruning: slim shortcuts against masked ones, and gates against autograd."""

import copy
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn

from pliant.budget import Budget
from pliant.data import Data
from pliant.edits import Insert, Prune, from_json, replay, to_json
from pliant.errors import DataError, MissingExtraError
from pliant.families.prune.scores import importance
from pliant.families.prune.shortcuts import masked, others, prove_slimmed, regions, slimmed
from pliant.files.onnx import to_onnx
from pliant.methods.prune.sspruning import SSPruning
from pliant.run import start
from pliant.surgery.prove import cuttable
from pliant.testing import Case
from pliant.testing.compressed import OF_A_TRIAL
from pliant.testing.toys import Toy
from pliant.testing.trial import trial
from pliant.zoo.resnet import ResNet18
from pliant.zoo.resnet_cifar import CifarResNet
from tests.cases.prune import REFUSES, TOYS, pair, run_of
from tests.cases.witness import on_many


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.one, self.norm1 = nn.Conv2d(inputs, width, 1), nn.BatchNorm2d(width)
        self.two = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.three, self.norm3 = nn.Conv2d(width, outputs, 1), nn.BatchNorm2d(outputs)
        self.project: nn.Module | None = None
        if inputs != outputs:
            self.project = nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.one(x)).relu()
        y = self.norm3(self.three(self.norm2(self.two(y)).relu()))
        return (y + (x if self.project is None else self.project(x))).relu()


def bottlenecks() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU()),
        *(Bottleneck(12, 6, 12, 1), Bottleneck(12, 6, 12, 1), Bottleneck(12, 8, 20, 2)),
        *(Bottleneck(20, 8, 20, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(20, 5)),
    )


def used(model: nn.Module) -> nn.Module:
    """In eval mode, with statistics and shifts of batch norms of either sign."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(tensor, std=0.5)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]
    return model.eval()


IMAGES = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def slim_networks_compute_what_masked_ones_do() -> None:
    """Basic blocks with padded and projected shortcuts, and bottlenecks; sets at random."""
    for build in (lambda: CifarResNet(20), lambda: ResNet18(5, small=True, width=0.1), bottlenecks):
        model = used(build())
        tied, _ = cuttable(model, (IMAGES,))
        found = regions(model, (IMAGES,), tied)
        groups = [*(region.group for region in found), *others(tied, found)]
        assert len(found) == sum(
            "Bl" in type(m).__name__ or "Bott" in type(m).__name__ for m in model.modules()
        )
        for seed in range(2):
            draws = torch.Generator().manual_seed(seed)
            leaving = {
                group.name: torch.randperm(len(group.units), generator=draws).tolist()[
                    : int(torch.randint(len(group.units), (), generator=draws))
                ]
                for group in groups
            }
            edits = slimmed(model, groups, leaving, found)
            prove_slimmed(model, (IMAGES,), groups, leaving, found)
            slim, shapes = copy.deepcopy(model), build().eval()
            replay(slim, edits)
            replay(shapes, from_json(to_json(edits)), weights=False)
            shapes.load_state_dict(slim.state_dict())
            with torch.no_grad():
                wanted = masked(model, groups, leaving, found)(IMAGES)
                scale = float(wanted.abs().max())
                assert torch.allclose(slim(IMAGES), wanted, atol=1e-5 * scale)
                assert torch.equal(shapes(IMAGES), slim(IMAGES))
            assert any(isinstance(edit, Insert) for edit in edits)


def equal_regions_are_a_coupled_removal() -> None:
    """As Torch-Pruning makes it, where the stem gives zero in the channels that leave."""
    model, gone = used(ResNet18(5, small=True, width=0.25)), [1, 4, 10]
    with torch.no_grad():
        model.bn1.weight[gone], model.bn1.bias[gone] = 0, 0  # type: ignore[union-attr, operator]
    tied, _ = cuttable(model, (IMAGES,))
    found = regions(model, (IMAGES,), tied)
    groups, leaving = [region.group for region in found], {"layer1.0": gone, "layer1.1": gone}
    slim = copy.deepcopy(model)
    replay(slim, slimmed(slim, groups, leaving, found))
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=IMAGES)
    last = model.get_submodule("layer1.1.conv2")
    graph.get_pruning_group(last, tp.prune_conv_out_channels, idxs=gone).prune()
    with torch.no_grad():
        assert torch.allclose(slim(IMAGES), model(IMAGES), atol=1e-5)
    theirs = {n: m.weight.shape for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    ours = {
        n.removesuffix(".layer")
        .replace("layer1.0.layer", "layer1.0")
        .replace("layer1.1.layer", "layer1.1"): m
        for n, m in slim.named_modules()
        if isinstance(m, nn.Conv2d)
    }
    assert theirs.keys() == ours.keys()
    different = [name for name in ours if ours[name].weight.shape != theirs[name]]
    assert different == ["conv1", "layer1.0.conv1"]  # the stem, and who reads it


def data(count: int = 24) -> Data:
    images = torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(2))
    return Data((images, torch.arange(count) % 10), classes=10)


def importance_is_the_gradient_of_a_gate() -> None:
    """Of a mask behind the sum of a block, or on the inside; summed, then its magnitude."""
    model, seen = used(CifarResNet(8)), data()
    run = start(model, SSPruning(ratio=0.0), data=seen)
    found = run.method.scores(run, run.method.groups(run))  # type: ignore[attr-defined]
    ((images, labels),) = seen.batches("train", 24)
    gate, inner = torch.ones(32, requires_grad=True), torch.ones(32, requires_grad=True)
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, by=by: output * by.view(-1, 1, 1)
        )
        for name, by in (("layer2.0", gate), ("layer2.0.bn1", inner))
    ]
    loss = F.cross_entropy(model(images), labels, reduction="sum")
    wanted = torch.autograd.grad(loss, (gate, inner))
    for hook in hooks:
        hook.remove()
    for name, slopes in zip(("layer2.0", "layer2.0.conv1"), wanted, strict=True):
        assert torch.allclose(found[name], slopes.abs().double(), rtol=1e-4, atol=1e-4)


def importance_does_not_see_scales() -> None:
    """A batch norm that gives twice as much to a convolution that takes half: the same network."""
    model, seen = used(CifarResNet(8)), data()
    other = copy.deepcopy(model)
    with torch.no_grad():
        block = other.get_submodule("layer2.0")
        for name in ("bn1.weight", "bn1.bias"):
            block.get_parameter(name).mul_(2)
        block.get_parameter("conv2.weight").div_(2)
    scores = []
    for each in (model, other):
        run = start(each, SSPruning(ratio=0.0), data=seen)
        scores.append(run.method.scores(run, run.method.groups(run)))  # type: ignore[attr-defined]
    for name, values in scores[0].items():
        assert torch.allclose(values, scores[1][name], rtol=1e-4, atol=1e-5)
    (group,) = (g for g in cuttable(model, (IMAGES,))[0] if g.name == "layer2.0.conv1")
    norms = [importance(each, group, of="batchnorm") for each in (model, other)]
    assert torch.allclose(2 * norms[0], norms[1])  # which by their scales are other channels


def a_budget_is_met_to_one_channel() -> None:
    model = used(CifarResNet(14))
    run = start(model, SSPruning(least=0.05), Budget(macs=0.5), data=data())
    run.finish()
    macs, bound = run.planner.now().macs, run.limits()["macs"]
    channel = 2 * 9 * 64 * 12 * 12  # of a 16-channel layer at full size: the most that one saves
    assert bound - channel <= macs <= bound
    cut = {
        edit.layer: edit.keep
        for edit in run.edits
        if isinstance(edit, Prune) and edit.side == "out"
    }
    stage = [cut.get(f"layer3.{place}.conv2") for place in range(2)]
    assert len({*stage}) > 1  # regions of one stage keep different channels
    with TemporaryDirectory() as folder:
        try:
            to_onnx(model.eval(), Path(folder) / "slim.onnx", (IMAGES,))
        except MissingExtraError:
            return


def a_slim_shortcut_passes_the_common_checks() -> None:
    """Costs as predicted, a file that gives the same network, a report of every layer."""
    images = torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(3))
    given = Data((images, torch.arange(16) % 10), (IMAGES, torch.arange(4)), classes=10)
    toy = Toy("slim", lambda: CifarResNet(8), given=given)
    found = trial(SSPruning(samples=16), toy, Budget(macs=0.7))
    assert any(edit.form == "scatter" for edit in found.result.edits)
    for check in OF_A_TRIAL:
        check(found)


def labels_are_needed() -> None:
    with pytest.raises(DataError, match="labelled training samples"):
        run_of(pair(1.0, 2.0), SSPruning())


CASES = (
    Case(
        "sspruning",
        toys=TOYS,
        refuses=REFUSES,
        variants=('sspruning(scope="local", start=0.5)',),
        witnesses={
            "samples": on_many("sspruning", "samples", Budget(macs=0.7)),
        },
        own=(
            slim_networks_compute_what_masked_ones_do,
            equal_regions_are_a_coupled_removal,
            importance_is_the_gradient_of_a_gate,
            importance_does_not_see_scales,
            a_budget_is_met_to_one_channel,
            a_slim_shortcut_passes_the_common_checks,
            labels_are_needed,
        ),
    ),
)
