"""Factors in the place of weights, features of sequences, and the network made of both."""

from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pliant
from pliant.cost import cost, module_cost
from pliant.data import Data
from pliant.edits import Swap
from pliant.errors import EditError, ModelError
from pliant.math import cp
from pliant.methods.layers.space_time_tensor import SpaceTimeTensor
from pliant.nn.sequences import STDTNN, OuterFusion, SpatioTemporalFeatures
from pliant.nn.tensors import CPLinear
from pliant.run import Run, start
from pliant.testing import Case, Toy
from tests.cases.witness import on

SHAPES = ((6, 7), (4, 5, 3), (3, 4, 2, 5))


def noise(*shape: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=random, dtype=torch.float64)


def contractions_are_products_with_the_dense_weight() -> None:
    """As tensorly builds it; gradients too; of orders 2 to 4 and ranks 1 to 4."""
    tensorly = pytest.importorskip("tensorly")
    for shape in SHAPES:
        for rank in (1, 2, 3, 4):
            for dtype, near in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
                torch.manual_seed(0)
                layer = CPLinear(shape, 3, rank).to(dtype)
                rows = [
                    tensorly.cp_to_tensor(
                        (
                            np.ones(rank),
                            [f[unit].detach().double().numpy().T for f in layer.factors],
                        )
                    )
                    for unit in range(3)
                ]
                weight = torch.tensor(np.stack(rows)).flatten(1)
                x = noise(2, 4, layer.in_features).to(dtype)
                wanted = x.double() @ weight.T + layer.bias.double()  # type: ignore[union-attr]
                assert torch.allclose(layer(x).double(), wanted, atol=near)
    layer = CPLinear(SHAPES[1], 3, 2).double()
    x, pull = noise(5, 60), noise(5, 3, seed=1)
    found = torch.autograd.grad((layer(x) * pull).sum(), [*layer.factors])
    dense = F.linear(x, layer.weight, layer.bias)
    wanted_pulls = torch.autograd.grad((dense * pull).sum(), [*layer.factors])
    assert all(torch.allclose(a, b) for a, b in zip(found, wanted_pulls, strict=True))


def outer_products_are_never_built() -> None:
    for shape, rank in zip(SHAPES, (2, 3, 1), strict=True):
        layer = CPLinear(shape, 3, rank).double()
        parts = [noise(4, size, seed=size) for size in shape]
        whole = parts[0]
        for part in parts[1:]:
            whole = (whole[:, :, None] * part[:, None]).flatten(1)
        assert torch.allclose(layer.of_outer(parts), layer(whole))
    features = noise(3, 2, 4)
    fused = OuterFusion()(features)
    one = torch.ones(3, 1, dtype=torch.float64)
    left, right = (torch.cat([features[:, at], one], 1) for at in (0, 1))
    assert torch.allclose(fused, (left[:, :, None] * right[:, None]).flatten(1))
    assert OuterFusion(append_one=False)(features).shape == (3, 16)
    with pytest.raises(ModelError, match="of_outer"):
        OuterFusion()(noise(1, 9, 4))


def sizes_are_those_of_the_formula() -> None:
    for p, c, q, h, r, k in ((2, 3, 3, 16, 1, 4), (3, 5, 2, 7, 3, 2)):
        for energy in (True, False):
            model = STDTNN(p, c, k, filters=q, hidden=h, rank=r, energy=energy)
            wanted = h * r * p * (q + energy + 1) + k * h + k + p * c * q
            assert sum(n.numel() for n in model.parameters()) == wanted
            assert model(torch.randn(5, p, c, 20)).shape == (5, k)
    model = STDTNN(2, 3, 4, fusion="stack", temporal=5, steps=20)
    assert model(torch.randn(5, 2, 3, 20)).shape == (5, 4)
    assert [*model.hidden.shape] == [2, 3, 3] and model.features.temporal is not None
    with pytest.raises(ModelError, match="number of steps"):
        STDTNN(2, 3, 4, temporal=5)


def stacked_covariances_by_hand() -> None:
    torch.manual_seed(0)
    model, x = STDTNN(2, 3, 4, filters=2, fusion="stack"), torch.randn(5, 2, 3, 20)
    moved = x - x.mean(3, keepdim=True)
    y = torch.einsum("pcq,npct->npqt", model.features.spatial, moved)
    spread = torch.einsum("npqt,nprt->npqr", y, y)
    trace = torch.einsum("npqq->np", spread)
    inner = model.hidden((spread / trace[:, :, None, None]).flatten(1))
    assert torch.allclose(model(x), model.classify(inner.tanh()), atol=1e-5)


