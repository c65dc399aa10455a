"""Layers of all kinds in low rank: what they compute, cost, save, train and export."""

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
from pliant.edits import Factor, Plain, from_json, replay, to_json
from pliant.families.lowrank.cuts import add_nuclear, cut
from pliant.files.onnx import to_onnx
from pliant.math import forms
from pliant.nn import kinds
from pliant.nn.attention import SplitAttention
from pliant.nn.factorized import TransposedRow
from pliant.surgery.plain import plain

Net = Callable[[], nn.Module]


def transposed(axes: int, **more: Any) -> nn.Module:
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[axes - 1]
    return kind(8, 6, 3, stride=2, padding=1, output_padding=1, **more)


CASES = [
    (axes, form)
    for axes in (1, 2, 3)
    for form in ("tucker2", "input", "output", "spatial")
    if axes > 1 or form != "spatial"
]


@pytest.mark.parametrize(("axes", "form"), CASES)
def test_transposed_convolutions_are_their_factors_at_full_rank(axes: int, form: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(transposed(axes), nn.ReLU()), torch.randn(2, 8, *[5] * axes)
    wanted, before = model(x), layer_costs(model, (x,))["0"]
    edit = Factor("0", form, forms.max_ranks(tuple(kinds.kernel(model[0]).shape), form))
    predicted = edit.predict(before)
    edit.apply(model)
    assert isinstance(model[0], TransposedRow)
    assert torch.allclose(model(x), wanted, atol=1e-4)
    after = cost(model, (x,))
    assert (after.params, after.macs) == (predicted.params, predicted.macs)


@pytest.mark.parametrize("form", ["tucker2", "input", "output", "spatial"])
def test_rows_of_transposed_convolutions_take_the_size_of_the_output(form: str) -> None:
    torch.manual_seed(0)
    holder = nn.Sequential(nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1))
    x = torch.randn(2, 8, 5, 4)
    wanted = holder[0](x, output_size=(10, 8))
    Factor("0", form, forms.max_ranks((6, 8, 3, 3), form)).apply(holder)
    assert torch.allclose(holder[0](x, output_size=(10, 8)), wanted, atol=1e-4)


def test_a_table_is_its_factors_at_full_rank() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Embedding(20, 6, padding_idx=3)), torch.randint(0, 20, (2, 5))
    wanted, before = model(x), layer_costs(model, (x,))["0"]
    edit = Factor("0", "svd", (6,))
    predicted = edit.predict(before)
    edit.apply(model)
    assert torch.allclose(model(x), wanted, atol=1e-5)
    after = cost(model, (x,))
    assert (after.params, after.macs) == (predicted.params, predicted.macs)
    assert model(torch.tensor([[3]])).abs().max() == 0
    model(torch.tensor([[3]])).sum().backward()
    assert model[0][0].weight.grad[3].abs().max() == 0


def test_a_table_is_fitted_to_the_rows_that_are_looked_up() -> None:
    """Two common rows are kept exactly at rank two; plain factors keep the large ones."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(40, 8), nn.Flatten(), nn.Linear(16, 3))
    with torch.no_grad():
        model[0].weight[2:] *= 2
    x = torch.randint(0, 2, (64, 2))
    wanted = model[0].weight[:2].clone()
    lost = {}
    for samples in (0, 64):
        data = (x, torch.randint(0, 3, (64,)))
        method = f"energy(samples={samples}, only=['0'])"
        result = pliant.compress(model, data, method, "params=0.6")
        assert "svd" in {row.form for row in result.report.layers}
        lost[samples] = float((result.model[0](torch.tensor([0, 1])) - wanted).norm())
    assert lost[64] < 0.5 * lost[0]


def test_factors_of_reversed_weights_carry_the_momentum() -> None:
    torch.manual_seed(0)
    for layer in (nn.Embedding(20, 6), transposed(2)):
        holder = nn.Sequential(layer)
        momentum = torch.randn(layer.weight.shape)
        form = "svd" if layer.weight.dim() == 2 else "input"
        replaced = Factor("0", form, (3,)).apply(holder)
        parts = [p.weight for p in holder[0]]
        assert replaced.project is not None
        found = replaced.project(momentum)
        kernels = [kinds.kernel(p).detach().requires_grad_() for p in holder[0]]
        whole = forms.compose(kernels, form)
        turned = momentum.transpose(0, 1).reshape(whole.shape)
        wanted = torch.autograd.grad((whole * turned).sum(), kernels)
        for part, mine, other in zip(holder[0], found, wanted, strict=True):
            assert mine.shape == part.weight.shape
            assert torch.allclose(kinds.kernel(part, mine), other, atol=1e-5)
        assert len(parts) == len(found)


# ---------------------------------------------------------------- plain layers


class Renamed(nn.Linear):
    """A class of its own that computes what a Linear does, as some libraries have it."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype), self.bias)


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class Noisy(nn.Linear):
    """The same in evaluation only."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + (torch.ones(()) if self.training else 0)


class Standardized(nn.Conv2d):
    """A convolution whose weight is standardized, and scaled by a gain, at every call."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        std = self.weight.std((1, 2, 3), keepdim=True)
        weight = (self.weight - mean) / std * self.gain
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class Same(nn.Conv2d):
    """Pads by what the size of the input asks for, which a plain convolution cannot."""

    def forward(self, x: Tensor) -> Tensor:
        more = x.shape[-1] % 2
        return super().forward(F.pad(x, (more, 0, more, 0)))


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, **options)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0]).mean(1)


