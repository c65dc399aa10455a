"""Widen: channels come, the network computes the same, and optimizers keep what they know."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pliant.edits import Prune, Widen, from_json, replay, to_json
from pliant.errors import EditError
from pliant.surgery.graph import trace
from pliant.surgery.optim import carry
from pliant.surgery.prove import cuttable
from pliant.surgery.widen import widened
from pliant.testing.toys import TOYS
from tests.edits import held
from tests.edits.held import Whole


class Joined(nn.Module):
    """Two branches side by side: what comes to the first lies in the middle for the reader."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 5, 1)
        self.act = nn.PReLU(9)
        self.norm = nn.BatchNorm2d(9)
        self.reader = nn.Conv2d(9, 4, 3)
        self.head = nn.Linear(4 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.act(torch.cat([self.one(x), self.two(x)], 1)))
        return self.head(self.reader(x).flatten(1))


TOYS_ = {
    name: (toy.build, toy.shape) for name, toy in TOYS.items() if name not in ("single", "shared")
}
NETS: dict[str, tuple[Any, tuple[int, ...]]] = TOYS_ | {"joined": (Joined, (3, 6, 6))}


def example(name: str, count: int = 4) -> tuple[Tensor]:
    random = torch.Generator().manual_seed(2)
    return (torch.randn(count, *NETS[name][1], generator=random),)


def model_of(name: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = NETS[name][0]()
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d)):
            nn.init.normal_(norm.bias), nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.weight, 0.5, 2), nn.init.uniform_(norm.running_var, 0.5, 2)
        return model


def plan(name: str, *, spread: float = 0.0) -> list[Widen]:
    """To every group come a copy of its first unit, a new unit, and two copies of its last."""
    model, x = model_of(name), example(name)
    groups, _ = trace(model, x)
    coming = {group.name: (0, -1, *[len(group.units) - 1] * 2) for group in groups}
    return widened(model, x, groups, coming, spread=spread)


WHOLES = [Whole(name, lambda name=name: model_of(name), tuple(plan(name)), NETS[name][1])
          for name in ("plain", "residual", "grouped", "bare", "signal", "joined")]  # fmt: skip
IDS = [whole.name for whole in WHOLES]


# ---------------------------------------------------------------- the function stays


@pytest.mark.parametrize("spread", [0.0, 0.9])
@pytest.mark.parametrize("name", NETS)
def test_the_network_computes_the_same(name: str, spread: float) -> None:
    """In evaluation and, without dropout, in training: copies see the statistics of their old."""
    x = example(name)
    edits = plan(name, spread=spread)
    assert edits
    for training in (False, True):
        model = model_of(name).double().train(training)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(module, nn.MultiheadAttention):
                module.dropout = 0.0
        inputs = x[0].double()
        with torch.no_grad():
            wanted = model(inputs)
            replay(model, edits)
            found = model(inputs)
        assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-9)
    assert sum(p.numel() for p in model.parameters()) > sum(
        p.numel() for p in model_of(name).parameters()
    )


