"""Quantization: what the card demands, and its equations done by hand on few numbers."""

import math

import torch
from torch import Tensor, nn

from pliant.cost import layer_costs
from pliant.data import Data
from pliant.edits import Quantize
from pliant.math.quantize import (
    best_range,
    best_scales,
    even_scales,
    grouping,
    integers,
    learnable,
    levels,
    rounded,
)
from pliant.methods.quantize.groupwise_ptq import GroupwisePTQ
from pliant.run import start
from pliant.testing import Case, Toy
from tests.cases.witness import on


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def uneven(channels: int = 32) -> Tensor:
    """A depthwise kernel with batch norms folded in: ranges of channels differ by a hundred."""
    gains = torch.logspace(-1, 1, channels)[torch.randperm(channels, generator=_seeded(1))]
    return noise(channels, 1, 3, 3) * gains.view(-1, 1, 1, 1)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def error(weight: Tensor, index: Tensor, bits: int, candidates: Tensor | None = None) -> float:
    scales = best_scales(weight, index, bits, candidates=candidates)
    return float((weight - rounded(weight, scales[index], bits)).square().sum())


def levels_of_a_group() -> None:
    """At 3 bits and s = 0.5 the levels are -2.0 to 1.5: 1.9 is clipped, 0.3 is nearest to 0.5."""
    weight = torch.tensor([[1.9, 0.3], [-3.0, 0.2]])
    found = rounded(weight, torch.tensor([0.5, 0.5]), 3)
    assert found.tolist() == [[1.5, 0.5], [-2.0, 0.0]]


def limits_of_grouping_are_torchs() -> None:
    """One group is per-tensor, one for every channel per-channel rounding, bit for bit."""
    weight = uneven()
    for bits in (2, 3, 4, 8):
        one, every = (grouping(weight, groups, "range") for groups in (1, 32))
        scale, scales = (best_scales(weight, index, bits) for index in (one, every))
        whole = torch.fake_quantize_per_tensor_affine(
            weight, scale[0], torch.tensor(0, dtype=torch.int32), *levels(bits)
        )
        assert torch.equal(rounded(weight, scale[one], bits), whole)
        zeros = torch.zeros(32, dtype=torch.int32)
        each = torch.fake_quantize_per_channel_affine(weight, scales, zeros, 0, *levels(bits))
        assert torch.equal(rounded(weight, scales[every], bits), each)
        for groups, expected in ((1, whole), (32, each)):  # and the layer that is shipped
            model = nn.Sequential(nn.Conv2d(32, 32, 3, groups=32, bias=False))
            model[0].weight.data = weight.clone()
            Quantize("0", bits, groups, indexed=False).apply(model)
            assert torch.equal(model[0].weight, expected)


def finer_groups_err_less() -> None:
    """Every refinement of groups lowers the error, with scales from the same absolute grid."""
    weight = uneven()
    grid = torch.logspace(-4, 1, 200)[:, None]
    for rule in ("contiguous", "equal"):
        order = grouping(weight, 32, "contiguous")
        if rule == "equal":
            order = torch.empty_like(order)
            order[weight.flatten(1).abs().amax(1).argsort()] = torch.arange(32)
        errors = [error(weight, order * g // 32, 4, grid) for g in (1, 2, 4, 8, 16, 32)]
        assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0] / 2


def ranges_group_better_than_neighbours() -> None:
    weight = uneven()
    by_range, by_place = (error(weight, grouping(weight, 4, r), 4) for r in ("range", "contiguous"))
    assert by_range < by_place
    groups = grouping(weight, 4, "range")
    reach = weight.flatten(1).abs().amax(1)
    for group in range(3):  # runs of the sorted channels, none empty
        assert reach[groups == group].max() <= reach[groups == group + 1].min()


def no_group_is_empty() -> None:
    """Equal ranges, zeros, more groups than channels: each group still has a member."""
    for weight in (torch.ones(7, 3), torch.zeros(5, 2), torch.tensor([[1.0], [1.0], [9.0]])):
        for groups in (1, 2, 3, 100):
            for rule in ("range", "equal", "contiguous"):
                index = grouping(weight, groups, rule)  # type: ignore[arg-type]
                assert sorted(set(index.tolist())) == list(range(min(groups, len(weight))))
                scales = best_scales(weight, index, 4)
                assert torch.isfinite(rounded(weight, scales[index], 4)).all()


def stored_bytes_are_those_of_the_card() -> None:
    """G scales, and ceil(log2 G) bits a channel where groups are not runs of channels."""
    before = layer_costs(
        nn.Sequential(nn.Conv2d(8, 16, 3, bias=False)), (torch.zeros(1, 8, 5, 5),)
    )["0"]
    weights = 16 * 8 * 9 * 4 // 8
    for groups, indexed, extra in ((1, False, 4), (4, False, 16), (16, False, 64)):
        assert Quantize("0", 4, groups, indexed).predict(before).bytes == weights + extra
    assert Quantize("0", 4, 4, True).predict(before).bytes == weights + 16 + 16 * 2 // 8
    assert Quantize("0", 4, 3, True).predict(before).bytes == weights + 12 + 16 * 2 // 8
    assert Quantize("0", 3, 5, True).predict(before).bytes == 16 * 8 * 9 * 3 // 8 + 20 + 6


def gradients_are_those_of_lsq() -> None:
    """At s = 0.5 and levels -2..1: round(v) - v inside, the level at the ends, g = 1/sqrt(n)."""
    x = torch.tensor([0.3, 9.0, -9.0], requires_grad=True)
    scale = torch.tensor(0.5, requires_grad=True)
    found = learnable(x, scale, -2, 1, 4)
    assert found.tolist() == [0.5, 0.5, -1.0]
    found.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [1.0, 0.0, 0.0]
    assert scale.grad is not None
    assert math.isclose(float(scale.grad), ((1 - 0.6) + 1 - 2) / math.sqrt(4 * 1), rel_tol=1e-6)


def activations_get_unsigned_levels_after_a_relu() -> None:
    values = noise(5000)
    scale, zero = best_range(values.relu(), 0.0, float(values.max()), 4)
    assert zero == 0 and 0.3 * float(values.max()) / 15 <= scale <= float(values.max()) / 15
    scale, zero = best_range(values, float(values.min()), float(values.max()), 4)
    assert 5 <= zero <= 10  # about the middle of 0..15
    assert best_range(torch.zeros(3), 0.0, 0.0, 4)[1] == 0


def first_and_last_layers_get_more_bits() -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    run = start(model, GroupwisePTQ(bits=2, activations=0), example=(torch.zeros(1, 64),))
    run.finish()
    assert [edit.bits for edit in run.edits] == [8, 2, 2, 8]  # type: ignore[attr-defined]
    assert [edit.form for edit in run.edits] == ["w8", "w2", "w2", "w8"]


def a_layer_that_packing_would_enlarge_stays() -> None:
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 64), nn.Linear(64, 64))
    run = start(model, GroupwisePTQ(activations=0), example=(torch.zeros(1, 1),))
    run.finish()
    assert run.reasons["0"] == "packed it would take more bytes"
    assert [edit.layer for edit in run.edits] == ["1", "2"]