def full_rank_is_any_linear_layer() -> None:
    linear = nn.Linear(42, 5).double()
    x = noise(3, 42)
    for rank in (6, 9):
        found = CPLinear.from_linear(linear, (6, 7), rank)
        assert torch.allclose(found(x), linear(x)) and found.bias is linear.bias
    best = CPLinear.from_linear(linear, (6, 7), 2)
    rows = linear.weight.detach().reshape(5, 6, 7)
    lost = (best.weight.reshape(5, 6, 7) - rows).square().sum((1, 2))
    assert torch.allclose(lost, torch.linalg.svdvals(rows)[:, 2:].square().sum(1))
    parts = [noise(5, 2, size, seed=size) for size in (4, 3, 5)]
    with torch.no_grad():
        made = nn.Linear(60, 5).double()
        made.weight.copy_(cp.dense(parts).flatten(1))
    near = CPLinear.from_linear(made, (4, 3, 5), 2)
    assert (near.weight - made.weight).norm() < 1e-2 * made.weight.norm()
    for shape, rank in (((6, 8), 1), ((42,), 1), ((6, 7), 0), ((6, 7), 99)):
        with pytest.raises(EditError):
            CPLinear.from_linear(linear, shape, rank)


def costs_are_counted() -> None:
    for shape, rank in (((6, 7), 1), ((4, 5, 3), 2)):
        model = nn.Sequential(nn.Linear(int(np.prod(shape)), 8))
        x = torch.zeros(1, 3, int(np.prod(shape)))
        before = module_cost(model, (x,), "0")
        edit = Swap("0", "cp", {"shape": shape, "rank": rank})
        said = edit.predict(before)
        edit.apply(model)
        found = cost(model, (x,))
        assert (found.params, found.macs, found.bytes) == (said.params, said.macs, said.bytes)
        assert found.params == 8 * rank * sum(shape) + 8
        left = sum(int(np.prod(sorted(shape)[: at + 1])) for at in range(len(shape)))
        assert found.macs == 3 * 8 * rank * left
        back = Swap("0", "cp_dense", {"bias": True})
        wanted, dense = model(x), back.predict(module_cost(model, (x,), "0"))
        back.apply(model)
        assert type(model[0]) is nn.Linear and torch.allclose(model(x), wanted)
        assert (before.params, before.macs, before.bytes) == (dense.params, dense.macs, dense.bytes)


