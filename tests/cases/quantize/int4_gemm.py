"""Products of 4-bit codes: exact, blocked, and what a network of them computes."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.budget import Budget
from pliant.cost import layer_costs
from pliant.data import Data
from pliant.edits import Multiply
from pliant.errors import EditError, MethodError, ModelError
from pliant.families.quantize.simulate import Rounded, extent, weight_codes
from pliant.math.gemm import (
    accumulator,
    affine,
    codes,
    deepest,
    opened,
    panel_bytes,
    panels,
    product,
)
from pliant.methods.quantize.int4_gemm import Int4Gemm
from pliant.nn import kinds
from pliant.nn.product import Affine, Product
from pliant.run import Run, start
from pliant.testing import Case
from pliant.testing.toys import TOYS
from tests.cases.witness import on_many

WAYS = (False, True)  # compiled loops, where numba is installed, and plain PyTorch


def random(*shape: int, most: int = 16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, most, shape, generator=generator).to(torch.uint8)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def multiplied(left: Tensor, right: Tensor, bits: int = 4, **options: Any) -> Tensor:
    return product(left, panels(right, 8, bits), bits, **options)[:, : len(right)]


# ---------------------------------------------------------------- 1. exactness


def products_are_those_of_whole_numbers() -> None:
    """Odd depths, K = 1, one over and one under the bound, rows that fill no panel."""
    for rows, columns in ((1, 1), (5, 3), (24, 8), (25, 9), (64, 16), (70, 17)):
        for depth in (1, 7, 290, 291, 292, 1000):
            left, right = random(rows, depth), random(columns, depth, seed=1)
            wanted = left.long() @ right.long().T
            for plain in WAYS:
                assert torch.equal(multiplied(left, right, plain=plain).long(), wanted)


def other_widths_take_the_same_path() -> None:
    for bits in (2, 3, 5, 6, 7, 8):
        left, right = (random(9, 301, most=2**bits, seed=seed) for seed in (0, 1))
        for plain in WAYS:
            found = multiplied(left, right, bits, plain=plain)
            assert torch.equal(found.long(), left.long() @ right.long().T)


def dequantized_products_are_those_of_real_numbers() -> None:
    """s_a s_b [sum a b - z_b r - z_a c + K z_a z_b] = (s_a (A - z_a)) (s_b (B - z_b))."""
    for depth in (1, 7, 290, 291, 292, 1000):
        for zero_a, zero_b in ((0, 0), (3, 8), (15, 11)):
            left, right = random(26, depth), random(9, depth, seed=1)
            layer = nn.Linear(depth, 9, bias=False)
            real = (right.double() - zero_b) * 0.02
            values = Affine(real.float(), torch.tensor([0.02]), zero_b, None, (0.3, zero_a))
            built = Product(layer, 4, channels=False, values=values)
            assert torch.equal(built.levels(), right.float())
            x = (left.double() - zero_a) * 0.3
            wanted = x @ real.T
            found = built(x.float()).double()
            assert (found - wanted).abs().max() <= 1e-5 * max(1.0, float(wanted.abs().max()))


def codes_are_those_of_torch() -> None:
    """A range is widened to hold zero, zero has a code, and rounding is torch's own."""
    x = noise(500)
    for low, high in ((-1.5, 2.0), (0.2, 3.0), (-4.0, -1.0), (0.0, 1.0)):
        scale, zero = affine(low, high, 4)
        assert scale == pytest.approx((max(high, 0) - min(low, 0)) / 15) and 0 <= zero <= 15
        level = codes(x, torch.tensor(scale), torch.tensor(zero), 4)
        found = (level.float() - zero) * torch.tensor(scale)
        assert torch.equal(found, torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, 15))
        assert float(codes(torch.zeros(1), torch.tensor(scale), torch.tensor(zero), 4)) == zero
    assert affine(0.0, 0.0, 4) == (1.0, 0)