def test_layers_that_compute_as_plain_ones_do_become_these() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Renamed(8, 8), Scaled(8, 8), Noisy(8, 8), Renamed(8, 8, bias=False))
    x = torch.randn(4, 8)
    wanted, first = model(x), model[0].weight
    edits = plain(model, (x,))
    assert [edit.layer for edit in edits] == ["0", "3"]
    assert model[0].__class__ is Renamed
    replay(model, edits)
    assert [type(layer) for layer in model] == [nn.Linear, Scaled, Noisy, nn.Linear]
    assert torch.equal(model(x), wanted) and model[0].weight is first


def test_standardized_convolutions_become_plain_with_the_weight_in_use() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Standardized(3, 8, 3, padding=1), nn.ReLU(), Same(8, 4, 3, stride=2))
    x = torch.randn(2, 3, 8, 8)
    wanted, edits = model(x), plain(model, (x,))
    assert [edit.layer for edit in edits] == ["0"]
    replay(model, edits)
    assert type(model[0]) is nn.Conv2d and type(model[2]) is Same
    assert torch.allclose(model(x), wanted, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"batch_first": True},
        {"bias": False},
        {"kdim": 6, "vdim": 5},
        {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
    ],
)
@pytest.mark.parametrize("needed", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_split_attention_is_the_packed_one(
    options: dict[str, Any], *, needed: bool, masked: bool
) -> None:
    torch.manual_seed(0)
    packed = nn.MultiheadAttention(8, 2, **options).eval()
    for parameter in packed.parameters():
        nn.init.normal_(parameter)
    split = SplitAttention(packed).eval()
    first = options.get("batch_first", False)
    q, k, v = (
        torch.randn(3, size, width)
        for size, width in zip(
            (4, 5, 5), (8, options.get("kdim", 8), options.get("vdim", 8)), strict=True
        )
    )
    given = [each if first else each.transpose(0, 1) for each in (q, k, v)]
    masks: dict[str, Any] = {}
    if masked:
        padding = torch.zeros(3, 5, dtype=torch.bool)
        padding[:, 4] = True
        masks = {"attn_mask": torch.randn(4, 5), "key_padding_mask": padding}
    for average in (True, False):
        asked = {**masks, "need_weights": needed, "average_attn_weights": average}
        wanted, found = packed(*given, **asked), split(*given, **asked)
        assert torch.allclose(found[0], wanted[0], atol=1e-5)
        assert (found[1] is None) == (wanted[1] is None)
        if needed:
            assert torch.allclose(found[1], wanted[1], atol=1e-5)


def test_split_attention_takes_one_sample_and_masks_of_heads() -> None:
    torch.manual_seed(0)
    packed = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    split, x = SplitAttention(packed).eval(), torch.randn(3, 5, 8)
    assert torch.allclose(split(x[0], x[0], x[0])[0], packed(x[0], x[0], x[0])[0], atol=1e-6)
    heads = torch.rand(6, 5, 5) > 0.7
    heads[:, :, 0] = False
    wanted, found = (m(x, x, x, attn_mask=heads)[0] for m in (packed, split))
    assert torch.allclose(found, wanted, atol=1e-6)


def test_transformer_blocks_run_with_split_attention() -> None:
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model, x = nn.TransformerEncoder(block, 2).eval(), torch.randn(3, 5, 8)
    wanted, edits = model(x), plain(model, (x,))
    assert [edit.layer for edit in edits] == ["layers.0.self_attn", "layers.1.self_attn"]
    replay(model, edits)
    assert torch.allclose(model(x), wanted, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(model(x), wanted, atol=1e-5)


# ---------------------------------------------------------------- from end to end


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(100, 16), nn.Linear(16, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.table(tokens).mean(1))


def _gpt() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    assert transformers
    return nn.Sequential(Conv1D(24, 16), nn.ReLU(), Conv1D(3, 24))


NETS: dict[str, tuple[Net, Callable[[], Tensor]]] = {
    "transposed": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(12, 16, 3, 2, 1),
            nn.ReLU(),
            nn.ConvTranspose2d(16, 8, 4, 2, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 3),
        ),
        lambda: torch.randn(32, 12, 4, 4),
    ),
    "table": (Tokens, lambda: torch.randint(0, 100, (32, 7))),
    "flipped": (_gpt, lambda: torch.randn(32, 16)),
    "attention": (lambda: Attention(batch_first=True), lambda: torch.randn(32, 6, 8)),
    "renamed": (
        lambda: nn.Sequential(Renamed(16, 24), nn.ReLU(), Renamed(24, 3)),
        lambda: torch.randn(32, 16),
    ),
    "standardized": (
        lambda: nn.Sequential(
            Standardized(3, 16, 3),
            nn.ReLU(),
            Standardized(16, 16, 3),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, 3),
        ),
        lambda: torch.randn(32, 3, 8, 8),
    ),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize(
    "method",
    ["energy(form='auto')", "energy(form='auto', samples=32, reconstruct=32)", "nrmf", "evbmf"],
)
def test_all_kinds_are_factorized_saved_and_loaded(name: str, method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, draw = NETS[name]
    model, x = net(), draw()
    data = (x, torch.randint(0, 3, (len(x),)))
    result = pliant.compress(model, data, method, "params=0.8")
    assert result.report.met
    found = result.model.eval()(x)
    result.save(tmp_path / "net.pliant")
    loaded = pliant.load(tmp_path / "net.pliant", net()).eval()
    assert torch.allclose(loaded(x), found, atol=1e-6)
    assert any(isinstance(edit, Factor) for edit in result.edits)


def test_plain_edits_are_data() -> None:
    edits = [Plain("a.b")]
    assert from_json(to_json(edits)) == edits


@pytest.mark.parametrize("name", NETS)
def test_all_kinds_are_exported_in_low_rank(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    net, draw = NETS[name]
    x = draw()
    data = (x, torch.randint(0, 3, (len(x),)))
    result = pliant.compress(net(), data, "energy(form='auto')", "params=0.8")
    path = tmp_path / "net.onnx"
    to_onnx(result.model, path, (x[:2],))
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path))
    [given] = session.get_inputs()
    found = session.run(None, {given.name: x[:1].numpy()})[0]
    assert torch.allclose(torch.from_numpy(found), result.model.eval()(x[:1]), atol=1e-4)


