"""Layers of all kinds as packed integers: what they compute, answer and cost, saved and loaded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pliant
from pliant.cost import cost, layer_costs
from pliant.data import Data
from pliant.edits import Pack, Quantize, from_json, to_json
from pliant.errors import EditError
from pliant.families.quantize.layers import packable
from pliant.families.quantize.tunable import Tunable
from pliant.files.onnx import to_onnx
from pliant.math.quantize import best_scales, grouping, rounded
from pliant.nn import kinds
from pliant.nn.packed import Bits, Values
from pliant.nn.quantized import Quantized
from pliant.nn.several import KINDS
from pliant.surgery.select import UNCALLED

QUICK = "groupwise_ptq(bits=8, activations=8, independent=2, joint=2, samples=16, batch=8)"


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def numbers(*shape: int, most: int = 50) -> Tensor:
    return torch.randint(1, most, shape, generator=torch.Generator().manual_seed(0))


class Reader(nn.Module):
    """Rows of a table, a recurrent layer over them, and a head: its own table, if they are tied."""

    def __init__(self, kind: Any = nn.LSTM, *, tied: bool = False, **options: Any) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 24)
        self.layer = kind(24, 24, batch_first=True, **options)
        width = (1 + self.layer.bidirectional) * (self.layer.proj_size or 24)
        self.head = nn.Linear(width, 50)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.layer(self.table(words))[0])


class Cells(nn.Module):
    """A cell that is called at every step."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.cell, self.head = kind(8, 24), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in range(x.shape[1]):
            state = self.cell(x[:, step], state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class Attending(nn.Module):
    """Attention between two linear layers."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 32), nn.Linear(32, 4)
        self.attend = nn.MultiheadAttention(32, 4, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        other = y[..., : self.attend.kdim]
        return self.last(self.attend(y, other, other)[0].mean(1))


def generator() -> nn.Module:
    return nn.Sequential(
        *(nn.ConvTranspose2d(16, 32, 4), nn.ReLU()),
        *(nn.ConvTranspose2d(32, 16, 4, 2, 1, groups=2, bias=False), nn.ReLU()),
        *(nn.ConvTranspose2d(16, 3, 4, 2, 1, output_padding=1), nn.Tanh()),
    )


def signals() -> nn.Module:
    return nn.Sequential(nn.ConvTranspose1d(4, 32, 3), nn.ReLU(), nn.ConvTranspose1d(32, 8, 3, 2))


def volumes() -> nn.Module:
    return nn.Sequential(nn.ConvTranspose3d(4, 32, 3), nn.ReLU(), nn.ConvTranspose3d(32, 8, 3))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "transposed": (generator, noise(16, 16, 1, 1)),
    "transposed 1d": (signals, noise(16, 4, 9)),
    "transposed 3d": (volumes, noise(8, 4, 3, 3, 3)),
    "lstm": (lambda: Reader(bidirectional=True, num_layers=2), numbers(16, 7)),
    "lstm with projections": (lambda: Reader(proj_size=8), numbers(16, 7)),
    "gru": (lambda: Reader(nn.GRU, bias=False), numbers(16, 7)),
    "rnn": (lambda: Reader(nn.RNN), numbers(16, 7)),
    "tied": (lambda: Reader(tied=True), numbers(16, 7)),
    "lstm cell": (lambda: Cells(nn.LSTMCell), noise(16, 5, 8)),
    "gru cell": (lambda: Cells(nn.GRUCell), noise(16, 5, 8)),
    "rnn cell": (lambda: Cells(nn.RNNCell), noise(16, 5, 8)),
    "attention": (Attending, noise(16, 5, 8)),
    "attention of other widths": (lambda: Attending(kdim=16, vdim=16), noise(16, 5, 8)),
    "attention with more keys": (
        lambda: Attending(add_bias_kv=True, add_zero_attn=True),
        noise(16, 5, 8),
    ),
}


def built(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    build, x = NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().eval(), x


def batches(x: Tensor) -> Any:
    return Data((x, torch.zeros(len(x)).long())) if x.is_floating_point() else [(x,)]


@pytest.mark.parametrize("name", NETWORKS)
def test_every_kind_is_packed_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model, x = built(name)
    result = pliant.compress(model, batches(x), QUICK)
    report, wanted = result.report, model(x)
    assert not any(row.reason for row in report.layers)
    assert report.after.bytes < 0.4 * report.before.bytes
    assert report.after.macs == report.before.macs and report.after.params == report.before.params
    found = result.model.eval()(x)
    assert float((found - wanted).norm() / wanted.norm()) < 0.03
    back = pliant.load(result.save(tmp_path / "a.pliant"), built(name, seed=1)[0]).eval()
    assert torch.equal(back(x), found) and torch.equal(copy.deepcopy(back)(x), found)
    result.model.train()(x).sum().backward()
    assert not any(type(part) in KINDS for part in result.model.modules())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["transposed", "tied", "gru", "lstm cell", "attention"])
def test_every_kind_is_exported(name: str, tmp_path: Path) -> None:
    """onnxruntime says the same; it starts anew for every network."""
    model, x = built(name)
    small = pliant.compress(model, batches(x), QUICK).model
    done = to_onnx(small, tmp_path / "a.onnx", (x[:2],))
    assert done.max_difference < 0.01


def test_rows_of_weights_are_output_channels() -> None:
    """Each output channel's row holds all that makes it, whatever the kind."""
    for layer, x in (
        (nn.ConvTranspose2d(6, 4, 3, groups=2), noise(1, 6, 4, 4)),
        (nn.ConvTranspose1d(3, 5, 2), noise(1, 3, 4)),
        (nn.Conv2d(4, 6, 3, groups=2), noise(1, 4, 5, 5)),
        (nn.Linear(5, 3), noise(2, 5)),
    ):
        rows = kinds.to_rows(layer, layer.weight.detach())
        assert torch.equal(kinds.from_rows(layer, rows), layer.weight)
        for channel in range(len(rows)):
            gone = rows.clone()
            gone[channel] = 0
            y = kinds.applied(layer, x, kinds.from_rows(layer, gone), None)
            axis = -1 if kinds.channels_last(layer) else 1
            silent = y.movedim(axis, 0).flatten(1).abs().amax(1) == 0
            assert silent.nonzero().flatten().tolist() == [channel]


def test_a_table_has_scales_of_rows_and_unpacks_only_those_looked_up() -> None:
    for bits, groups in ((8, 0), (4, 4), (3, 1)):
        model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 2))
        dense = model[0].weight.detach().clone()
        count = groups or 20
        Quantize("0", bits, count, indexed=1 < count < 20).apply(model)
        index = grouping(dense, count, "range")
        wanted = rounded(dense, best_scales(dense, index, bits)[index], bits)
        table: Any = model[0]
        chosen = torch.tensor([[3, 0], [19, 3]])
        assert torch.equal(table(chosen), wanted[chosen]) and torch.equal(table.weight, wanted)
        assert table.num_embeddings == 20 and table.embedding_dim == 8


