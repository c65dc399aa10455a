"""Insert: networks grow deeper, and branches that keep other channels add up."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant import zoo
from pliant.cost import cost, module_cost
from pliant.edits import Edit, Insert, Prune, Swap, made, replay
from pliant.errors import EditError
from pliant.nn.catalogue import INSERTS
from pliant.surgery.optim import carry
from tests.edits import held
from tests.edits.held import Whole


class Block(nn.Module):
    """A residual block with a rectifier behind its sum."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut.append(nn.Conv2d(inputs, outputs, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        branch = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return F.relu(branch + self.shortcut(x))


class Net(nn.Module):
    """A stem, two stages of residual blocks, a classifier."""

    def __init__(self, first: int = 2, second: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.stage1 = nn.Sequential(*(Block(8, 8) for _ in range(first)))
        self.stage2 = nn.Sequential(Block(8, 12, 2), *(Block(12, 12) for _ in range(second - 1)))
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage2(self.stage1(self.stem(x).relu()))
        return self.head(x.mean((2, 3)))


def conv(channels: int, **others: Any) -> dict[str, Any]:
    return {"channels": channels, "kernel": 3, "dims": 2, "identity": True} | others


def volume() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv3d(2, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten()),
        nn.Linear(4, 4),
    )


DEEPER = (
    Insert("stage1", "copy", {"start": "zero"}),
    Insert("stage2", "copy", {"start": "zero"}),
)
GROWN = (
    Insert("stem", "residual", conv(8)),
    Insert("stage1", "conv", conv(8, kernel=5), at=1),
    Insert("stage1", "residual", conv(8), at=0),
    Insert("stage2.0.bn2", "conv", conv(12)),
    Insert("head", "linear", {"features": 12, "identity": True}, at=0),
    Insert("head", "linear", {"features": 4, "identity": True}),
)
SOLID = (Insert("", "residual", conv(4, dims=3), at=2), Insert("", "conv", conv(4, dims=3), at=1))
WHOLES = (
    Whole("deeper", Net, DEEPER, (3, 8, 8)),
    Whole("grown", Net, GROWN, (3, 8, 8)),
    Whole("volume", volume, SOLID, (2, 3, 4, 4)),
    Whole("drawn", Net, (Insert("stage1", "copy", {"start": "fresh"}, seed=3),
                         Insert("stem", "conv", conv(8, identity=False))), (3, 8, 8)),
)  # fmt: skip
IDS = [whole.name for whole in WHOLES]


# ---------------------------------------------------------------- the function stays


@pytest.mark.parametrize("whole", WHOLES[:3], ids=IDS[:3])
def test_what_begins_as_an_identity_changes_no_output(whole: Whole) -> None:
    model, x = whole.model().eval(), whole.inputs()
    with torch.no_grad():
        wanted = model(x)
        replay(model, whole.edits)
        assert torch.allclose(model(x), wanted, atol=1e-6)
        replay(other := whole.model().eval(), [without(edit) for edit in whole.edits])
        assert not torch.allclose(other(x), wanted, atol=1e-2)


def without(edit: Insert) -> Insert:
    """The same, but not as an identity."""
    spec = {"start": "fresh"} if edit.form == "copy" else {**edit.spec, "identity": False}
    return replace(edit, spec=spec)


def test_a_deeper_stage_has_the_names_of_a_network_built_so() -> None:
    model = Net()
    replay(model, [*DEEPER, DEEPER[0]])
    built = Net(first=4, second=3)
    assert held.sizes(model) == held.sizes(built) and str(model) == str(built)
    built.load_state_dict(model.state_dict())


def test_depths_of_the_zoo_come_out_of_one_another() -> None:
    """From [3, 3, 3] blocks to [9, 9, 9]: ResNet-56, with its cost to the unit."""
    model, x = zoo.build("resnet20"), zoo.NETWORKS["resnet20"].example(1)
    stages = [f"layer{n}" for n in (1, 2, 3)]
    for stage in stages:
        before = module_cost(model, x, stage)
        for _ in range(6):
            edit = Insert(stage, "copy", {"start": "zero"})
            before = edit.predict(before)
            replay(model, [edit])
        held.agree(stage, before, module_cost(model, x, stage))
    assert cost(model, x) == cost(zoo.build("resnet56"), x)


def test_those_that_were_there_keep_their_names_and_places() -> None:
    row = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    spec = {"features": 4, "identity": True}
    for at in (0, 1, 0, -1, 5, 2):
        Insert("", "linear", spec, at).apply(row)
    names = [name for name, _ in row.named_children()]
    assert names == ["added3", "added", "added5", "added2", "0", "1", "added4", "2"]
    named = nn.Sequential()
    named.add_module("first", nn.Linear(4, 4))
    Insert("", "linear", spec).apply(named)
    assert [name for name, _ in named.named_children()] == ["first", "added"]