@pytest.mark.parametrize("name", ["transposed", "table", "flipped", "attention"])
def test_all_kinds_train_on_in_low_rank(name: str) -> None:
    torch.manual_seed(0)
    net, draw = NETS[name]
    x = draw()
    data = (x, torch.randint(0, 3, (len(x),)))
    train = pliant.Train(epochs=2)
    for method in ("energy", "nrmf(form='tucker2')"):
        result = pliant.compress(net(), data, method, "params=0.8", train=train)
        assert result.report.met and result.model(x).isfinite().all()


@pytest.mark.parametrize("method", ["trp(interval=1, form='spatial')", "trp", "cuttlefish"])
def test_kernels_with_their_inputs_first_are_factorized_while_they_train(method: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.up = nn.Embedding(20, 16), nn.ConvTranspose2d(16, 12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(self.table(x)[:, :, None, None]).mean((2, 3))

    torch.manual_seed(0)
    data = pliant.Data(train=(torch.arange(40) % 20, torch.arange(40) % 12))
    train = pliant.Train(epochs=2, batch=20)
    result = pliant.compress(Net(), data, method, "params=0.6", train=train)
    assert result.report.met
    assert "up" in {row.layer for row in result.report.layers if row.ranks}


@pytest.mark.parametrize("layer", [nn.Embedding(20, 16), nn.ConvTranspose2d(16, 12, 3)])
def test_cuts_reach_weights_with_their_inputs_first(layer: Any) -> None:
    before = kinds.kernel(layer).detach().flatten(1).clone()
    layer.weight.grad = torch.zeros_like(layer.weight)
    add_nuclear(layer, "output", 1.0)
    pull = kinds.kernel(layer, layer.weight.grad).flatten(1)
    u, _, v = torch.linalg.svd(before, full_matrices=False)
    assert torch.allclose(pull, u @ v, atol=1e-4)  # of the nuclear norm
    cut(layer, "output", 0.5)
    after = kinds.kernel(layer).detach().flatten(1)
    rank = int(torch.linalg.matrix_rank(after, rtol=1e-4))
    assert rank < min(before.shape)
    assert torch.allclose(after, u[:, :rank] @ u[:, :rank].T @ before, atol=1e-4)
