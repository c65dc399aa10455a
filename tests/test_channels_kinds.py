"""Channels leave through transposed convolutions and group norms, and stay where norms mix all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pliant
from pliant.cost import cost, layer_costs
from pliant.edits import replay
from pliant.edits.prune import Prune
from pliant.edits.sides import sides
from pliant.edits.widen import Widen
from pliant.errors import EditError
from pliant.families.prune import progress, soft
from pliant.families.prune.columns import columns, set_columns
from pliant.families.prune.redundancy import fold
from pliant.families.prune.scores import vectors
from pliant.files.onnx import to_onnx
from pliant.nn.kinds import in_rows, to_rows
from pliant.surgery.batchnorm import absorb
from pliant.surgery.graph import Group
from pliant.surgery.optim import carry
from pliant.surgery.prove import cuttable, edits_of, ignore, prove, silence
from pliant.surgery.widen import widened

TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def generator() -> nn.Module:
    """Transposed convolutions of all sorts: with groups, and one filter for each channel."""
    return nn.Sequential(
        nn.ConvTranspose2d(6, 12, 3, 2, 1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.ConvTranspose2d(12, 16, 4, 2, 1, groups=2),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        nn.ConvTranspose2d(16, 16, 3, padding=1, groups=16),
        nn.ReLU(),
        nn.ConvTranspose2d(16, 8, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


def images() -> tuple[Tensor, Tensor]:
    return torch.randn(32, 6, 4, 4), torch.randint(0, 3, (32,))


# ---------------------------------------------------------------- one layer


@pytest.mark.parametrize("axes", TRANSPOSED)
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_a_side_of_a_transposed_convolution_is_cut(axes: int, groups: int) -> None:
    """What is left computes the outputs that are left, of the inputs that are left."""
    torch.manual_seed(0)
    layer = TRANSPOSED[axes](6, 12, 3, stride=2, padding=1, groups=groups)
    x, holder = torch.randn(2, 6, *[4] * axes), nn.Sequential(layer)
    apart = groups == 6  # one filter for each channel, two outputs of each
    assert set(sides(layer)) == ({"channels"} if apart else {"in", "out"})
    kept_in, kept_out = (0, 2, 4, 5), (1, 2, 3, 6, 8, 11)
    if apart:
        kept_out = tuple(2 * channel + i for channel in kept_in for i in (0, 1))
    gone = [channel for channel in range(6) if channel not in kept_in]
    silenced = x.clone()
    silenced[:, gone] = 0
    wanted = layer(silenced)[:, list(kept_out)]
    edits = (
        [Prune("0", "channels", kept_in, 6)]
        if apart
        else [Prune("0", "in", kept_in, 6), Prune("0", "out", kept_out, 12)]
    )
    predicted = layer_costs(holder, (x,))["0"]
    for edit in edits:
        predicted = edit.predict(predicted)
    replay(holder, edits)
    less = x[:, list(kept_in)]
    assert torch.allclose(holder[0](less), wanted, atol=1e-6)
    after = cost(holder, (less,))
    found = layer_costs(holder, (less,))["0"]
    assert (after.params, after.macs) == (predicted.params, predicted.macs)
    assert (found.weight, found.bytes) == (predicted.weight, predicted.bytes)


def test_inputs_of_two_groups_must_leave_in_equal_numbers() -> None:
    model = nn.Sequential(nn.ConvTranspose1d(6, 4, 3, groups=2))
    with pytest.raises(EditError, match="equally many"):
        Prune("0", "in", (0, 1, 3), 6).apply(model)


@pytest.mark.parametrize("groups", [1, 2])
def test_rows_of_a_transposed_weight_are_its_filters(groups: int) -> None:
    """Scores and columns look at what one output, and what one input, is made with."""
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(4, 6, 3, groups=groups)
    model, weight = nn.Sequential(layer), layer.weight.detach().clone()
    rows = to_rows(layer, weight)
    for target in range(6):
        half, place = divmod(target, 6 // groups)
        own = weight.unflatten(0, (groups, -1))[half][:, place]
        assert torch.equal(rows[target], own)
        [found] = vectors(model, {"0": torch.tensor([[target]])})
        assert torch.equal(found, own.double().flatten())
    for source in range(4):
        assert torch.equal(columns(layer)[source].sort()[0], weight[source].flatten().sort()[0])
    set_columns(layer, 2 * columns(layer).detach())
    assert torch.allclose(layer.weight, 2 * weight)
    with torch.no_grad(), in_rows(layer, layer.weight) as mine:
        mine[1] = 0
    silent = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=groups))
    silent[0].load_state_dict({"weight": 2 * weight, "bias": layer.bias})
    silence(silent, [Prune("0", "out", (0, 2, 3, 4, 5), 6)])
    assert torch.equal(silent[0].weight, layer.weight)
    ignore(silent, [Prune("0", "in", (0, 2, 3), 4)])
    assert silent[0].weight[1].abs().max() == 0 < silent[0].weight[0].abs().max()


def test_momentum_of_a_transposed_convolution_is_cut_with_it() -> None:
    layer = nn.ConvTranspose2d(4, 6, 3)
    model = nn.Sequential(layer)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(2, 4, 3, 3)).square().sum().backward()
    optimizer.step()
    before = optimizer.state[layer.weight]["momentum_buffer"].clone()
    carry([optimizer], Prune("0", "out", (1, 4), 6).apply(model))
    after = optimizer.state[layer.weight]["momentum_buffer"]
    assert torch.equal(after, before[:, [1, 4]])


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_biases_take_what_constant_inputs_gave(stride: int) -> None:
    """A stride of several steps shares a kernel among as many positions."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(4, 2, 2 * stride, stride))
    x = torch.randn(8, 4, 12, 12)
    x[:, 1] = 3.0
    inside = slice(2 * stride, -2 * stride)
    before = model(x)[..., inside, inside].mean((0, 2, 3))
    absorb(model, {"0": (1,)}, [(x,)])
    ignore(model, [Prune("0", "in", (0, 2, 3), 4)])
    after = model(x)[..., inside, inside].mean((0, 2, 3))
    assert torch.allclose(before, after, atol=1e-4)


