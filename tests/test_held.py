"""Channels leave through tensors that a block or a network holds by itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pliant
from pliant.cost import cost, layer_costs
from pliant.edits import Prune, from_json, replay, to_json
from pliant.errors import EditError
from pliant.families.prune.allocate import after
from pliant.files.onnx import to_onnx
from pliant.run import start
from pliant.surgery.graph import Group
from pliant.surgery.prove import cuttable, edits_of, silence


class Net(nn.Module):
    """Two convolutions, tensors by name, and what stands between the convolutions."""

    def __init__(self, between: Callable[..., Tensor], **tensors: Tensor) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 6, 3, padding=1)
        self.head = nn.Linear(6, 4)
        self.channels, self.between = 8, between
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor))

    def forward(self, x: Tensor) -> Any:
        return self.head(self.second(F.relu(self.between(self, self.first(x)))).mean((2, 3)))


def some(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) + 0.5


def by_hand(net: Any, x: Tensor) -> Tensor:
    """An instance norm, written out."""
    x = (x - x.mean((2, 3), keepdim=True)) / (x.var((2, 3), keepdim=True) + 1e-5).sqrt()
    return net.weight[:, None, None] * x + net.bias.view(1, net.channels, 1, 1)


def last(net: Any, x: Tensor) -> Tensor:
    return (net.gamma * x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) + x


def kept_in_a_list(net: Any, x: Tensor) -> Tensor:
    return torch.addcmul(x, x, 1 + net.scales[1].exp().unsqueeze(-1))


def lists() -> Net:
    net = Net(kept_in_a_list)
    net.scales = nn.ParameterList([nn.Parameter(some(3)), nn.Parameter(some(8, 1))])
    return net


def buffers() -> Net:
    net = Net(lambda net, x: x - net.shift)
    net.register_buffer("shift", some(1, 8, 1, 1))
    return net


FORMS: dict[str, Callable[[], Net]] = {
    "scale": lambda: Net(lambda net, x: x * net.scale, scale=some(8, 1, 1)),
    "by hand": lambda: Net(by_hand, weight=some(8), bias=some(8)),
    "channels last": lambda: Net(last, gamma=some(8)),
    "list": lists,
    "buffer": buffers,
    "two ways": lambda: Net(
        lambda net, x: x * net.w.view(-1, 1, 1) + x * net.w.flip(0)[:, None, None], w=some(8)
    ),
    "activation": lambda: Net(lambda net, x: F.prelu(x, net.slope), slope=some(8)),
}
IMAGES = torch.randn(24, 3, 6, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(24) % 4


def groups_of(model: nn.Module, x: Tensor = IMAGES) -> dict[str, Group]:
    return {group.name: group for group in cuttable(model, (x,))[0]}


@pytest.mark.parametrize("form", [name for name in FORMS if name != "two ways"])
def test_a_tensor_of_a_block_loses_what_its_channels_lose(form: str) -> None:
    """What is predicted is what is measured, and a file knows the edits."""
    net = FORMS[form]()
    group = groups_of(net)["first"]
    assert len(group.units) == 8
    edits = edits_of(net, [group], {"first": [1, 4, 6]})
    now, rows = cost(net, (IMAGES,)), layer_costs(net, (IMAGES,))
    whole = FORMS[form]()
    whole.load_state_dict(net.state_dict())
    silence(whole, edits)
    replay(net, from_json(to_json(edits)))
    assert cost(net, (IMAGES,)) == after(now, rows, edits)
    assert torch.allclose(net(IMAGES), whole(IMAGES), atol=1e-5)


def test_channels_that_meet_one_number_leave_together() -> None:
    group = groups_of(FORMS["two ways"]())["first"]
    place = group.slots.index(("first", "out"))
    assert {unit[place] for unit in group.units} == {(0, 7), (1, 6), (2, 5), (3, 4)}


def test_a_number_of_channels_that_a_module_notes_is_kept_right() -> None:
    net = FORMS["by hand"]()
    replay(net, edits_of(net, [groups_of(net)["first"]], {"first": [0, 1]}))
    assert net.channels == 6


# ---------------------------------------------------------------- tokens and positions


class Attention(nn.Module):
    """Two heads, each of which has a temperature."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.temperature, self.heads = nn.Parameter(some(2, 1, 1)), 2

    def forward(self, x: Tensor) -> Tensor:
        parts = (part.unflatten(-1, (self.heads, -1)) for part in self.qkv(x).chunk(3, -1))
        rows = [part.transpose(1, 2) for part in parts]
        scores = (rows[0] @ rows[1].transpose(-1, -2) * self.temperature).softmax(-1)
        return self.out((scores @ rows[2]).transpose(1, 2).flatten(2))


class Tokens(nn.Module):
    """A token of its own before those of the image, positions, and a scaled branch."""

    def __init__(self, *, resized: bool = False, normed: bool = False) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 3, 3)
        self.token = nn.Parameter(some(1, 1, 16))
        self.positions = nn.Parameter(some(1, 5, 16))
        self.attention, self.gamma = Attention(16), nn.Parameter(some(16))
        self.norm = nn.LayerNorm(16) if normed else nn.Identity()
        self.head, self.resized = nn.Linear(16, 4), resized

    def forward(self, x: Tensor) -> Any:
        x = self.patch(x).flatten(2).mT
        if self.resized:
            grid = self.positions[:, 1:].unflatten(1, (2, 2)).permute(0, 3, 1, 2)
            grid = F.interpolate(grid, size=(2, 2), mode="bilinear").flatten(2).mT
            token = self.token + self.positions[:, :1]
            x = torch.cat([token.expand(x.shape[0], -1, -1), x + grid], 1)
        else:
            x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        return self.head(self.norm(x + self.gamma * self.attention(x)).mean(1))