def test_tied_weights_stay_tied() -> None:
    """Packed once, counted once, saved once; the head's range is its own."""
    model, x = built("tied")
    result = pliant.compress(model, batches(x), QUICK)
    table: Any = result.model.table
    head: Any = result.model.head
    assert head.keeper is table and torch.equal(head.weight, table.weight)
    assert head.bits.input == 8 and table.bits.input == 0
    packed = 50 * 24 + 4 * 4 + -(-50 * 2 // 8)
    rows = layer_costs(result.model, (x,))
    assert rows["table"].bytes == packed and rows["head"].bytes == 4 * 50 + 8
    edits = from_json(to_json(result.edits))
    assert [e.source for e in edits if isinstance(e, Quantize)] == ["", "table"]
    head.to(torch.float64)
    assert head.keeper is table


def test_a_layer_under_two_names_is_packed_under_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.all = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
            self.body, self.head = self.all[:-1], self.all[-1]

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x))

    model, x = Twice(), noise(16, 8)
    small: Any = pliant.compress(model, (x, torch.arange(16) % 4), QUICK).model
    assert isinstance(small.head, Quantized) and small.all[2] is small.head
    assert small.all[0] is small.body[0] and isinstance(small.body[0], Quantized)


# ---------------------------------------------------------------- answers