def test_filters_of_a_transposed_convolution_fade_and_are_pulled_as_such() -> None:
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(4, 6, 3)
    model, rows = nn.Sequential(layer), {"0": torch.arange(6)[:, None]}
    layer(torch.randn(2, 4, 3, 3)).square().sum().backward()
    gradient = layer.weight.grad.clone()
    sums: dict[str, Tensor] = {}
    progress.add_gradients(model, ["0"], sums, "path")
    assert torch.allclose(sums["0"], gradient.abs().sum((0, 2, 3)), rtol=1e-5)
    found = progress.moved(sums, rows, "path")
    assert found is not None and len(found) == 6
    layer.weight.grad[:, 2] *= 1000
    progress.calm(model, {"group": rows}, {"group": [2]})
    norms = layer.weight.grad.transpose(0, 1).flatten(1).norm(dim=1)
    others = norms[[0, 1, 3, 4, 5]]
    assert torch.isclose(norms[2], others.median(), rtol=1e-4)
    assert torch.equal(layer.weight.grad[:, [0, 1, 3, 4, 5]], gradient[:, [0, 1, 3, 4, 5]])
    soft.fade_units(model, rows, [3], 0.0)
    assert layer.weight[:, 3].abs().max() == 0 < layer.weight[:, 2].abs().max()


def test_what_predicts_a_unit_is_read_in_its_place_by_transposed_convolutions() -> None:
    """A unit that is twice another and a constant leaves without a change, but for borders."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.ConvTranspose2d(3, 4, 4, 2))
    with torch.no_grad():
        model[0].weight[2], model[0].bias[2] = 2 * model[0].weight[0], 2 * model[0].bias[0] + 0.7
    x = torch.randn(4, 2, 6, 6)
    inside = slice(4, -4)
    wanted = model(x)[..., inside, inside]
    units = tuple(((unit,), (unit,)) for unit in range(3))
    group = Group("0", (("0", "out"), ("1", "in")), units)
    before = wanted.mean((0, 2, 3))
    with torch.no_grad():
        fold(model, group, [2], torch.tensor([[2.0], [0.0], [0.7]]).double())
    assert model[1].weight[2].abs().max() == 0
    found = model(x)[..., inside, inside]
    assert torch.allclose(found.mean((0, 2, 3)), before, atol=1e-4)
    assert (found - wanted).var(0).max() < 1e-8  # no sample is treated otherwise than others


# ---------------------------------------------------------------- networks


@pytest.mark.parametrize("axes", TRANSPOSED)
def test_transposed_convolutions_lose_what_nothing_reads(axes: int) -> None:
    """Where the next layer ignores some channels, the network computes the same without them."""
    torch.manual_seed(0)
    kind = TRANSPOSED[axes]
    model = nn.Sequential(kind(4, 8, 3, 2), nn.ReLU(), kind(8, 5, 3, 2, 1), nn.Tanh())
    x = torch.randn(2, 4, *[3] * axes)
    with torch.no_grad():
        model[2].weight[[1, 4, 6]] = 0
    wanted = model(x)
    [group], reasons = cuttable(model, (x,))
    assert group.slots == (("0", "out"), ("2", "in")) and len(group.units) == 8
    assert reasons["2"] == "its channels are outputs of the network"
    replay(model, edits_of(model, [group], {group.name: [1, 4, 6]}))
    assert model[0].weight.shape[1] == model[2].weight.shape[0] == 5
    assert torch.allclose(model(x), wanted, atol=1e-6)


class Sized(nn.Module):
    """Asks a transposed convolution for the size of its output, as decoders of masks do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, 2, 1), nn.ConvTranspose2d(8, 6, 3, 2, 1)
        self.last, self.skip = nn.Conv2d(6, 2, 1), nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        large = self.second(self.first(x), output_size=x.shape[2:])
        return self.last(large) + self.skip(x)


