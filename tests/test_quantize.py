"""Quantized layers: how they are stored, folded, divided, fitted, chained and exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant import zoo
from pliant.api import compress, load
from pliant.budget import Budget
from pliant.codecs.packing import pack, packed_bytes, unpack
from pliant.compose import Stage, chain
from pliant.cost import cost
from pliant.data import Data
from pliant.edits import Fold, Quantize, from_json, replay, to_json
from pliant.errors import BudgetError, EditError, MethodError, ModelError
from pliant.files.onnx import to_onnx
from pliant.math.quantize import best_scales, grouping
from pliant.methods.quantize.groupwise_ptq import GroupwisePTQ
from pliant.nn.quantized import Quantized
from pliant.observe.ranges import unread
from pliant.registry import build as method_of
from pliant.run import start
from pliant.surgery.blocks import blocks
from pliant.surgery.fold import foldable
from pliant.surgery.select import readable
from pliant.testing.toys import TOYS

QUICK: dict[str, Any] = {"samples": 16, "independent": 2, "joint": 1, "batch": 8}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def convnet(seed: int = 0) -> nn.Module:
    """Two residual blocks after a stem, with batch norms that have seen something."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = zoo.build("resnet20")
        model.layer1, model.layer2 = nn.Sequential(model.layer1[0]), nn.Identity()
        model.layer3, model.linear = nn.Identity(), nn.Linear(16, 4)
        with torch.no_grad():
            for _ in range(4):
                model.train()(torch.randn(16, 3, 8, 8))
    return model.eval()


def images(count: int = 32, seed: int = 0) -> Data:
    inputs = noise(2 * count, 3, 8, 8, seed=seed)
    labels = torch.arange(2 * count) % 4
    return Data((inputs[:count], labels[:count]), (inputs[count:], labels[count:]), classes=4)


# ---------------------------------------------------------------- packing