def one_step_is_that_of_all_layers() -> None:
    """Weights of 1, 3 and 5 in equal numbers: half of their root mean square, sqrt(35 / 3)."""
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(3)))
    with torch.no_grad():
        for weight, value in zip(model.parameters(), (1.0, 3.0, 5.0), strict=True):
            weight.copy_(value * noise(8, 8).sign())
    method = GroupwisePTQ(bits=8, activations=0, groups=1, step=0.5)
    run = start(model, method, example=(torch.zeros(1, 8),))
    run.finish()
    wanted = torch.tensor(0.5 * math.sqrt(35 / 3))
    assert all(torch.allclose(edit.values.scales, wanted) for edit in run.edits)  # type: ignore[attr-defined]
    far = torch.tensor([[0.5, 254.0], [1.0, -1.0]])  # 254 is the last of 127 levels of 2
    assert even_scales(far, torch.tensor([0, 1]), 8, 0.5).tolist() == [2.0, 0.5]


def coarse_levels_take_fewer_bits_than_few() -> None:
    """Of weights with heavy tails: fewer bits than 4-bit ones, and less is lost."""
    weight = noise(64, 64) / noise(64, 64, seed=1).abs().clamp_min(0.1)
    index, lost, bits = torch.zeros(64).int(), [], []
    few = best_scales(weight, index, 4)
    for scales, most in ((few, 4), (even_scales(weight, index, 8, 1.1 * float(few)), 8)):
        codes = integers(weight, scales[index], most)
        counts = codes.unique(return_counts=True)[1] / codes.numel()
        bits.append(float(-(counts * counts.log2()).sum()))
        lost.append(float((weight - rounded(weight, scales[index], most)).square().sum()))
    assert bits[1] < bits[0] and lost[1] < 0.95 * lost[0], (bits, lost)


def _words() -> nn.Module:
    rows = nn.Embedding(64, 64), nn.Flatten(), nn.Linear(256, 4)
    return nn.Sequential(*rows)


_LABELS = torch.arange(16) % 4
WORDS = Toy("words", _words, given=Data((torch.arange(64).view(16, 4), _LABELS), classes=4))


CASES = [
    Case(
        "groupwise_ptq",
        spec="groupwise_ptq(samples=16, independent=1, joint=1, batch=8)",
        variants=(
            "groupwise_ptq(bits=8, activations=8, groups=0, independent=0, joint=1, integer=True)",
            'groupwise_ptq(activations=0, grouping="contiguous", independent=1, joint=0)',
        ),
        witnesses={
            "rows": on(WORDS, "groupwise_ptq(independent=0, joint=0)", "rows"),
        },
        own=(
            levels_of_a_group,
            limits_of_grouping_are_torchs,
            finer_groups_err_less,
            ranges_group_better_than_neighbours,
            no_group_is_empty,
            stored_bytes_are_those_of_the_card,
            gradients_are_those_of_lsq,
            activations_get_unsigned_levels_after_a_relu,
            first_and_last_layers_get_more_bits,
            a_layer_that_packing_would_enlarge_stays,
            one_step_is_that_of_all_layers,
            coarse_levels_take_fewer_bits_than_few,
        ),
    ),
]