def test_what_is_new_lies_in_memory_as_the_network_does() -> None:
    for layout in (torch.contiguous_format, torch.channels_last):
        model: Any = Net().to(memory_format=layout)  # type: ignore[call-overload]
        replay(model, [*GROWN, Swap("stage1.0.conv2", "separable", {"multiplier": 2})])
        kernels = [p for p in model.parameters() if p.dim() == 4]
        assert all(kernel.is_contiguous(memory_format=layout) for kernel in kernels)


def test_a_copy_has_neither_hooks_nor_a_past() -> None:
    """What looks at a block, and what was made of it, is of the block alone."""
    model, seen = Net().eval(), []
    handle = model.stage1[1].conv1.register_forward_hook(lambda *_: seen.append(1))
    replay(model.stage1[1], [Prune("conv1", "out", (0, 1), 8), Prune("bn1", "channels", (0, 1), 8),
                             Prune("conv2", "in", (0, 1), 8)])  # fmt: skip
    replay(model, [Insert("stage1", "copy", {"start": "same"})])
    model(torch.zeros(1, 3, 8, 8))
    assert len(seen) == 1 and len(made(model)) == 4
    handle.remove()
    fresh = Net()
    replay(fresh, made(model), weights=False)
    assert held.sizes(fresh) == held.sizes(model)


def test_a_row_in_the_place_of_a_layer_answers_for_it() -> None:
    model = Net()
    weight = model.stem.weight
    Insert("stem", "conv", conv(8)).apply(model)
    stem: Any = model.stem
    assert stem.weight is weight and stem.kernel_size == (3, 3) and stem.out_channels == 8
    assert [name for name, _ in model.named_parameters()][:2] == [
        *("stem.layer.weight", "stem.layer.bias")
    ]


# ---------------------------------------------------------------- what every edit holds


@pytest.mark.parametrize(
    "check",
    [check for check in held.CHECKS if check is not held.keeps_dtype_mode_and_frozen_weights],
    ids=lambda check: check.__name__,
)
@pytest.mark.parametrize("whole", WHOLES, ids=IDS)
def test_an_insertion_holds(whole: Whole, check: Any) -> None:
    check(whole)


@pytest.mark.parametrize("whole", WHOLES, ids=IDS)
def test_dtype_and_mode_are_kept_and_what_is_new_learns(whole: Whole) -> None:
    for training in (True, False):
        model = whole.model().double().requires_grad_(False).train(training)
        old = {*model.parameters()}
        replay(model, whole.edits)
        assert {p.dtype for p in model.parameters()} == {torch.float64}
        assert {module.training for module in model.modules()} == {training}
        copies = {*model.parameters()} - old
        if whole.name != "deeper":  # a copy learns where its neighbour does
            assert any(p.requires_grad for p in copies)
        assert not any(p.requires_grad for p in old)


@pytest.mark.parametrize("optimizer", held.OPTIMIZERS)
@pytest.mark.parametrize("whole", WHOLES, ids=IDS)
def test_a_training_goes_on_and_resumes(whole: Whole, optimizer: str) -> None:
    held.trains_on_and_resumes(whole, optimizer)


@pytest.mark.parametrize("whole", WHOLES, ids=IDS)
def test_files_hold(whole: Whole, tmp_path: Path) -> None:
    held.compresses_saves_and_loads(whole, tmp_path)


@pytest.mark.slow  # PyTorch takes a second to trace a network for ONNX
@pytest.mark.parametrize("whole", WHOLES[1:3], ids=IDS[1:3])
def test_exports_hold(whole: Whole, tmp_path: Path) -> None:
    held.exports_with_equal_outputs(whole, tmp_path)


def test_what_comes_joins_the_group_of_its_neighbour_and_takes_no_state() -> None:
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.Adam(
        [
            {"params": [*model.stem.parameters(), *model.stage1.parameters()], "lr": 0.1},
            {"params": [*model.stage2.parameters(), *model.head.parameters()], "lr": 0.2},
        ]
    )
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    before = {p: optimizer.state[p] for p in model.parameters()}
    carry(optimizer, DEEPER[0].apply(model))
    carry(optimizer, DEEPER[1].apply(model))
    for rates, part in ((0.1, model.stage1[2]), (0.2, model.stage2[2])):
        group = next(g for g in optimizer.param_groups if g["lr"] == rates)
        assert {id(p) for p in part.parameters()} <= {id(p) for p in group["params"]}
        assert not any(p in optimizer.state for p in part.parameters())
    assert all(optimizer.state[p] is state for p, state in before.items())


# ---------------------------------------------------------------- channels that change places