@pytest.mark.parametrize("width", [12, 16, 20])
def test_heads_of_any_width_leave_whole(width: int) -> None:
    """Their channels are told apart from those of the next head, power of two or not."""
    net = nn.Sequential(nn.Linear(3, width), Attention(width), nn.Linear(width, 2))
    found = groups_of(net, torch.randn(2, 5, 3))["1.qkv"]
    half = width // 2
    place = found.slots.index(("1.qkv", "out"))
    starts = (part * width for part in range(3))
    assert found.units[0][place] == tuple(s + c for s in starts for c in range(half))


@pytest.mark.parametrize("resized", [False, True])
def test_tokens_and_positions_lose_the_channels_of_what_they_meet(*, resized: bool) -> None:
    """Positions do not leave, however many there are, and heads leave with their temperature."""
    groups = groups_of(Tokens(resized=resized))
    slots = groups["patch"].slots
    assert {slot for slot in slots if ":" in slot[1]} == {
        ("", "token:2"),
        ("", "positions:2"),
        ("", "gamma:0"),
    }
    assert ("attention", "temperature:0") in groups["attention.qkv"].slots
    assert len(groups["attention.qkv"].units) == 2


def test_norms_over_all_channels_may_take_them_along() -> None:
    """Where nothing else can leave, the tensors follow past a layer norm too."""
    net = Tokens(normed=True)
    net.attention = nn.Identity()  # type: ignore[assignment]
    slots = groups_of(net)["patch"].slots
    assert ("norm", "channels") in slots
    assert ("", "token:2") in slots


def test_what_a_token_alone_makes_is_tied_to_who_reads_it() -> None:
    """A query that is learned has no channels of a layer until something is added to it."""

    class Query(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.patch = nn.Parameter(some(1, 3, 8)), nn.Conv2d(3, 8, 3, 3)
            self.read, self.head = nn.Linear(8, 4), nn.Linear(8, 4)
            self.project = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Any:
            query = self.query.expand(x.shape[0], -1, -1)
            given = self.patch(x).flatten(2).mean(2)[:, None]
            return self.head(query + self.project(given)) + self.read(query)

    assert {("read", "in"), ("", "query:2")} <= set(groups_of(Query())["project"].slots)


# ---------------------------------------------------------------- what stays, and why


def test_a_tensor_that_is_reshaped_across_channels_keeps_them_and_the_reason_names_it() -> None:
    def grouped(net: Any, x: Tensor) -> Tensor:
        parts = x.unflatten(1, (2, 4)) * net.weight.view(2, 4, 1, 1)
        return parts.flatten(1, 2)

    groups, reasons = cuttable(Net(grouped, weight=some(8)), (IMAGES,))
    assert "first" not in {group.name for group in groups}
    assert reasons["first"] == "weight is reshaped before it meets them, so it stays whole"


def test_a_tensor_that_another_module_holds_too_stays_whole() -> None:
    net = FORMS["channels last"]()
    net.others = nn.ParameterList([net.gamma])
    reasons = cuttable(net, (IMAGES,))[1]
    assert "its weight is tied to others.0" in reasons["first"]


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (Prune("", "scale:1", (0,), 2), "no channels can be removed on the side 'scale:1'"),
        (Prune("", "scale:0", (0, 1), 9), "has 8 channels"),
        (Prune("first", "weight:0", (0, 1), 8), "no channels can be removed"),
    ],
)
def test_edits_of_tensors_that_do_not_fit_are_refused(edit: Prune, words: str) -> None:
    with pytest.raises(EditError, match=words):
        replay(FORMS["scale"](), [edit])


# ---------------------------------------------------------------- in use


def test_such_channels_leave_while_a_network_trains() -> None:
    """All state of the optimizer is cut alike."""
    net = Tokens()
    adam = torch.optim.AdamW(net.parameters())
    method = "magnitude(ratio=0.4, start=0.5, end=0.5)"
    data = (IMAGES, LABELS)
    run = start(net, method, data=data, optimizer=adam, steps=4)
    for _ in range(4):
        adam.zero_grad()
        loss = F.cross_entropy(net(IMAGES), LABELS)
        loss.backward()
        run.before_step()
        adam.step()
        run.after_step()
    run.finish()
    assert 2 <= net.gamma.numel() == net.token.shape[-1] < 16
    for parameter in (net.gamma, net.token, net.positions):
        assert adam.state[parameter]["exp_avg"].shape == parameter.shape


def test_a_file_and_an_export_say_the_same(tmp_path: Path) -> None:
    result = pliant.compress(Tokens(), (IMAGES, LABELS), "magnitude", "params=0.6")
    assert result.report.met
    row = next(row for row in result.report.layers if not row.layer)
    assert row.kept is not None
    assert row.after["params"] == result.model.get_parameter("gamma").numel() * 7
    result.save(tmp_path / "net.pliant")
    again = pliant.load(tmp_path / "net.pliant", Tokens())
    assert torch.equal(again(IMAGES), result.model(IMAGES))
    to_onnx(result.model, tmp_path / "net.onnx", (IMAGES[:2],))
