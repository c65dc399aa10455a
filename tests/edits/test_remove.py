"""Remove: whole blocks leave where it is proven that the rest computes the same."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant import zoo
from pliant.cost import cost, module_cost
from pliant.edits import Remove, from_json, replay, to_json
from pliant.errors import EditError
from pliant.surgery.optim import carry
from pliant.surgery.remove import close_branch, prove_removed, removable
from tests.edits import held
from tests.edits.held import Whole


class Block(nn.Module):
    """A residual block; its shortcut is an identity or a projection."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            *(nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.BatchNorm2d(outputs)),
            *(nn.ReLU(), nn.Conv2d(outputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs)),
        )
        same = inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch(x) + self.shortcut(x))


class Before(nn.Module):
    """A block that begins with its norm and ends with a convolution, without a rectifier."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.conv1(self.norm(x).relu()).relu())


class Net(nn.Module):
    """What comes to the first block is not rectified, so its sum's rectifier must stay."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList([Block(8, 8), Block(8, 8), Block(8, 12, 2), Before(12)])
        self.mix = nn.Conv2d(12, 12, 3, padding=1)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.mix(x).mean((2, 3)))


SOME = (
    Remove("blocks.0", relu=True),
    Remove("blocks.1"),
    Remove("blocks.2", "shortcut", relu=True),
    Remove("blocks.3"),
    Remove("mix"),
)
SHAPE = (3, 8, 8)
WHOLES = (
    Whole("all", Net, SOME, SHAPE),
    Whole("one", Net, SOME[1:2], SHAPE),
    Whole("projected", Net, (Remove("blocks.2", "shortcut"),), SHAPE),
)
IDS = [whole.name for whole in WHOLES]
X = (torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0)),)


# ---------------------------------------------------------------- what may leave


def test_what_may_leave_is_found_and_proven() -> None:
    model = Net()
    before = copy.deepcopy(model.state_dict())
    found, reasons = removable(model, X)
    assert [edit for edit in found if edit.layer.count(".") < 2] == list(SOME)
    assert reasons["stem"] == "it changes shapes"
    assert {*reasons} == {"stem", "blocks.2.branch.0", "blocks.2.shortcut", "blocks.3.conv1",
                          "blocks.3.conv2", "head"}  # fmt: skip
    prove_removed(model, X, SOME)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_blocks_of_resnets_with_plain_shortcuts_may_leave() -> None:
    model, x = zoo.build("resnet20"), zoo.NETWORKS["resnet20"].example(1)
    found, reasons = removable(model, x)
    blocks = [edit.layer for edit in found if edit.layer.count(".") == 1]
    assert blocks == [f"layer{n}.{i}" for n in (1, 2, 3) for i in range(3) if n == 1 or i]
    assert "something else" in reasons["layer2.0"]  # its shortcut is no module
    for block in blocks[::2]:
        replay(model, [Remove(block)])
    assert model(*x).shape == (1, 10)


def test_a_closed_branch_leaves_no_trace_when_its_block_leaves() -> None:
    """What a trained network computes with branches of zeros, it computes without the blocks."""
    torch.manual_seed(0)
    model = Net().eval()
    with torch.no_grad():
        trained = model(*X)
        for edit in SOME[:4]:
            close_branch(model, X, edit)
        wanted = model(*X)
        replay(model, SOME[:4])
        found = model(*X)
    assert torch.equal(found, wanted) and not torch.allclose(found, trained, atol=1e-3)


@pytest.mark.parametrize(
    "edit", [Remove("blocks.0"), Remove("blocks.2"), Remove("blocks.2", "shortcut"),
             Remove("stem"), Remove("head")]
)  # fmt: skip
def test_what_would_change_the_rest_is_refused(edit: Remove) -> None:
    with pytest.raises(EditError, match=r"These blocks cannot be removed: without them .*"):
        prove_removed(Net(), X, [edit])