# ---------------------------------------------------------------- 2. the bound


def the_bound_of_sixteen_bits_is_tight() -> None:
    """291 products of 15 x 15 make 65,475; the next one wraps around to 164."""
    assert (deepest(4), deepest(8), deepest(8, 32)) == (291, 1, 66051)
    assert (accumulator(4), accumulator(7), accumulator(8)) == (16, 16, 32)
    for plain in WAYS:
        for depth, block, found in ((291, 292, 65475), (292, 292, 164), (292, 0, 65700)):
            full = torch.full((1, depth), 15, dtype=torch.uint8)
            assert multiplied(full, full, block=block, plain=plain).item() == found
        full = torch.full((1, 292), 15, dtype=torch.uint8)
        assert multiplied(full, full, block=292, sums=32, plain=plain).item() == 65700


def a_layer_deeper_than_sums_of_32_bits_is_refused() -> None:
    """At 8 bits 33,025 products fit; at 4 bits a hundred times as many."""
    model = nn.Sequential(nn.Linear(33100, 2))
    with pytest.raises(EditError, match="more than sums of 32 bits"):
        Multiply("0", 8, channels=False).apply(model)
    Multiply("0", 4, channels=False).apply(model, weights=False)


# ---------------------------------------------------------------- 3. layers


LAYERS: tuple[tuple[Any, tuple[int, ...]], ...] = (
    (lambda: nn.Conv2d(6, 10, 3, stride=2, padding=1, dilation=2, groups=2), (3, 6, 11, 9)),
    (lambda: nn.Conv2d(6, 6, 3, padding="same", groups=6), (2, 6, 5, 7)),
    (lambda: nn.Conv2d(3, 8, 3, padding=(2, 0), bias=False), (2, 3, 5, 7)),
    (lambda: nn.Conv1d(4, 9, 5, padding=2, padding_mode="reflect"), (2, 4, 12)),
    (lambda: nn.Conv3d(2, 5, (1, 3, 3), padding=(0, 1, 1)), (2, 2, 3, 5, 5)),
    (lambda: nn.Conv2d(3, 8, 3, padding=1), (3, 6, 5)),
    (lambda: nn.Linear(37, 10), (2, 5, 37)),
    (lambda: nn.Linear(37, 10), (37,)),
)


def layer_of(dense: Any, x: Tensor, bits: int = 4, *, channels: bool = False) -> Any:
    scales, zero = weight_codes(dense.weight, bits, channels=channels)
    bias = None if dense.bias is None else dense.bias.detach()
    seen = affine(float(x.min()), float(x.max()), bits)
    values = Affine(dense.weight.detach(), scales, zero, bias, seen)
    model = nn.Sequential(copy.deepcopy(dense))
    groups = getattr(dense, "groups", 1)
    Multiply("0", bits, channels, groups, values).apply(model)
    return model[0]


def layers_are_those_of_fake_quantization() -> None:
    """Stride, padding, dilation, groups; around images stands the code of zero, which is not 0."""
    for build, shape in LAYERS:
        torch.manual_seed(0)
        dense, x = build(), noise(*shape)
        for bits, channels in ((4, False), (4, True), (8, True)):
            found = layer_of(dense, x, bits, channels=channels)
            assert 0 < int(found.input_zero) < 2**bits - 1
            weight = Rounded(bits, torch.zeros(2), channels=channels)(dense.weight)
            assert torch.equal(found.weight, weight)
            wanted = kinds.applied(dense, found.rounded(x), weight, dense.bias)
            assert torch.allclose(found(x), wanted, atol=1e-4)


def padding_is_the_code_of_zero() -> None:
    """An image of -1 reads as code 0 inside, and as the code of zero around it."""
    dense = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    dense.weight.data.fill_(1.0)
    found = layer_of(dense, torch.tensor([-1.0, 2.0]))
    assert int(found.input_zero) == 5
    met = found(torch.full((1, 1, 3, 3), -1.0))[0, 0]
    counts = torch.tensor([[4.0, 6, 4], [6, 9, 6], [4, 6, 4]])
    assert torch.allclose(met, -counts, atol=1e-5)