@pytest.mark.parametrize("bits", range(1, 9))
def test_packed_numbers_come_back(bits: int) -> None:
    for count in (1, 7, 8, 1001):
        values = torch.randint(0, 2**bits, (count,), generator=torch.Generator().manual_seed(0))
        packed = pack(values, bits)
        assert len(packed) == packed_bytes(count, bits) == -(-count * bits // 8)
        assert torch.equal(unpack(packed, bits, count).long(), values)


def test_a_packed_layer_keeps_no_float_weight() -> None:
    model = nn.Sequential(nn.Linear(64, 32))
    Quantize("0", 2, 4, indexed=True).apply(model)
    state = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert state == {
        "0.bias": (32,),
        "0.integers": (64 * 32 * 2 // 8,),
        "0.scales": (4,),
        "0.index": (32 * 2 // 8,),
    }
    assert cost(model, (torch.zeros(1, 64),)).params == 64 * 32 + 32


def test_groups_of_a_layer_are_those_of_the_weight() -> None:
    model = nn.Sequential(nn.Conv2d(8, 12, 3))
    dense = model[0].weight.detach().clone()
    index = grouping(dense, 4, "range")
    Quantize("0", 3, 4, indexed=True).apply(model)
    layer: Any = model[0]
    assert torch.equal(layer.channel_scales(), best_scales(dense, index, 3)[index])
    assert set(layer.levels().unique().tolist()) <= set(range(-4, 4))


# ---------------------------------------------------------------- folding


class Forked(nn.Module):
    """Batch norms that can be folded, and two that cannot: their input is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.first = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.two, self.second = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.three, self.third = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(self.one(x)))
        x = self.two(x)
        x = self.second(x) + x
        x = F.relu(self.three(x), inplace=True)
        return self.third(x)


def settled(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, nn.BatchNorm2d):
                assert part.running_mean is not None and part.running_var is not None
                part.running_mean.normal_(generator=torch.Generator().manual_seed(1))
                part.running_var.uniform_(0.5, 2, generator=torch.Generator().manual_seed(2))
                part.weight.uniform_(-1, 1, generator=torch.Generator().manual_seed(3))
    return model.eval()


def test_only_what_folds_exactly_is_folded() -> None:
    torch.manual_seed(0)  # with some weights no channel of the last activation is alive
    model, x = settled(Forked()), noise(2, 3, 5, 5)
    before, folds = model(x), foldable(model, (x,))
    assert folds == [Fold("first", "one")]
    replay(model, from_json(to_json(folds)))
    assert torch.allclose(model(x), before, atol=1e-5)
    assert isinstance(model.first, nn.Identity) and model.one.bias is not None
    shapes = Forked()
    replay(shapes, folds, weights=False)
    assert {n: v.shape for n, v in shapes.state_dict().items()} == {
        n: v.shape for n, v in model.state_dict().items()
    }


def test_every_batch_norm_of_a_resnet_folds() -> None:
    model, example = settled(zoo.build("resnet20")), (noise(1, 3, 32, 32),)
    before, folds = model(*example), foldable(model, example)
    assert len(folds) == 19
    replay(model, folds)
    assert torch.allclose(model(*example), before, rtol=0, atol=1e-4 * before.abs().max().item())


# ---------------------------------------------------------------- blocks and stages


def test_blocks_are_residual_blocks_and_lone_layers() -> None:
    model = zoo.build("resnet20")
    found = blocks(model, readable(model)[0], (noise(1, 3, 32, 32),))
    assert found == [
        "conv1",
        *(f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(3)),
        "linear",
    ]
    toy = TOYS["transformer"]
    assert blocks(toy.model(), readable(toy.model())[0], toy.inputs(1)) == [
        "embed",
        "block",
        "head",
    ]


def test_outputs_that_no_layer_reads() -> None:
    """Of a residual block only the second convolution: its output goes into a sum."""
    model = convnet()
    replay(model, foldable(model, (noise(1, 3, 8, 8),)))
    layers = list(readable(model)[0])
    assert unread(model, layers, (noise(1, 3, 8, 8),)) == ["layer1.0.conv2", "linear"]


def test_stage_one_lowers_the_error_of_blocks_on_inputs_held_out() -> None:
    """The whole network may still be better as it was: then it stays so."""
    options = {**QUICK, "samples": 32, "batch": 16, "joint": 0, "independent": 100}
    run = start(convnet(), GroupwisePTQ(bits=3, **options, scale_lr=0.01), data=images())
    run.finish()
    (errors,) = [row["errors"] for row in run.log if row.get("stage") == "independent"]
    before, after = (sum(pair[place] for pair in errors.values()) for place in (0, 1))
    assert after < 0.9 * before
    assert all(pair[1] <= pair[0] for pair in errors.values())


def test_labels_have_no_part_in_it() -> None:
    data = images()
    other = Data((data.train[0], data.train[1].flip(0) * 0), data.val, classes=4)
    first, second = (compress(convnet(), d, GroupwisePTQ(**QUICK)).model for d in (data, other))
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


# ---------------------------------------------------------------- budgets, chains, files


def test_a_budget_chooses_the_bits_of_each_layer() -> None:
    data, found = images(), {}
    for share in (0.24, 0.16):
        result = compress(convnet(), data, GroupwisePTQ(**QUICK), Budget(bytes=share))
        assert result.report.met
        found[share] = [e.bits for e in result.edits if isinstance(e, Quantize)]
    assert sum(found[0.16]) < sum(found[0.24])
    assert all(bits in (8, 4, 3, 2) for row in found.values() for bits in row)
    with pytest.raises(BudgetError, match="least reachable"):
        start(convnet(), GroupwisePTQ(**QUICK), Budget(bytes=0.01), data=data)


def test_after_a_factorization_its_factors_are_quantized(tmp_path: Path) -> None:
    method = chain(Stage(method_of("energy"), Budget(params=0.7)), Stage(GroupwisePTQ(**QUICK)))
    result = compress(convnet(), images(), method)
    factored = {e.layer for e in result.edits if e.form not in ("folded", "w4a4", "w8a8")}
    packed = {e.layer for e in result.edits if isinstance(e, Quantize)}
    assert factored and all(any(p.startswith(f"{name}.") for p in packed) for name in factored)
    back = load(result.save(tmp_path / "chain.pliant"), convnet(seed=1)).eval()
    x = noise(3, 3, 8, 8)
    assert torch.equal(back(x), result.model(x))
    forms = {row.layer: row.form for row in result.report.layers}
    assert forms["bn1"] == "folded" and any("+w" in form for form in forms.values())


def test_what_is_quantized_is_not_quantized_or_factorized_again() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    Quantize("0", 4, 1, indexed=False).apply(model)
    with pytest.raises(EditError, match="already quantized"):
        Quantize("0", 4, 1, indexed=False).apply(model)
    with pytest.raises(ModelError, match="no layer to quantize"):
        start(model, GroupwisePTQ(activations=0), example=(noise(1, 8),))


@pytest.mark.parametrize(
    "edit",
    [
        Quantize("0", 1, 1, False),
        Quantize("0", 9, 1, False),
        Quantize("0", 4, 9, False),
        Quantize("0", 4, 1, True),
        Quantize("0", 4, 1, False, inputs=8),
    ],
)
def test_numbers_that_do_not_fit_are_refused(edit: Quantize) -> None:
    with pytest.raises(EditError):
        edit.apply(nn.Sequential(nn.Linear(8, 8)))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("budget", [None, "bytes=0.3"])
def test_a_network_of_16_bits_stays_one(
    kind: torch.dtype, budget: str | None, tmp_path: Path
) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        rows = [nn.Linear(32, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()]
        return nn.Sequential(*rows, nn.Linear(64, 4)).to(kind)

    inputs = torch.randn(128, 32, generator=torch.Generator().manual_seed(1)).to(kind)
    dense = build().eval()
    data = inputs, dense(inputs).argmax(1)
    result = compress(dense, data, "groupwise_ptq(bits=8, activations=8)", budget)
    found = result.model(inputs)
    assert found.dtype == kind and (found - dense(inputs)).abs().max() < 0.1
    result.save(tmp_path / "a.pliant")
    assert torch.equal(load(tmp_path / "a.pliant", build).eval()(inputs), found)


def test_activations_need_data() -> None:
    with pytest.raises(MethodError, match="pass data, or round weights only"):
        start(convnet(), GroupwisePTQ(), example=(noise(1, 3, 8, 8),))


# ---------------------------------------------------------------- deployment


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
def test_an_export_runs_in_integers(bits: int, tmp_path: Path) -> None:
    """onnxruntime fuses the layers into its integer kernels, and says nearly the same."""
    import onnx
    import onnxruntime

    method = GroupwisePTQ(bits=bits, activations=bits, integer=True, **QUICK)
    model = compress(convnet(), images(), method).model
    done = to_onnx(model, tmp_path / "model.onnx", (noise(2, 3, 8, 8),))
    kinds = [node.op_type for node in onnx.load(done.path).graph.node]
    layers = sum(isinstance(part, Quantized) for part in model.modules())
    assert kinds.count("DequantizeLinear") >= 3 * layers  # input, weight, bias
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(done.path, options)
    if bits == 8:
        fused = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
        assert fused.count("QLinearConv") >= 2 and "QGemm" in fused
    x = noise(16, 3, 8, 8, seed=5)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    wanted = model(x).detach()
    assert float((torch.as_tensor(found) - wanted).abs().mean()) < 0.02 * float(wanted.abs().max())
