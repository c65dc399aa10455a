"""Channels leave through layers of other classes, and past masks that take marks out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pliant
from pliant.edits.prune import Prune
from pliant.edits.sides import channel_axis, sides
from pliant.surgery.graph import trace
from pliant.surgery.prove import cuttable


class Frozen(nn.Module):
    """A batch norm whose numbers are buffers, as detectors have it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        scale = (self.weight * (self.running_var + 1e-5).rsqrt()).view(1, -1, 1, 1)
        return (x - self.running_mean.view(1, -1, 1, 1)) * scale + self.bias.view(1, -1, 1, 1)


class Active(nn.BatchNorm2d):
    """A batch norm that activates too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Scale(nn.Module):
    """A number for every channel, which comes first of the last three axes, and their count."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels, self.gamma = channels, nn.Parameter(torch.rand(channels, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == self.channels
        return x * self.gamma


class Mixing(nn.Module):
    """Has a number for every channel, and mixes them all."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x / x.square().mean(1, keepdim=True).sqrt() * self.weight.view(1, -1, 1, 1)


class Net(nn.Module):
    def __init__(self, between: Callable[[int], Any]) -> None:
        super().__init__()
        self.first, self.between = nn.Conv2d(3, 8, 3), between(8)
        self.second, self.head = nn.Conv2d(8, 8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.between(self.first(x)).relu()).relu().mean((2, 3)))


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (Frozen, ("weight", "bias", "running_mean", "running_var")),
        (Active, ("weight", "bias", "running_mean", "running_var")),
        (Scale, ("gamma",)),
    ],
)
def test_layers_of_other_classes_are_cut_with_their_channels(
    kind: Callable[[int], Any], names: tuple[str, ...]
) -> None:
    torch.manual_seed(0)
    model, x = Net(kind).eval(), torch.randn(4, 3, 8, 8)
    [group] = [g for g in cuttable(model, (x[:1],))[0] if g.name == "first"]
    assert ("between", "channels") in group.slots
    keep = (1, 2, 5, 7)
    before = {name: getattr(model.between, name).clone() for name in names}
    with torch.no_grad():
        model.second.weight[:, [0, 3, 4, 6]] = 0
    wanted = model(x)
    for layer, side in (("first", "out"), ("between", "channels"), ("second", "in")):
        Prune(layer, side, keep, 8).apply(model)
    assert torch.allclose(model(x), wanted, atol=1e-5)
    for name in names:
        assert torch.equal(getattr(model.between, name), before[name][list(keep)])


def test_what_mixes_channels_keeps_them_all() -> None:
    groups, reasons = cuttable(Net(Mixing), (torch.randn(1, 3, 8, 8),))
    assert [group.name for group in groups] == ["second"]
    assert "first" in reasons


def test_only_layers_all_of_whose_tensors_are_by_channel_have_such_a_side() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(5))

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.ones(4, 4))

    assert sides(Scale(6)) == {"channels": 6} and sides(Frozen(6)) == {"channels": 6}
    assert sides(nn.GroupNorm(2, 6)) == {"channels": 6}
    assert not any(map(sides, (Two(), Table(), nn.LayerNorm(6), nn.ReLU())))


def test_tokens_have_their_channels_last() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gamma = nn.Parameter(torch.rand(8) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.gamma

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.scale, self.down = nn.Linear(4, 8), Last(), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.scale(self.up(x)).relu())

    assert channel_axis(Scale(8), torch.zeros(1, 8, 8, 8)) == 1
    assert channel_axis(Last(), torch.zeros(1, 8, 8)) == 2
    assert channel_axis(nn.BatchNorm1d(8), torch.zeros(1, 8, 8)) == 1
    [group] = cuttable(Block(), (torch.randn(1, 8, 4),))[0]  # as many tokens as channels
    assert ("scale", "channels") in group.slots


MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "where": lambda x: torch.where(x > 0.1, x, torch.zeros_like(x)),
    "cleaned": lambda x: x.nan_to_num(),
    "compared": lambda x: x * (x > 0).float() if bool(torch.isfinite(x).all()) else x * 0,
}


@pytest.mark.parametrize("mask", MASKS)
def test_channels_are_followed_past_masks(mask: str) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(MASKS[mask](self.first(x).relu()))

    torch.manual_seed(0)
    groups, _ = cuttable(Masked(), (torch.randn(1, 6),))
    assert [(group.name, len(group.units)) for group in groups] == [("first", 16)]


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(12, 12) for _ in range(4))
        self.up, self.down, self.head = nn.Linear(12, 24), nn.Linear(24, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        heads = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(heads)
        return self.head(x + self.down(F.gelu(self.up(x)))).mean(1)


def test_heads_and_the_width_of_the_perceptron_leave() -> None:
    groups = {g.name: g for g in cuttable(Attending(), (torch.randn(1, 5, 12),))[0]}
    assert len(groups["up"].units) == 24
    assert {layer for layer, _ in groups["q"].slots} == {"q", "k", "v", "out"}
    place = groups["q"].slots.index(("v", "out"))
    assert [unit[place] for unit in groups["q"].units] == [
        tuple(range(4 * head, 4 * head + 4)) for head in range(3)
    ]


def test_heads_of_packed_attention_leave() -> None:
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(12, 3, 24, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(block, 1), nn.Flatten(), nn.Linear(60, 3))
    x, y = torch.randn(16, 5, 12), torch.randint(0, 3, (16,))
    result = pliant.compress(model, (x, y), "magnitude(scope='global')", "params=0.75")
    assert result.report.met and result.model(x).shape == (16, 3)
    cut = {edit.layer.rpartition(".")[2] for edit in result.edits if isinstance(edit, Prune)}
    assert {"linear1", "query", "value"} & cut


@pytest.mark.parametrize(
    ("between", "wanted"),
    [
        (lambda x: F.max_pool2d(F.pad(x, (1, 1)).relu(), 2).flatten(1), set()),
        (lambda x: x.unflatten(1, (2, 4)).flatten(1), {"heads"}),
        (lambda x: torch.where(x > 0, x, x * 0).flatten(1), {"marks"}),
    ],
)
def test_a_trace_says_what_another_might_find(
    between: Callable[[Tensor], Tensor], wanted: set[str]
) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.second = nn.LazyLinear(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(between(self.norm(self.first(x))))

    model, example, seen = Net().eval(), (torch.randn(1, 2, 4, 4),), dict[str, Any]()
    model(*example)
    trace(model, example, seen=seen)
    assert set(seen) == wanted