def gradients_pass_to_what_is_in_range() -> None:
    dense = nn.Linear(3, 2)
    found = layer_of(dense, torch.tensor([-1.0, 1.0]))
    x = torch.tensor([[0.2, -0.4, 5.0]], requires_grad=True)
    found(x).sum().backward()
    wanted = found.weight.sum(0) * torch.tensor([1.0, 1.0, 0.0])
    assert x.grad is not None and torch.allclose(x.grad[0], wanted)
    with pytest.raises(ModelError, match="no number"):
        found(torch.tensor([[0.0, math.nan, 0.0]]))


# ---------------------------------------------------------------- 4. size


def packed_weights_take_half_a_byte() -> None:
    """ceil(K/2) N bytes, columns filled up to eight: a half of int8, an eighth of float32."""
    for columns, depth in ((16, 27), (13, 9), (64, 576)):
        filled = -(-columns // 8) * 8
        matrix = random(columns, depth)
        packed = panels(matrix, 8, 4)
        assert packed.numel() == panel_bytes(columns, depth, 8, 4) == -(-depth // 2) * filled
        assert torch.equal(opened(packed, columns, depth, 4), matrix)
    assert panel_bytes(64, 576, 8, 4) * 2 == panel_bytes(64, 576, 8, 8) == 64 * 576
    model = nn.Sequential(nn.Conv2d(16, 24, 3, groups=2))
    row = layer_costs(model, (torch.zeros(1, 16, 5, 5),))["0"]
    predicted = Multiply("0", 4, channels=False, groups=2).predict(row)
    assert predicted.bytes == 2 * 16 * 36 + 4 + 24 * 4 + 12 + 24 * 4  # codes, offsets, bias


# ---------------------------------------------------------------- options


def run_of(spec: Int4Gemm, model: nn.Module, x: Tensor, steps: int = 0) -> Run:
    labels = torch.arange(len(x)) % 4
    return start(model, spec, data=Data((x, labels), classes=4), steps=steps)


def rows() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(32, 32) for _ in range(4)))


def bits_are_those_asked_for() -> None:
    for spec, wanted in (
        (Int4Gemm(samples=8), [8, 4, 4, 8]),
        (Int4Gemm(bits=5, ends=6, samples=8), [6, 5, 5, 6]),
        (Int4Gemm(bits=3, ends=0, samples=8), [3, 3]),
    ):
        run = run_of(spec, rows(), noise(16, 32))
        run.finish()
        assert [edit.bits for edit in run.edits] == wanted  # type: ignore[attr-defined]
    assert run.reasons["0"] == "the first and the last layer were to stay in floating point"
    with pytest.raises(MethodError, match="ends must be 0 or int in 2..8"):
        run_of(Int4Gemm(ends=1), rows(), noise(16, 32))
    with pytest.raises(MethodError, match="needs inputs"):
        start(rows(), Int4Gemm(), example=(noise(1, 32),))


def scales_are_of_the_layer_or_of_channels() -> None:
    for scales, many in (("layer", 1), ("channel", 32)):
        run = run_of(Int4Gemm(scales=scales, samples=8), rows(), noise(16, 32))  # type: ignore[arg-type]
        run.finish()
        assert len(run.model[1].scales) == many  # type: ignore[index]