def test_channels_leave_where_an_output_size_is_given() -> None:
    groups, _ = cuttable(Sized(), (torch.randn(2, 3, 8, 8),))
    assert [group.name for group in groups] == ["first", "second"]


@pytest.mark.parametrize(
    "method",
    [
        *("magnitude", "fpgm", "slimming", "group_fisher", "activation_density"),
        *("constrained_projection", "dynamic_channel_propagation", "pgp", "hfp"),
    ],
)
def test_methods_remove_channels_of_transposed_convolutions(method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, labels = images()
    train = pliant.Train(epochs=1) if method in ("slimming", "pgp") else None
    result = pliant.compress(generator(), (x, labels), method, "params=0.7", train=train)
    assert result.report.met
    changed = {row.layer for row in result.report.layers if row.form == "pruned"}
    assert changed & {"0", "3", "8"}
    found = result.model.eval()(x)
    result.save(tmp_path / "net.pliant")
    loaded = pliant.load(tmp_path / "net.pliant", generator()).eval()
    assert torch.equal(loaded(x), found)


def test_cut_generators_are_exported(tmp_path: Path) -> None:
    onnxruntime: Any = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    x, labels = images()
    result = pliant.compress(generator(), (x, labels), "magnitude", "macs=0.6")
    assert all(row.form == "pruned" for row in result.report.layers if row.layer != "12")
    to_onnx(result.model, tmp_path / "net.onnx", (x[:2],))
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"))
    found = session.run(None, {session.get_inputs()[0].name: x[:1].numpy()})[0]
    assert torch.allclose(torch.from_numpy(found), result.model.eval()(x[:1]), atol=1e-4)


def test_generators_become_wider_and_compute_the_same() -> None:
    torch.manual_seed(0)
    model, (x, _) = generator().eval(), images()
    wanted = model(x)
    groups, _ = cuttable(model, (x,))
    coming = {group.name: [0, -1] for group in groups}
    edits = widened(model, (x,), groups, coming, spread=0.5)
    before = layer_costs(model, (x,))["3"]
    for edit in edits:
        before = edit.predict(before) if edit.layer == "3" else before
    replay(model, edits)
    assert torch.allclose(model(x), wanted, atol=1e-5)
    assert layer_costs(model, (x,))["3"].params == before.params
    assert any(isinstance(edit, Widen) and edit.side == "channels" for edit in edits)


# ---------------------------------------------------------------- norms over several channels


def normed(norm: nn.Module, channels: int = 24) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, channels, 3),
        norm,
        nn.ReLU(),
        nn.Conv2d(channels, 16, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("groups", [3, 8, 12, 24])
def test_groups_of_a_group_norm_leave_whole(groups: int, *, affine: bool) -> None:
    """Without a group whose channels nothing reads the outputs are what they were."""
    torch.manual_seed(0)
    norm, width = nn.GroupNorm(groups, 24, affine=affine), 24 // groups
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    model, x = normed(norm), torch.randn(2, 3, 8, 8)
    found, _ = cuttable(model, (x,))
    [group] = [group for group in found if ("1", "channels") in group.slots]
    assert len(group.units) == groups and group.rows(("0", "out")).shape[1] == width
    with torch.no_grad():
        model[3].weight[:, group.rows(("3", "in"))[1]] = 0
    wanted = model(x)
    replay(model, edits_of(model, [group], {group.name: [1]}))
    assert (model[1].num_groups, model[1].num_channels) == (groups - 1, 24 - width)
    assert torch.allclose(model(x), wanted, atol=1e-5)


class Active(nn.GroupNorm):
    """A group norm that activates too, as timm has it."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


def test_classes_that_derive_from_a_group_norm_are_cut_too() -> None:
    groups, _ = cuttable(normed(Active(8, 24)), (torch.randn(2, 3, 8, 8),))
    assert [len(group.units) for group in groups] == [8, 16]


def test_a_group_norm_keeps_whole_groups_or_refuses() -> None:
    model = nn.Sequential(nn.GroupNorm(3, 9))
    with pytest.raises(EditError, match="groups of 3 channels, which must stay or leave whole"):
        Prune("0", "channels", (0, 1, 3, 4, 6, 7), 9).apply(model)
    with pytest.raises(EditError, match="whole groups of 3"):
        Widen("0", "channels", (*range(9), -1), 9).apply(model)


class Last(nn.Module):
    """A layer norm over the channels of images."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class RootNorm(nn.Module):
    """Divides by the size of all channels, as a class of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x / x.square().mean(1, keepdim=True).sqrt() * self.scale


@pytest.mark.parametrize(
    ("norm", "name"),
    [
        (lambda: nn.GroupNorm(1, 24), "GroupNorm 1"),
        (lambda: Last(24), "LayerNorm 1.norm"),
        (lambda: nn.LayerNorm([24, 6, 6]), "LayerNorm 1"),
        (lambda: RootNorm(24), "RootNorm 1"),
    ],
)
def test_channels_that_a_norm_mixes_stay_and_the_reason_names_it(norm: Any, name: str) -> None:
    data = torch.randn(16, 3, 8, 8), torch.randint(0, 3, (16,))
    result = pliant.compress(normed(norm()), data, "magnitude", "macs=0.8")
    rows = {row.layer: row for row in result.report.layers}
    assert rows["3"].form == "pruned" and rows["0"].form == "dense"
    why = "takes its statistics over all of its channels: without some the others would change"
    assert rows["0"].reason == f"{name} {why}"


class Block(nn.Module):
    """A block of ConvNeXt: channels last between two linear layers, a scale, a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depth = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.first, self.second = nn.Linear(channels, 32), nn.Linear(32, channels)
        self.gamma = nn.Parameter(torch.rand(channels))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.first(self.norm(self.depth(x).permute(0, 2, 3, 1)))
        return x + (self.gamma * self.second(nn.functional.gelu(inner))).permute(0, 3, 1, 2)


def test_blocks_with_channels_last_lose_those_between_their_linear_layers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 2, 2), Block(8), Block(8), nn.Conv2d(8, 2, 1))
    x = torch.randn(2, 3, 8, 8)
    groups, reasons = cuttable(model, (x,))
    assert [group.slots[0][0] for group in groups] == ["1.first", "2.first"]
    with torch.no_grad():
        model[1].second.weight[:, :20] = 0
    wanted = model(x)
    replay(model, edits_of(model, groups, {"1.first": list(range(20))}))
    assert torch.allclose(model(x), wanted, atol=1e-5)
    assert "norm takes its statistics over all of its channels" in reasons["0"]


