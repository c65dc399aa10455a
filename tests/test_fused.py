"""Experts whose matrices lie on top of one another in one parameter, in eight bits and fewer."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant import compress, load
from pliant.cost import cost
from pliant.data import Data
from pliant.edits import Pack, replay
from pliant.nn.several import Fused, weights_of

EXPERTS, WIDE, INNER = 4, 16, 40
PTQ = "groupwise_ptq(bits=8, activations=8, groups=0, samples=32, independent=0, joint=0)"


class Experts(nn.Module):
    """Each sample goes to one expert, whose matrices are slices of two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS, INNER, WIDE) / 4)
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDE, INNER) / 6)
        self.offset = nn.Parameter(torch.randn(WIDE))
        self.act = nn.ReLU()

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            rows = chosen == expert
            hidden = self.act(F.linear(x[rows], self.up[expert]))
            out[rows] = F.linear(hidden, self.down[expert]) + self.offset
        return out


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.router = nn.Linear(WIDE, WIDE), nn.Linear(WIDE, EXPERTS)
        self.experts, self.head = Experts(), nn.Linear(WIDE, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.head(hidden + self.experts(hidden, self.router(x).argmax(-1)))


def built() -> tuple[Mixture, Tensor]:
    torch.manual_seed(0)
    return Mixture().eval(), torch.randn(64, WIDE)


def test_experts_are_packed_with_a_scale_for_each_row_saved_and_loaded(tmp_path: Path) -> None:
    model, x = built()
    result = compress(model, Data(train=[x], val=[x]), PTQ)
    row = next(row for row in result.report.layers if row.layer == "experts")
    assert row.form == "w8" and row.after["bytes"] < 0.35 * row.before["bytes"]
    assert result.report.fidelity is not None and result.report.fidelity.error < 0.1
    assert isinstance(result.model.experts, Fused)
    assert result.model.experts.up_scales.shape == (EXPERTS * INNER,)
    assert result.report.after.params == result.report.before.params
    result.save(tmp_path / "a.pliant")
    again = load(tmp_path / "a.pliant", lambda: built()[0]).eval()
    assert torch.equal(again(x), result.model(x))
    assert torch.equal(copy.deepcopy(result.model)(x), result.model(x))


def test_products_of_packed_experts_are_counted_as_before() -> None:
    model, x = built()
    before = cost(model, (x[:1],))
    replay(model, [Pack("experts", 8, 0, False, (160, 2560, 64, 2560))])
    assert cost(model, (x[:1],)).macs == before.macs


def test_packed_experts_are_unpacked_once_in_a_call_and_asked_for_outside_of_it() -> None:
    model, x = built()
    dense = model.experts.up.detach().clone()
    replay(model, [Pack("experts", 8, 0, False, (160, 2560, 64, 2560))])
    experts, counts = model.experts, []
    unpacked = experts.unpacked
    vars(experts)["unpacked"] = lambda packing: counts.append(packing) or unpacked(packing)
    model(x)
    assert len(counts) == 2 and "ready" not in vars(experts)
    assert experts.up.shape == dense.shape
    assert float((experts.up - dense).abs().max()) < 0.02


def test_a_budget_of_bytes_chooses_bits_for_experts() -> None:
    model, x = built()
    method = "groupwise_ptq(activations=0, groups=0, samples=32, independent=0, joint=0)"
    result = compress(model, Data(train=[x], val=[x]), method, "bytes=0.22")
    assert result.report.met
    assert next(e for e in result.edits if e.layer == "experts").bits in (3, 4)


@pytest.mark.parametrize("shape", [(1, 9, 9), (9, 9), (4, 4, 4, 4)])
def test_what_is_no_pile_of_matrices_is_no_expert(shape: tuple[int, ...]) -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(shape))

    class Own(nn.Conv1d):
        pass

    assert weights_of(Other()) == {} and weights_of(Own(4, 4, 3)) == {}


class Standard(nn.Conv2d):
    """Standardizes its weight at every call."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias)


def test_weights_that_a_layer_computes_anew_are_packed_as_it_computes_them() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Standard(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    images = torch.randn(32, 3, 8, 8)
    result = compress(model, Data(train=[images], val=[images]), PTQ)
    assert [row.form for row in result.report.layers] == ["plain+w8a8", "w8a8"]
    assert result.report.fidelity is not None and result.report.fidelity.error < 0.05