class Odd(nn.Module):
    """A block that is called twice, one that is never called, one that gives two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.never, self.pair = Block(3, 3), Block(3, 3), Pair()
        self.bare = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, affine=False))
        self.wrapped = Wrapped()

    def forward(self, x: Tensor) -> Tensor:
        x, y = self.pair(self.twice(self.twice(x)))
        return self.wrapped(self.bare(x + y))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, self.conv(x)


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x))


def test_what_must_stay_has_a_reason() -> None:
    _, reasons = removable(Odd(), X)
    assert reasons["twice"] == "called more than once"
    assert reasons["never"] == "never called in a forward pass"
    assert reasons["pair"] == "it does not make one tensor of one"
    assert "without a scale" in reasons["wrapped"]


# ---------------------------------------------------------------- what every edit holds


@pytest.mark.parametrize("check", held.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("whole", WHOLES, ids=IDS)
def test_a_removal_holds(whole: Whole, check: Any) -> None:
    check(whole)


@pytest.mark.parametrize("optimizer", held.OPTIMIZERS)
@pytest.mark.parametrize("whole", WHOLES, ids=IDS)
def test_a_training_goes_on_and_resumes(whole: Whole, optimizer: str) -> None:
    held.trains_on_and_resumes(whole, optimizer)


@pytest.mark.parametrize("whole", WHOLES, ids=IDS)
def test_files_hold(whole: Whole, tmp_path: Path) -> None:
    held.compresses_saves_and_loads(whole, tmp_path)


@pytest.mark.slow  # PyTorch takes a second to trace a network for ONNX
def test_exports_hold(tmp_path: Path) -> None:
    held.exports_with_equal_outputs(WHOLES[0], tmp_path)


def test_what_leaves_takes_its_state_along_and_the_rest_keeps_its_own() -> None:
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.Adam(model.parameters())
    model(*X).sum().backward()
    optimizer.step()
    gone = {*model.blocks[2].parameters()} - {*model.blocks[2].shortcut.parameters()}
    before = {p: optimizer.state[p] for p in model.parameters() if p not in gone}
    carry(optimizer, Remove("blocks.2", "shortcut").apply(model))
    assert dict(optimizer.state) == before
    assert all(optimizer.state[p] is state for p, state in before.items())
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [
        id(p) for p in model.parameters()
    ]


def test_costs_shrink_by_the_block() -> None:
    model = Net()
    whole, block = cost(model, X), module_cost(model, X, "blocks.1")
    replay(model, [Remove("blocks.1")])
    small = cost(model, X)
    assert (small.params, small.macs) == (whole.params - block.params, whole.macs - block.macs)
    assert small.bytes == whole.bytes - block.bytes and block.params == 2 * (8 * 8 * 9 + 8 + 16)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (Remove(""), "The model itself cannot be removed"),
        (Remove("blocks.1.shortcut"), "an identity already"),
        (Remove("blocks.1", "downsample"), "blocks.1 has no shortcut 'downsample'"),
        (Remove("blocks.9"), "no layer 'blocks.9'"),
    ],
)
def test_what_does_not_fit_is_refused(edit: Remove, says: str) -> None:
    model = Net()
    before = [id(part) for part in model.modules()]
    with pytest.raises(EditError, match=says):
        edit.apply(model)
    assert [id(part) for part in model.modules()] == before


def test_predictions_refuse_what_changes_shapes() -> None:
    row = module_cost(Net(), X, "blocks.2")
    with pytest.raises(EditError, match=r"makes \(12, 4, 4\) of \(8, 8, 8\)"):
        Remove("blocks.2").predict(row)
    with pytest.raises(EditError, match="no shortcut 'downsample'"):
        Remove("blocks.2", "downsample").predict(row)


def test_what_is_not_said_is_not_written() -> None:
    assert to_json([Remove("a")]) == [{"edit": "remove", "layer": "a"}]
    row = {"edit": "remove", "layer": "a", "shortcut": "b", "relu": True}
    assert from_json([row]) == [Remove("a", "b", relu=True)] and to_json(from_json([row])) == [row]