def test_pruning_what_came_gives_the_network_back() -> None:
    """With new channels alone nothing is shared, so the inverse is exact to the last bit."""
    model, x = model_of("residual"), example("residual")
    groups, _ = cuttable(model, x)
    edits = widened(model, x, groups, {groups[0].name: (-1, -1)})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    replay(model, edits)
    back = [Prune(e.layer, e.side, tuple(i for i, old in enumerate(e.source) if old != -1), e.to)
            for e in edits]  # fmt: skip
    replay(model, back)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_copies_divide_the_weights_that_read_them() -> None:
    """Net2Net by hand: channel 1 twice, channel 0 three times."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 1, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([3.0, 5.0]).reshape(2, 1, 1, 1))
        model[1].weight.copy_(torch.tensor([6.0, 8.0]).reshape(1, 2, 1, 1))
    source = (0, 1, 1, 0, 0, -1)
    replay(model, [Widen("0", "out", source, 2), Widen("1", "in", source, 2)])
    assert model[0].weight.flatten().tolist()[:5] == [3, 5, 5, 3, 3]
    assert model[1].weight.flatten().tolist() == [2, 4, 4, 2, 2, 0]
    assert model[0].bias[5] == 0 and model[0].weight[5] != 0
    assert (model[0].out_channels, model[1].in_channels) == (6, 6)


def test_new_filters_are_drawn_by_their_fan_in_and_seed() -> None:
    def filters(seed: int) -> Tensor:
        model = nn.Sequential(nn.Conv2d(64, 1, 3))
        Widen("0", "out", (0, *[-1] * 400), 1, seed=seed).apply(model)
        return model[0].weight.detach()[1:]

    assert filters(0).std() == pytest.approx((2 / 576) ** 0.5, rel=0.01)
    assert torch.equal(filters(0), filters(0)) and not torch.equal(filters(0), filters(1))


# ---------------------------------------------------------------- what every edit holds


@pytest.mark.parametrize("check", held.CHECKS[:4], ids=lambda check: check.__name__)
@pytest.mark.parametrize("whole", WHOLES, ids=IDS)
def test_a_widening_holds(whole: Whole, check: Any) -> None:
    check(whole)


@pytest.mark.parametrize("whole", WHOLES, ids=IDS)
def test_costs_are_predicted(whole: Whole) -> None:
    held.costs_are_what_was_predicted(whole)


@pytest.mark.parametrize("optimizer", held.OPTIMIZERS)
@pytest.mark.parametrize("whole", WHOLES[:3], ids=IDS[:3])
def test_a_training_goes_on_and_resumes(whole: Whole, optimizer: str) -> None:
    held.trains_on_and_resumes(whole, optimizer)


@pytest.mark.parametrize("whole", WHOLES, ids=IDS)
def test_files_hold(whole: Whole, tmp_path: Path) -> None:
    held.compresses_saves_and_loads(whole, tmp_path)


@pytest.mark.slow  # PyTorch takes a second to trace a network for ONNX
@pytest.mark.parametrize("whole", WHOLES[2:3], ids=IDS[2:3])
def test_exports_hold(whole: Whole, tmp_path: Path) -> None:
    held.exports_with_equal_outputs(whole, tmp_path)


# ---------------------------------------------------------------- optimizers


@pytest.mark.parametrize("optimizer", held.OPTIMIZERS)
def test_old_channels_keep_their_state_and_others_begin_with_none(optimizer: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3))
    known = held.OPTIMIZERS[optimizer](model)
    for _ in range(3):
        model(torch.randn(2, 3, 6, 6)).square().sum().backward()
        known.step()
    old = {n: dict(known.state[p]) for n, p in model.named_parameters()}
    source = (2, 0, 1, 2, -1, 3, 0)  # 0 to 3 stand first at 1, 2, 0, 5
    for edit in (Widen("0", "out", source, 4), Widen("2", "in", source, 4)):
        carry(known, edit.apply(model))
    assert {id(p) for p in known.param_groups[0]["params"]} == {id(p) for p in model.parameters()}
    for name, axis in (("0.weight", 0), ("0.bias", 0), ("2.weight", 1)):
        state = known.state[model.get_parameter(name)]
        assert state.keys() == old[name].keys()
        for key, value in state.items():
            if not isinstance(value, Tensor) or not value.dim():
                assert value == old[name][key]
                continue
            kept = value.index_select(axis, torch.tensor([1, 2, 0, 5]))
            assert torch.equal(kept, old[name][key])
            assert not value.index_select(axis, torch.tensor([3, 4, 6])).any()
    assert all(known.state[model[2].bias][k] is v for k, v in old["2.bias"].items())


def test_copies_part_from_each_other() -> None:
    """By momentum alone, or, from the first step on, by shares that differ."""
    for momentum, spread, steps in ((0.9, 0.0, 2), (0.0, 0.5, 1)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 4))
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=momentum)
        x = torch.randn(8, 3)
        for step in range(2 + steps):
            if step == 2:
                for edit in (Widen("0", "out", (0, 1, 0), 2), Widen("2", "in", (0, 1, 0), 2)):
                    carry(optimizer, replace(edit, spread=spread).apply(model))
                assert torch.equal(model[0].weight[0], model[0].weight[2])
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        assert (model[0].weight[0] - model[0].weight[2]).abs().max() > 1e-4


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (Widen("0", "out", (0, 1, 2, 3), 4), "has 8 channels on the side 'out'"),
        (Widen("0", "out", tuple(range(8)), 8), "more are needed than before"),
        (Widen("0", "out", (*range(7), 0, 0), 8), "the old ones all among them"),
        (Widen("0", "out", (*range(8), 8), 8), "the old ones all among them"),
        (Widen("0", "out", (*range(8), -2), 8), "the old ones all among them"),
        (Widen("0", "channels", (*range(8), 0), 8), "Conv2d, which cannot get channels"),
        (Widen("2", "out", (0, 0), 1), "ReLU6, which cannot get channels on the side 'out'"),
        (Widen("0", "out", (*range(8), 0), 8, spread=1.0), "spread of 0 must lie in 0..1"),
        (Widen("7", "in", (*range(12), 0), 12), "3 groups, which must get equally many"),
        (Widen("7", "in", (*range(12), 0, 1, 2), 12), "copies of their own"),
        (Widen("99", "in", (0,), 1), "no layer '99'"),
    ],
)
def test_what_does_not_fit_is_refused(edit: Widen, says: str) -> None:
    model = model_of("grouped")
    before = [id(p) for p in model.parameters()]
    with pytest.raises(EditError, match=says):
        edit.apply(model)
    assert [id(p) for p in model.parameters()] == before


def test_tied_weights_are_not_torn_apart() -> None:
    with pytest.raises(EditError, match="tied to first.weight|tied to second.weight"):
        Widen("second", "in", (*range(8), 0), 8).apply(TOYS["shared"].model())


def test_a_network_that_computes_something_else_is_refused() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 1), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x).mean((2, 3))
            return self.head(x / x.shape[1])  # what it gives depends on the width itself

    model, x = Fixed(), (torch.randn(2, 3, 4, 4),)
    groups, _ = trace(model, x)
    with pytest.raises(EditError, match="These channels cannot come: .* something else"):
        widened(model, x, groups, {"conv": (0,)})
    with pytest.raises(EditError, match=r"no group of channels 'head'.*has conv"):
        widened(model, x, groups, {"head": (0,)})
    with pytest.raises(EditError, match=r"lie in 0\.\.3"):
        widened(model, x, groups, {"conv": (4,)})


def test_plain_widenings_are_written_without_what_they_do_not_use() -> None:
    row = {"edit": "widen", "layer": "0", "side": "out", "source": [0, -1], "of": 1}
    edit = Widen("0", "out", (0, -1), 1)
    assert to_json([edit])[0] == row | {"source": (0, -1)} and from_json([row]) == [edit]
    assert from_json([row | {"spread": 0.5, "seed": 3}]) == [replace(edit, spread=0.5, seed=3)]