# ---------------------------------------------------------------- reasons


class Experts(nn.Module):
    """Experts whose matrices are one parameter, as Transformers has them, and what reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.mixing = nn.Parameter(torch.randn(2, 8, 12) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nc,ecd->nd", x, self.mixing)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.steps, self.norm = nn.LSTM(8, 8, batch_first=True), nn.LayerNorm(8)
        self.experts = Experts()
        self.first, self.second = nn.Linear(12, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(self.experts(self.norm(self.steps(x)[0][:, -1]))).relu())


@pytest.mark.parametrize("method", ["energy", "magnitude", "evbmf", "nrmf"])
def test_reasons_say_what_lies_in_layers_left_alone(method: str) -> None:
    """Three axes are no lack of channels, and an LSTM has matrices: reasons are true of a layer."""
    data = torch.randn(16, 5, 8), torch.randint(0, 3, (16,))
    result = pliant.compress(Recurrent(), data, method, "params=0.9")
    reasons = {row.layer: row.reason for row in result.report.layers}
    fused = "LSTM multiplies its matrices within one fused operation, step by step"
    whole = ", which takes them whole and not as factors"
    assert reasons["steps"] == (fused if method == "magnitude" else fused + whole)
    vectors = "no matrix to change: its parameters are vectors"
    channels = "it takes its statistics over all of its channels, so these stay"
    assert reasons["norm"] == (channels if method == "magnitude" else vectors)
    assert reasons["experts"] == (
        "its parameter mixing (2 x 8 x 12) lies in no layer of a kind that can be replaced"
    )


class ActiveNorm(nn.BatchNorm2d):
    """A batch norm that also activates, by layers that it holds."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class Words(nn.Module):
    """Lays all words of all samples side by side for its first layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 16), nn.LayerNorm(5), nn.Linear(16, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.second(self.first(x.reshape(-1, 6)).relu()))
        return self.head(hidden.view(*x.shape[:2], -1))


class Series(nn.Module):
    """Treats every series of a sample as a sample of its own, and halves its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(1, 16, 1), nn.Conv1d(8, 5, 1)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        samples, series, steps = x.shape
        a, b = self.first(x.reshape(samples * series, 1, steps)).chunk(2, 1)
        return self.head(self.second(a * b.sigmoid()).mean(-1)).view(samples, series, 3)