def sequences(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two sensors of three axes: which axis moves, and how much, says the class."""
    labels = torch.arange(count) % 4
    x = noise(count, 2, 3, 40, seed=seed).float() + 5 * noise(count, 2, 3, 1, seed=seed + 1).float()
    axis, strong = labels % 2, 1 + 2 * (labels // 2)
    for number in range(count):
        x[number, :, axis[number]] *= 3
        x[number] *= strong[number]
    return x, labels


def features_are_log_variances_of_common_spatial_patterns() -> None:
    """As scipy solves the generalized problem, up to sign, length and a constant."""
    x, labels = sequences(24)
    x, labels = x.double(), labels % 2
    features = SpatioTemporalFeatures(2, 3, 2, energy=False, eps=0).double().fit_init(x, labels)
    moved = x - x.mean(3, keepdim=True)
    spread = moved @ moved.mT
    spread = spread / spread.diagonal(dim1=2, dim2=3).sum(2)[:, :, None, None]
    found = features(x)
    for modality in (0, 1):
        own = [spread[labels == k, modality].mean(0).numpy() for k in (0, 1)]
        one, two = (s + 1e-3 * np.trace(s) / 3 * np.eye(3) for s in own)
        values, vectors = scipy.linalg.eigh(one, one + two)
        chosen = torch.tensor(vectors[:, [np.argmax(values), np.argmin(values)]])
        ours = features.spatial[modality].detach()
        assert torch.allclose(ours.abs(), chosen.abs(), atol=1e-6)
        y = chosen.T @ moved[:, modality]
        power = y.var(2, correction=0)
        wanted = (power / power.sum(1, keepdim=True)).log()
        assert torch.allclose(found[:, modality], wanted, atol=1e-6)
    with_energy = SpatioTemporalFeatures(2, 3, 2, eps=0).double()
    with_energy.spatial = features.spatial
    total = (features.spatial.mT @ moved).square().mean(3).sum(2, keepdim=True).log()
    assert torch.allclose(with_energy(x)[:, :, 2:], total)
    for wrong in ((x, labels * 0), (x[:, :, :1], labels)):
        with pytest.raises(ModelError, match="no more filters than channels"):
            SpatioTemporalFeatures(2, wrong[0].shape[2], 2).fit_init(*wrong)
    assert SpatioTemporalFeatures(2, 3, 2)(torch.zeros(1, 2, 3, 9)).isfinite().all()


def it_learns_from_few_samples() -> None:
    """With five sequences of each class, better than a dense layer on raw ones; 246 numbers."""
    x, labels = sequences(20)
    torch.manual_seed(0)
    ours, raw = STDTNN(2, 3, 4), nn.Sequential(nn.Flatten(), nn.Linear(240, 4))
    ours.features.fit_init(x, labels)
    test, wanted = sequences(80, seed=7)
    right = []
    for model, lr in ((ours, 2e-2), (raw, 1e-3)):
        optimizer = torch.optim.Adam(model.parameters(), lr)
        for _ in range(150):
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels).backward()
            optimizer.step()
        right.append(float((model(test).argmax(1) == wanted).float().mean()))
    assert sum(p.numel() for p in ours.parameters()) == 246
    assert right[0] >= 0.9 > right[1], right


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 5 * 6, 10)),
        *(nn.ReLU(), nn.Linear(10, 4)),
    )


def begun(method: SpaceTimeTensor) -> Run:
    return start(network(), method, example=(torch.randn(1, 3, 5, 6),))


def modes_are_those_of_the_map() -> None:
    run = begun(SpaceTimeTensor(rank=2))
    taken = {edit.layer: dict(edit.spec) for edit in run.edits if isinstance(edit, Swap)}
    assert taken == {"3": {"shape": (4, 5, 6), "rank": 2}}
    assert run.reasons["5"] == "outer products would have as many weights"
    assert run.reasons["0"] == "not a Linear"
    taken = {e.layer: e.spec["shape"] for e in begun(SpaceTimeTensor()).edits}  # type: ignore[attr-defined]
    assert taken == {"3": (4, 5, 6), "5": (2, 5)}
    with pytest.raises(ModelError, match="see rank"):
        begun(SpaceTimeTensor(rank=8))


def what_takes_fewer_products_is_multiplied_out() -> None:
    x = torch.randn(4, 3, 5, 6)
    for fold, kind in (("params", CPLinear), ("macs", nn.Linear)):
        run = begun(SpaceTimeTensor(rank=2, fold=fold))  # type: ignore[arg-type]
        wanted = run.model(x)
        run.finish()
        layer: Any = run.model.get_submodule("3")
        assert type(layer) is kind and torch.allclose(run.model(x), wanted, atol=1e-5)


def a_trained_head_stays_near() -> None:
    x, labels = sequences(48)
    model = nn.Sequential(nn.Flatten(), nn.Linear(240, 24), nn.ReLU(), nn.Linear(24, 4))
    data = Data(train=(x.abs(), labels), val=(x.abs(), labels))
    train = pliant.Train(epochs=20, batch=16, lr=0.01, optimizer="adamw", device="cpu")
    report = pliant.compress(model, data, "space_time_tensor(rank=2)", train=train).report
    assert report.after.params < 0.5 * report.before.params
    accuracy = report.after.accuracy
    assert accuracy is not None and accuracy > 0.8, accuracy


def _wide() -> nn.Module:
    rows = nn.Flatten(), nn.Linear(108, 64), nn.ReLU(), nn.Linear(64, 48), nn.Linear(48, 4)
    return nn.Sequential(*rows)


WIDE = Toy("wide", _wide, (3, 6, 6))


CASES = [
    Case(
        "space_time_tensor",
        variants=("space_time_tensor(fold='macs')",),
        refuses={"single": "linear layers that become smaller"},
        witnesses={
            "rank": on(WIDE, "space_time_tensor", "rank"),
            "only": on(WIDE, "space_time_tensor", "only"),
            "exclude": on(WIDE, "space_time_tensor", "exclude"),
        },
        own=(
            contractions_are_products_with_the_dense_weight,
            outer_products_are_never_built,
            sizes_are_those_of_the_formula,
            stacked_covariances_by_hand,
            full_rank_is_any_linear_layer,
            costs_are_counted,
            features_are_log_variances_of_common_spatial_patterns,
            it_learns_from_few_samples,
            modes_are_those_of_the_map,
            what_takes_fewer_products_is_multiplied_out,
            a_trained_head_stays_near,
        ),
    )
]