def dense_layers() -> list[nn.Module]:
    return [
        nn.Linear(8, 6),
        nn.Conv1d(4, 6, 3, stride=2, padding=1),
        nn.Conv2d(4, 6, 3, dilation=2, groups=2, padding="same", bias=False),
        nn.ConvTranspose2d(4, 6, 3, output_padding=1, stride=2),
        nn.Embedding(9, 6, padding_idx=0),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_and_tuned_layers_answer_as_dense_ones(dtype: torch.dtype) -> None:
    names = ("in_features", "in_channels", "out_channels", "kernel_size", "stride", "padding")
    names += ("dilation", "groups", "padding_mode", "output_padding", "transposed")
    names += ("num_embeddings", "embedding_dim", "padding_idx", "out_features")
    for layer in dense_layers():
        layer.to(dtype).note = "mine"  # type: ignore[assignment]
        rows = kinds.to_rows(layer, layer.weight.detach())  # type: ignore[union-attr]
        index = torch.zeros(len(rows), dtype=torch.long)
        values = Values(layer.weight.detach(), best_scales(rows, index, 8), index)  # type: ignore[union-attr]
        bits = Bits(8, 1, indexed=False)
        for new in (Quantized(layer, bits, values), Tunable(copy.deepcopy(layer), bits, values)):
            asked = [name for name in names if hasattr(layer, name)]
            assert all(getattr(new, name) == getattr(layer, name) for name in (*asked, "note"))
            weight: Any = new.weight
            assert weight.shape == layer.weight.shape and weight.dtype == dtype  # type: ignore[union-attr]
            assert weight.device == layer.weight.device  # type: ignore[union-attr]
            bias, own = getattr(new, "bias", None), getattr(layer, "bias", None)
            assert (bias is None) == (own is None) and (own is None or bias.dtype == dtype)


def test_a_packed_layer_follows_its_network_to_another_type() -> None:
    model = nn.Sequential(nn.Linear(16, 16, bias=False))
    Quantize("0", 8, 1, indexed=False).apply(model)
    assert model.to(torch.bfloat16)[0].weight.dtype == torch.bfloat16


def test_hooks_of_a_layer_go_on() -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    handle = model[0].register_forward_hook(lambda module, inputs, output: 5 * output + 3)
    x, seen = noise(16, 8), []
    result = pliant.compress(model, (x, torch.arange(16) % 4), QUICK)
    wanted = model(x)
    assert float((result.model(x) - wanted).norm() / wanted.norm()) < 0.03
    small: Any = result.model
    copied = small[0].register_forward_hook(lambda *_: seen.append(1))
    small(x)
    copied.remove()
    small(x)
    assert seen == [1] and len(model[0]._forward_hooks) == 1
    handle.remove()


def test_a_weight_that_others_read_is_the_rounded_one() -> None:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.code, self.head = nn.Linear(48, 64), nn.Linear(48, 4)

        def forward(self, x: Tensor) -> Tensor:
            back = nn.functional.linear(self.code(x).relu(), self.code.weight.t())
            return self.head(back.relu())

    torch.manual_seed(0)
    model, x = Decoder().eval(), noise(64, 48)
    result = pliant.compress(model, (x, torch.arange(64) % 4), QUICK)
    wanted = model(x)
    assert float((result.model.eval()(x) - wanted).norm() / wanted.norm()) < 0.03


def test_parts_of_other_types_keep_them() -> None:
    class Mixed(nn.Module):
        """A body of 16 bits behind a cast, and a head of 32."""

        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3))
            self.body.bfloat16()
            self.head = nn.Linear(32, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x.bfloat16()).float().mean((2, 3)))

    torch.manual_seed(0)
    model, x = Mixed().eval(), noise(32, 3, 8, 8)
    result = pliant.compress(model, (x, torch.arange(32) % 4), QUICK)
    small: Any = result.model.eval()
    assert small.body[0].bias.dtype == torch.bfloat16 and small.head.bias.dtype == torch.float32
    assert small.body(x.bfloat16()).dtype == torch.bfloat16
    wanted = model(x)
    assert float((small(x) - wanted).norm() / wanted.norm()) < 0.05