def test_scatter_and_gather_by_hand() -> None:
    x = torch.arange(6.0).reshape(1, 3, 2) + 1
    row = nn.Sequential(nn.Identity())
    Insert("", "scatter", {"places": (3, 0, 1), "of": 5}).apply(row)
    assert row(x).tolist() == [[[3, 4], [5, 6], [0, 0], [1, 2], [0, 0]]]
    Insert("", "gather", {"places": (1, 3)}).apply(row)
    assert row(x).tolist() == [[[5, 6], [1, 2]]]
    wanted = torch.zeros(1, 5, 2).index_add(1, torch.tensor([3, 0, 1]), x)
    assert torch.equal(row[:2](x), wanted)
    assert not row.state_dict()


@dataclass(frozen=True)
class Regions:
    """Which channels stay in each region of a stage, and within each of its blocks.

    Args:
        kept: of the input of the stage, then of the sum of each block.
        inner: between the two convolutions of each block.
        width: of the stage.
    """

    kept: tuple[tuple[int, ...], ...]
    inner: tuple[tuple[int, ...], ...]
    width: int

    @classmethod
    def drawn(cls, blocks: int, width: int, seed: int, *, same: bool = False) -> Regions:
        random = torch.Generator().manual_seed(seed)

        def some() -> tuple[int, ...]:
            count = int(torch.randint(2, width, (), generator=random))
            return tuple(sorted(torch.randperm(width, generator=random)[:count].tolist()))

        first = some()
        kept = tuple(first if same else some() for _ in range(blocks + 1))
        return cls(kept, tuple(some() for _ in range(blocks)), width)

    def edits(self, stage: str) -> list[Edit]:
        """Cut every block to its own channels; where two sets meet, index-add.

        Within a block the sum has the channels of both of its regions. What is not in the region
        before is zero there, and what is not in the region behind is dropped at the end.
        """
        edits: list[Edit] = []
        for n, (before, after) in enumerate(zip(self.kept, self.kept[1:], strict=False)):
            block, both = f"{stage}.{n}", tuple(sorted({*before, *after}))

            def cut(layer: str, side: str, keep: tuple[int, ...], block: str = block) -> list[Edit]:
                return [Prune(f"{block}.{layer}", side, keep, self.width)]

            edits += [
                *(*cut("conv1", "in", before), *cut("conv1", "out", self.inner[n])),
                *(*cut("bn1", "channels", self.inner[n]), *cut("conv2", "in", self.inner[n])),
                *(*cut("conv2", "out", after), *cut("bn2", "channels", after)),
            ]
            if both != after:
                spec = {"places": tuple(both.index(c) for c in after), "of": len(both)}
                edits.append(Insert(f"{block}.bn2", "scatter", spec))
            if both != before:
                spec = {"places": tuple(both.index(c) for c in before), "of": len(both)}
                edits.append(Insert(f"{block}.shortcut", "scatter", spec))
            if both != after:
                edits.append(Insert(block, "gather", {"places": tuple(map(both.index, after))}))
        return edits

    def masked(self, stage: Any, x: Tensor) -> Tensor:
        """The reference: a stage of whole width in which what is not kept reads as zero."""

        def mask(channels: tuple[int, ...]) -> Tensor:
            ones = torch.zeros(self.width, 1, 1, dtype=x.dtype)
            ones[list(channels)] = 1
            return ones

        for n, block in enumerate(stage):
            inner = mask(self.inner[n]) * block.bn1(block.conv1(x)).relu()
            x = mask(self.kept[n + 1]) * F.relu(block.bn2(block.conv2(inner)) + x)
        return x


class Stage(nn.Module):
    """Cut at its input, so that a region may begin with fewer channels."""

    def __init__(self, blocks: int = 3, width: int = 10) -> None:
        super().__init__()
        self.stage = nn.Sequential(*(Block(width, width) for _ in range(blocks)))
        for norm in self.modules():
            if isinstance(norm, nn.BatchNorm2d):
                for tensor in (norm.weight, norm.bias, norm.running_mean):
                    nn.init.normal_(tensor)  # type: ignore[arg-type]
                nn.init.uniform_(norm.running_var, 0.5, 2)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.stage(x)


@pytest.mark.parametrize("seed", range(12))
def test_unequal_branches_add_up_to_what_masks_compute(seed: int) -> None:
    """The regions of a shortcut, each with channels of its own, against zeros of full width."""
    torch.manual_seed(seed)
    model, x = Stage().double().eval(), torch.randn(2, 10, 6, 6, dtype=torch.float64)
    regions = Regions.drawn(3, 10, seed, same=seed == 11)
    first, last = list(regions.kept[0]), list(regions.kept[-1])
    with torch.no_grad():
        inputs = torch.zeros_like(x)
        inputs[:, first] = x[:, first]
        wanted = regions.masked(model.stage, inputs)
        edits = regions.edits("stage")
        replay(model, edits)
        found = model(x[:, first])
    assert torch.allclose(found, wanted[:, last], atol=1e-12)
    assert not wanted[:, [c for c in range(10) if c not in last]].any()
    scattered = [edit for edit in edits if isinstance(edit, Insert)]
    assert bool(scattered) is (seed != 11)  # where all regions keep the same, plain sums do


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stage = nn.Conv2d(3, 10, 3, padding=1), Stage().stage
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stage(self.stem(x).relu()).mean((2, 3)))