def ranges_follow_what_is_read() -> None:
    """Calibration: a moving mean over batches of 64; training: over its batches."""
    x = torch.cat([noise(64, 32), 3 * noise(64, 32, seed=1)])
    for samples, momentum, within in ((64, 0.9, 1.0), (128, 0.9, 1.0), (128, 0.5, 0.98)):
        spec = Int4Gemm(samples=samples, momentum=momentum, within=within)
        run = run_of(spec, rows(), x, steps=1)
        wanted: Tensor | None = None
        for batch in run.inputs(samples, batch=64):
            seen = extent(batch[0], within)
            wanted = seen if wanted is None else wanted.lerp(seen, 1 - momentum)
        first: Any = run.model[0]  # type: ignore[index]
        assert wanted is not None
        held = first.parametrizations.weight[0].seen
        assert torch.allclose(held, wanted)
        run.model.train()(x[64:])
        assert torch.allclose(held, wanted.lerp(extent(x[64:], within), 1 - momentum))
        run.model.eval()(10 * x)
        assert torch.allclose(held, wanted.lerp(extent(x[64:], within), 1 - momentum))
        run.finish()
        scale, zero = affine(*held.tolist(), 8)
        assert float(run.model[0].input_scale) == pytest.approx(scale)  # type: ignore[index]


def training_rounds_weights_and_inputs() -> None:
    """What trains is what ships: the same outputs before and after it becomes codes."""
    x = noise(64, 32)
    run = run_of(Int4Gemm(samples=64), rows(), x, steps=2)
    optimizer = torch.optim.SGD(run.model.parameters(), 0.1)
    for _ in range(2):
        F.cross_entropy(run.model.train()(x), torch.arange(64) % 4).backward()
        optimizer.step()
    trained = run.model.eval()(x).detach()
    run.finish()
    assert torch.allclose(run.model(x), trained, atol=1e-4)
    assert not torch.equal(run.model[1].weight, rows()[1].weight)  # type: ignore[index]


def a_budget_chooses_eight_or_four() -> None:
    toy, found = TOYS["bare"], []
    for share in (0.34, 0.26):
        run = start(toy.model(), Int4Gemm(samples=16), Budget(bytes=share), data=toy.data())
        run.finish()
        found.append([edit.bits for edit in run.edits])  # type: ignore[attr-defined]
    assert sum(found[1]) < sum(found[0]) and set(found[0]) <= {4, 8}


def layers_are_chosen_by_name_and_kind() -> None:
    model = nn.Sequential(nn.ConvTranspose1d(4, 8, 3), nn.Conv1d(8, 16, 3), nn.Conv1d(16, 16, 3))
    run = run_of(Int4Gemm(samples=8, only=("0", "1")), model, noise(16, 4, 9))
    run.finish()
    assert [edit.layer for edit in run.edits] == ["1"]
    assert run.reasons["0"] == "its class ConvTranspose1d is no product of two matrices"
    assert run.reasons["2"] == "not selected"
    run = run_of(Int4Gemm(samples=8, exclude=("1",)), rows(), noise(16, 32))
    run.finish()
    assert [edit.layer for edit in run.edits] == ["0", "2", "3"]


CASES = [
    Case(
        "int4_gemm",
        spec="int4_gemm(samples=16)",
        variants=(
            "int4_gemm(samples=16, bits=8, scales='channel')",
            "int4_gemm(samples=16, bits=3, ends=0, within=0.99, momentum=0.5)",
        ),
        witnesses={
            "samples": on_many("int4_gemm", "samples"),
        },
        own=(
            products_are_those_of_whole_numbers,
            other_widths_take_the_same_path,
            dequantized_products_are_those_of_real_numbers,
            codes_are_those_of_torch,
            the_bound_of_sixteen_bits_is_tight,
            a_layer_deeper_than_sums_of_32_bits_is_refused,
            layers_are_those_of_fake_quantization,
            padding_is_the_code_of_zero,
            gradients_pass_to_what_is_in_range,
            packed_weights_take_half_a_byte,
            bits_are_those_asked_for,
            scales_are_of_the_layer_or_of_channels,
            ranges_follow_what_is_read,
            training_rounds_weights_and_inputs,
            a_budget_chooses_eight_or_four,
            layers_are_chosen_by_name_and_kind,
        ),
    )
]