@pytest.mark.parametrize("value", [float("-inf"), float("inf"), float("nan")])
def test_masked_scores_are_no_difference(value: float, tmp_path: Path) -> None:
    """A network that masks a class is fitted by the others, and exported."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 64), nn.Linear(64, 5)

        def forward(self, x: Tensor) -> Tensor:
            mask = torch.tensor([True, False, False, False, False])
            return self.last(self.first(x).relu()).masked_fill(mask, value)

    torch.manual_seed(0)
    model, x = Masked().eval(), noise(64, 8)
    for outputs in ("classes", "values"):
        spec = f"groupwise_ptq(bits=8, activations=8, independent=2, joint=8, outputs='{outputs}')"
        small = pliant.compress(model, (x, 1 + torch.arange(64) % 4), spec).model.eval()
        assert float((small(x) - model(x))[:, 1:].abs().max()) < 0.05
    if value == float("-inf"):
        assert to_onnx(small, tmp_path / "a.onnx", (x[:2],)).max_difference < 0.05


# ---------------------------------------------------------------- reasons


def test_reasons_are_in_the_words_of_this_family() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.both = nn.LayerNorm(8), nn.Bilinear(8, 8, 8)
            self.unused = nn.Linear(8, 8)
            self.scaled = Scaled(8, 8)
            self.same = Same(8, 8)
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
            self.turned = nn.Linear(8, 8, dtype=torch.complex64)
            self.token = nn.Parameter(torch.zeros(1, 8))
            self.table = nn.Embedding(9, 8, max_norm=1.0)

        def forward(self, x: Tensor) -> Tensor:
            x = self.normed(self.same(self.scaled(self.norm(x) + self.token)))
            x = x + self.table(torch.zeros(len(x)).long())
            return self.both(x, x) + self.turned(x.to(torch.complex64)).real

    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    class Same(nn.Linear):
        """As a library does it that only adds a branch for scripts."""

        def forward(self, input: Tensor) -> Tensor:
            return nn.functional.linear(input, self.weight, self.bias)

    found = packable(Odd().eval(), (noise(2, 8),))
    assert list(found.single) == ["same"]
    assert found.reasons == {
        "norm": "it holds no matrix: there is nothing to pack",
        "both": "no packed form does with its weight what Bilinear does",
        "unused": UNCALLED,
        "scaled": "its class Scaled computes something else than Linear does",
        "normed": "its weight is parametrized: remove the parametrization first",
        "turned": "its weight is complex, and levels lie on a line",
        "table": "its rows are scaled to max_norm while they are looked up",
        "": "its class Odd uses tensors of its own in a way of its own",
    }


def test_weights_tied_to_what_stays_stay() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(9, 8), nn.Linear(8, 9)
            self.head.weight = self.table.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.table(x))

    found = packable(Tied(), (torch.tensor([1, 2]),), exclude=("head",))
    assert not found.single and found.reasons["table"] == (
        "its weight is tied to head, which is not packed"
    )


@pytest.mark.parametrize(
    "edit",
    [
        Pack("0", 9, 0, False, (96, 2304)),
        Pack("0", 8, 0, False, (96, 2304)),
        Pack("1", 8, 0, False, (4, 96)),
        Quantize("0", 8, 1, False),
        Quantize("1", 8, 1, False, source="0"),
    ],
)
def test_edits_that_do_not_fit_are_refused(edit: Any) -> None:
    with pytest.raises(EditError):
        edit.apply(nn.Sequential(nn.LSTM(24, 24), nn.Linear(24, 4)))


def test_packing_several_weights_costs_what_it_predicts() -> None:
    for groups, indexed in ((0, False), (4, True), (1, False)):
        model = nn.Sequential(nn.LSTM(24, 24, num_layers=2))
        row = layer_costs(model, (noise(3, 24),))["0"]
        shapes = tuple(n for p in model[0].parameters() if p.dim() == 2 for n in (96, p.numel()))
        edit = Pack("0", 4, groups, indexed, shapes)
        predicted = edit.predict(row)
        (again,) = from_json(to_json([edit]))
        again.apply(model)
        assert predicted == layer_costs(model, (noise(3, 24),))["0"]
        assert cost(model, (noise(3, 24),)).bytes == predicted.bytes


class Positions(nn.Embedding):
    """Looks up by place, two rows on, as learned positions of language models do."""

    def __init__(self) -> None:
        super().__init__(30, 16)

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(torch.arange(tokens.shape[-1]).expand_as(tokens) + 2)


class Placed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.places, self.words = Positions(), nn.Embedding(50, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head((self.places(tokens) + self.words(tokens)).mean(1))


def test_tables_that_look_up_in_a_way_of_their_own_are_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    net, tokens = Placed().eval(), numbers(16, 8)
    result = pliant.compress(net, [tokens], QUICK)
    assert not [row.layer for row in result.report.layers if row.form == "dense"]
    assert result.report.after.bytes < 0.35 * result.report.before.bytes
    assert result.report.fidelity is not None and result.report.fidelity.error < 0.02
    result.save(tmp_path / "a.pliant")
    back = pliant.load(tmp_path / "a.pliant", Placed()).eval()
    assert torch.equal(back(tokens), result.model(tokens))
    monkeypatch.setattr("pliant.nn.several.TABLE", 100)
    large = pliant.compress(net, [tokens], QUICK).report
    (row,) = [row for row in large.layers if row.form == "dense"]
    assert row.layer == "places" and "computes something else than Embedding" in row.reason


# ---------------------------------------------------------------- networks of others


def transformers_networks() -> dict[str, Any]:
    t = pytest.importorskip("transformers")
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    small["intermediate_size"] = 64
    images = {"image_size": 16, "patch_size": 8}
    words = {"vocab_size": 60, "max_position_embeddings": 16}
    return {
        "vit": lambda: t.ViTModel(t.ViTConfig(**small, **images)),
        "dinov2": lambda: t.Dinov2Model(t.Dinov2Config(**small, **images)),
        "clip": lambda: t.CLIPModel(
            t.CLIPConfig(
                text_config={**small, **words, "eos_token_id": 1, "bos_token_id": 0},
                vision_config={**small, **images},
                projection_dim=16,
            )
        ),
        "t5": lambda: t.T5ForConditionalGeneration(
            t.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=2, vocab_size=60)
        ),
        "whisper": lambda: t.WhisperForConditionalGeneration(
            t.WhisperConfig(
                **{f"{side}_{what}": 1 for side in ("encoder", "decoder") for what in ("layers",)},
                **{f"{side}_attention_heads": 2 for side in ("encoder", "decoder")},
                **{f"{side}_ffn_dim": 64 for side in ("encoder", "decoder")},
                **{"d_model": 32, "vocab_size": 60, "num_mel_bins": 8},
                **{"max_source_positions": 10, "max_target_positions": 10},
                **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
                decoder_start_token_id=1,
            )
        ),
        "gpt2": lambda: t.GPT2LMHeadModel(
            t.GPT2Config(
                **{"vocab_size": 60, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 16},
                **{"bos_token_id": 0, "eos_token_id": 1},
            )
        ),
    }


INPUTS: dict[str, Callable[[], dict[str, Tensor]]] = {
    "vit": lambda: {"pixel_values": noise(8, 3, 16, 16)},
    "dinov2": lambda: {"pixel_values": noise(8, 3, 16, 16)},
    "clip": lambda: {
        "input_ids": numbers(4, 8, most=60),
        "pixel_values": noise(4, 3, 16, 16),
    },
    "t5": lambda: {
        "input_ids": numbers(4, 8, most=60),
        "decoder_input_ids": numbers(4, 5, most=60),
    },
    "whisper": lambda: {
        "input_features": noise(4, 8, 20),
        "decoder_input_ids": numbers(4, 5, most=60),
    },
    "gpt2": lambda: {"input_ids": numbers(4, 8, most=60)},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", INPUTS)
def test_networks_that_ask_their_layers(name: str) -> None:
    """They cast by ``weight.dtype`` and pad by ``stride``; transformers takes seconds to load."""
    torch.manual_seed(0)
    model = transformers_networks()[name]().eval()
    x = INPUTS[name]()
    result = pliant.compress(model, [x], QUICK)
    assert result.report.after.bytes < 0.4 * result.report.before.bytes
    wanted, found = model(**x)[0], result.model.eval()(**x)[0]
    assert float((found - wanted).norm() / wanted.norm()) < 0.05


class Shifted(nn.Embedding):
    """A table that its network calls with more than a table takes."""

    def forward(self, size: Any, start: int = 0, places: Any = None) -> Tensor:  # type: ignore[override]
        return super().forward(torch.arange(size) if places is None else places)


class Placing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = Shifted(16, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(x + self.table(None, places=torch.arange(x.shape[1])))
        return out


@pytest.mark.parametrize("most", [None, 100])
def test_a_table_that_is_called_with_more_is_packed_unless_it_is_large(
    most: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if most:
        monkeypatch.setattr("pliant.nn.several.TABLE", most)
    x = torch.randn(32, 5, 8)
    result = pliant.compress(Placing(), x, "groupwise_ptq(independent=1, joint=1)")
    rows = {row.layer: row for row in result.report.layers}
    said = "its class Shifted is called with more than Embedding is"
    wanted = ("dense", said) if most else ("w8", "")
    assert (rows["table"].form, rows["table"].reason) == wanted and not rows["out"].reason
    result.save(tmp_path / "m.pliant")
    with torch.no_grad():
        assert torch.equal(pliant.load(tmp_path / "m.pliant", Placing())(x), result.model(x))


class Borrowing(nn.Module):
    """Multiplies by the weight of a projection that it never calls, as Swin does."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = F.linear(x, self.qkv.weight, self.qkv.bias).chunk(3, -1)
        out: Tensor = self.out((q @ k.transpose(-1, -2)).softmax(-1) @ v)
        return out


def test_a_weight_that_the_module_around_reads_is_packed(tmp_path: Path) -> None:
    x = torch.randn(32, 5, 16)
    result = pliant.compress(Borrowing(), x, "groupwise_ptq(independent=1, joint=1)")
    assert result.report.after.bytes < 0.4 * result.report.before.bytes
    assert result.report.fidelity is not None and result.report.fidelity.error < 0.1
    result.save(tmp_path / "m.pliant")
    with torch.no_grad():
        assert torch.equal(pliant.load(tmp_path / "m.pliant", Borrowing())(x), result.model(x))