def test_channels_leave_through_a_batch_norm_that_holds_its_activation() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), ActiveNorm(8), nn.Flatten(), nn.Linear(8 * 36, 4))
    groups, _ = cuttable(model, (torch.randn(2, 3, 8, 8),))
    assert [len(group.units) for group in groups] == [8]


def test_channels_leave_where_a_sample_is_several_rows() -> None:
    groups, reasons = cuttable(Words(), (torch.randn(2, 7, 6),))
    assert [(group.name, len(group.units)) for group in groups] == [("first", 16)]
    assert "LayerNorm norm takes its statistics over all of its channels" in reasons["second"]


def test_halves_leave_together_where_a_sample_is_several_rows() -> None:
    groups, _ = cuttable(Series(), (torch.randn(2, 7, 6),))
    assert [(group.name, len(group.units)) for group in groups] == [("first", 8), ("second", 5)]


# ---------------------------------------------------------------- norms over all channels


class ResponseGRN(nn.Module):
    """Divides what each channel responds by what all do on average."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 1, 1, channels))
        self.bias = nn.Parameter(torch.zeros(1, 1, 1, channels))

    def forward(self, x: Tensor) -> Tensor:
        size = x.norm(dim=(1, 2), keepdim=True)
        return x + self.weight * (x * size / (size.mean(-1, keepdim=True) + 1e-6)) + self.bias


class ChannelsFirstNorm(nn.LayerNorm):
    """A layer norm over the channels of images."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class NextBlock(nn.Module):
    """A block all of whose channels pass norms over all channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm, self.grn = nn.LayerNorm(width), ResponseGRN(24)
        self.up, self.down = nn.Linear(width, 24), nn.Linear(24, width)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm(self.mix(x).movedim(1, -1))
        return x + self.down(self.grn(self.up(inner).relu())).movedim(-1, 1)


class Next(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 12, 2, 2), ChannelsFirstNorm(12)
        self.block, self.one = NextBlock(12), nn.GroupNorm(1, 12)
        self.last, self.head = nn.RMSNorm(12, elementwise_affine=False), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.one(self.block(self.first(self.stem(x)))).mean((2, 3))))


def test_where_all_else_fails_channels_pass_norms_over_all_of_them(tmp_path: Path) -> None:
    """Their statistics are then those of what stays, and the report says so."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    result = pliant.compress(Next(), None, "magnitude", "params=0.6", example=x)
    rows = {row.layer: row for row in result.report.layers}
    assert result.report.met
    for name in ("first", "block.norm", "block.grn", "one"):
        assert rows[name].kept is not None and "over fewer channels now" in rows[name].reason
    width = rows["first"].kept[0]  # type: ignore[index]
    assert result.model.last.normalized_shape == (width,)
    assert result.model.one.num_groups == 1
    result.save(tmp_path / "net.pliant")
    loaded = pliant.load(tmp_path / "net.pliant", Next())
    assert torch.equal(loaded.eval()(x), result.model(x))


def test_norms_stay_whole_where_other_channels_can_leave() -> None:
    """What is proven exactly goes first."""
    net = nn.Sequential(
        nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)
    )
    groups, _ = cuttable(net, (torch.randn(2, 8),))
    assert [group.name for group in groups] == ["2"]


def test_a_cut_past_a_norm_that_computes_something_else_is_refused() -> None:
    """The rest is compared as if every channel were by itself."""
    net = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 4))
    first, other = tuple(range(8)), tuple(range(8, 16))
    edits = [Prune("0", "out", first, 16), Prune("1", "channels", first, 16)]
    prove(net, (torch.randn(2, 8),), [*edits, Prune("3", "in", first, 16)])
    with pytest.raises(EditError, match="computes something else"):
        prove(net, (torch.randn(2, 8),), [*edits, Prune("3", "in", other, 16)])