def slimmed() -> Whole:
    regions = Regions.drawn(3, 10, seed=4)
    edits = [Prune("stem", "out", regions.kept[0], 10), *regions.edits("stage"),
             Prune("head", "in", regions.kept[-1], 10)]  # fmt: skip
    return Whole("slimmed", Masked, tuple(edits), (3, 8, 8))


@pytest.mark.parametrize("check", held.CHECKS[:4], ids=lambda check: check.__name__)
def test_a_slimmed_shortcut_holds(check: Any) -> None:
    check(slimmed())


@pytest.mark.parametrize("optimizer", held.OPTIMIZERS)
def test_a_slimmed_shortcut_trains_and_resumes(optimizer: str) -> None:
    held.trains_on_and_resumes(slimmed(), optimizer)


@pytest.mark.slow  # PyTorch takes a second to trace a network for ONNX
def test_a_slimmed_shortcut_is_saved_and_exported(tmp_path: Path) -> None:
    held.compresses_saves_and_loads(slimmed(), tmp_path)
    held.exports_with_equal_outputs(slimmed(), tmp_path)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (Insert("stem", "eval", {}), "Unknown form 'eval' for stem: one of cbam, conv, copy"),
        (Insert("stem", "conv", {"channels": 8}), "conv for stem takes channels, dims, identity"),
        (Insert("stem", "conv", conv(8, kernel=2)), "^stem needs channels from 1 on, an odd kern"),
        (Insert("stem", "conv", conv(8, dims=4)), "1 to 3 dims behind it, not 8, 3 and 4"),
        (Insert("stem", "residual", conv(0)), "channels from 1 on"),
        (Insert("stem", "linear", {"features": 0, "identity": True}), "features from 1 on, not 0"),
        (Insert("stem", "conv", conv(8), at=2), "stem has places 0 to 1 .* not 2"),
        (Insert("stage1", "conv", conv(8), at=-2), "stage1 has places 0 to 2 .* not -2"),
        (Insert("stem", "copy", {"start": "again"}), "is copied as same, fresh, zero, not as 'aga"),
        (Insert("", "conv", conv(8)), "The model is no row of layers"),
        (Insert("stem", "gather", {"places": ()}), "places must be different whole numbers"),
        (Insert("stem", "gather", {"places": (1, 1)}), "places must be different whole numbers"),
        (Insert("stem", "gather", {"places": (1.0,)}), "places must be different whole numbers"),
        (Insert("stem", "scatter", {"places": (0, 8), "of": 8}), "whole numbers below 8"),
        (Insert("stem", "scatter", {"places": "abc", "of": 8}), "places of scatter .* tuple"),
        (Insert("stem.9", "conv", conv(8)), "no layer 'stem.9'"),
    ],
)
def test_what_does_not_fit_is_refused(edit: Insert, says: str) -> None:
    model = Net()
    before = [id(part) for part in model.modules()]
    with pytest.raises(EditError, match=says):
        edit.apply(model)
    assert [id(part) for part in model.modules()] == before


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (Insert("stem", "conv", conv(4)), r"stem gives \(8, 8, 8\), where 4 channels with 2 dims"),
        (Insert("stem", "conv", conv(8, dims=1)), "where 8 channels with 1 dims"),
        (Insert("stem", "copy", {"start": "same"}), r"makes \(8, 8, 8\) of \(3, 8, 8\)"),
        (Insert("head", "linear", {"features": 5, "identity": True}), "where 5 features"),
        (Insert("stem", "gather", {"places": (8,)}), "whole numbers below 8"),
        (Insert("stem", "scatter", {"places": (0, 1), "of": 9}), "gives 8 channels to 2 places"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_by_the_prediction(edit: Insert, says: str) -> None:
    with pytest.raises(EditError, match=says):
        edit.predict(module_cost(Net(), (torch.zeros(1, 3, 8, 8),), edit.layer))


def test_nothing_is_put_where_nobody_calls_it() -> None:
    block = nn.TransformerEncoderLayer(8, 2, 16)
    with pytest.raises(EditError, match="out_proj is never called: MultiheadAttention"):
        Insert("self_attn.out_proj", "linear", {"features": 8, "identity": True}).apply(block)


def test_every_kind_declares_its_contract() -> None:
    for kind in INSERTS.values():
        assert {*kind.spec.values()} <= {bool, int, float, str, tuple}
        assert kind.__doc__ and kind.build.__doc__ and kind.predict.__doc__
