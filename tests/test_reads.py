"""Second moments in few numbers say the same as the whole matrix does."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from pliant.edits import Factor
from pliant.families.lowrank import options
from pliant.families.lowrank.losses import losses
from pliant.math import forms
from pliant.math.metric import Metric
from pliant.math.moments import dampen
from pliant.math.reads import Alike, Diagonal, Gram, Reads, Rows
from pliant.math.svd import strongest
from pliant.observe import moments
from pliant.observe.moments import Gathered, metrics, patches


def _draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(
    "reads",
    [
        Rows(_draw(5, 12)),
        Alike(_draw(7, 4).T @ _draw(7, 4), 3),
        Diagonal(torch.arange(12), 24.0),
    ],
)
def test_few_numbers_say_what_the_matrix_says(reads: Reads) -> None:
    weight, dense = _draw(6, 12), Gram(reads.dense().double())
    assert reads.size == dense.size == 12
    assert reads.energy(weight) == pytest.approx(dense.energy(weight), rel=1e-5)
    if isinstance(reads, Diagonal):  # positive as it is
        expected = weight.double() @ dense.moments @ weight.double().T
    else:
        expected = dense.outer(weight)
    assert torch.allclose(reads.outer(weight), expected, rtol=1e-4)
    if not isinstance(reads, Diagonal):
        assert torch.allclose(reads.channels(3).double(), dense.channels(3), rtol=1e-4, atol=1e-5)


def test_factors_in_few_rows_are_those_in_the_matrix() -> None:
    weight, rows, outputs = _draw(6, 40), _draw(9, 40), torch.diag(torch.arange(1.0, 7))
    few, whole = Metric(Rows(rows), outputs), Metric(rows.T @ rows, outputs)
    for mine, other in zip(
        few.decompose(weight, "svd", (3,)), whole.decompose(weight, "svd", (3,)), strict=True
    ):
        assert torch.allclose(mine.abs(), other.abs(), rtol=1e-3, atol=1e-4)
    lost = [
        losses(weight, ("svd",), m)["svd"].at([(r,) for r in range(1, 6)]) for m in (few, whole)
    ]
    assert lost[0] == pytest.approx(lost[1], abs=1e-5)


def test_outputs_that_are_more_than_inputs_take_the_small_side() -> None:
    weight, reads = _draw(50, 8), Gram(_draw(20, 8).T @ _draw(20, 8))
    metric = Metric(reads.moments)
    error = weight - forms.compose(metric.decompose(weight, "svd", (4,)), "svd")
    lost = losses(weight, ("svd",), metric)["svd"].at([(4,)])[0]
    kept = weight.double() @ dampen(reads.moments.double()) @ weight.double().T
    assert reads.energy(error) / float(kept.trace()) == pytest.approx(lost, rel=2e-2)


def test_a_diagonal_of_sensitivities_scales_outputs_apart() -> None:
    weight, outputs = _draw(6, 12), torch.arange(1.0, 7)
    apart, whole = (Metric(torch.eye(12), each) for each in (outputs, torch.diag(outputs)))
    assert torch.allclose(apart.enter(weight), whole.enter(weight), atol=1e-5)
    assert torch.allclose(apart.leave(apart.enter(weight)), weight, atol=1e-5)


def test_few_directions_of_a_large_matrix_hold_as_much_as_the_best() -> None:
    root = _draw(800, 800) * torch.linspace(1, 0.05, 800)
    matrix = (root @ root.T).double()
    found, best = strongest(matrix, 80), torch.linalg.eigh(matrix)[1][:, -80:].flip(1)
    held = [float((basis.T @ matrix @ basis).trace()) for basis in (found, best)]
    assert torch.allclose(found.T @ found, torch.eye(80).double(), atol=1e-9)
    left = float(matrix.trace()) - held[1]
    assert held[1] - held[0] < 2e-3 * left
    assert torch.equal(found, strongest(matrix, 80))


def test_wide_layers_keep_samples_and_narrow_ones_the_matrix() -> None:
    wide, narrow = nn.Linear(40, 3), nn.Linear(4, 3)
    gathered = Gathered({"wide": wide, "narrow": narrow, "unused": nn.Linear(2, 2)})
    x = _draw(8, 40)
    for part in x.split(4):
        gathered.see("wide", part)
        gathered.see("narrow", part[:, :4].contiguous())
    found = gathered.reads()
    assert isinstance(found["wide"], Rows) and isinstance(found["narrow"], Gram)
    assert torch.allclose(found["wide"].dense(), x.T @ x, atol=1e-4)
    assert torch.allclose(found["narrow"].dense(), x[:, :4].T @ x[:, :4], atol=1e-4)
    assert "unused" not in found
    gathered.see("wide", _draw(30, 40))  # more samples than half of the inputs
    assert isinstance(gathered.reads()["wide"], Gram)


def test_samples_of_the_widest_layers_are_thinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "MOST", 32)
    gathered, x = Gathered({"wide": nn.Linear(40, 3)}), _draw(400, 40)
    for part in x.split(20):
        gathered.see("wide", part)
    found = gathered.reads()["wide"]
    assert isinstance(found, Rows) and len(found.rows) <= 40
    assert float(found.rows.square().sum()) == pytest.approx(float(x.square().sum()), rel=0.2)


def test_layers_that_read_one_tensor_share_its_products(monkeypatch: pytest.MonkeyPatch) -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(6, 6) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = x.relu()
            return self.q(x) + self.k(x) * self.v(x)

    made: list[int] = []
    whole = moments.self_product
    monkeypatch.setattr(moments, "self_product", lambda m: made.append(1) or whole(m))
    model = Three()
    layers = {name: layer for name, layer in model.named_children()}
    x = _draw(64, 6)
    found = metrics(model, layers, [(x,)], torch.Generator().manual_seed(0))
    assert len(made) == 1 + 3  # of what they read, and of each one's gradients
    assert found["q"].seen is found["k"].seen is found["v"].seen
    rows = patches(model.q, x.relu())
    for metric in found.values():
        assert torch.allclose(metric.inputs, rows.T @ rows / 64, atol=1e-5)


def test_layers_that_read_one_tensor_at_first_part_where_they_read_others() -> None:
    layers = {name: nn.Linear(4, 4) for name in ("q", "k", "v")}
    gathered, (both, one, other, last) = Gathered(layers), _draw(4, 9, 4).unbind()
    for name in layers:
        gathered.see(name, both)
    gathered.see("q", one)
    gathered.see("q", other)
    gathered.see("k", other)
    gathered.see("v", last)
    gathered.see("q", last)
    found = gathered.reads()
    wanted = {"q": [both, one, other, last], "k": [both, other], "v": [both, last]}
    for name, parts in wanted.items():
        rows = torch.cat(parts)
        assert torch.allclose(found[name].dense(), rows.T @ rows, atol=1e-4)


def test_gradients_of_enough_samples_are_all_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "PULLED", 8)
    layer, x = nn.Linear(4, 4), _draw(32, 4)
    recorded: list[bool] = []
    layer.register_forward_hook(lambda *args: recorded.append(torch.is_grad_enabled()))
    generator = torch.Generator().manual_seed(0)
    found = metrics(layer, {"": layer}, [(part,) for part in x.split(4)], generator)[""]
    assert recorded == [True, True, *[False] * 6]
    assert torch.allclose(found.inputs, x.T @ x / 32, atol=1e-5)
    whole = metrics(layer, {"": layer}, [(x[:8],)], generator)[""]
    assert found.outputs is not None and whole.outputs is not None
    ratio = float(found.outputs.trace() / whole.outputs.trace())
    assert 0.3 < ratio < 3  # a mean over the samples that gave them


def test_roots_of_few_gradients_are_those_of_the_whole_matrix() -> None:
    rows, weight = _draw(6, 40), _draw(40, 12)
    low, whole = (Metric(torch.eye(12), each) for each in (Rows(rows), rows.T @ rows))
    change, other = (m.enter(weight).double() for m in (low, whole))
    assert torch.allclose(change.T @ change, other.T @ other, rtol=1e-4, atol=1e-3)
    assert torch.allclose(low.leave(low.enter(weight)), weight, atol=1e-4)
    factors = [forms.compose(m.decompose(weight, "svd", (5,)), "svd") for m in (low, whole)]
    assert torch.allclose(*factors, atol=1e-4)


def test_gradients_of_few_samples_by_many_outputs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = nn.Linear(4, 40), _draw(12, 4)
    batches = [(part,) for part in x.split(4)]
    found = []
    for few in (8, 1024):
        monkeypatch.setattr(moments, "FEW", few)
        generator = torch.Generator().manual_seed(0)
        found.append(metrics(layer, {"": layer}, batches, generator)[""].outputs)
    assert isinstance(found[0], Rows) and isinstance(found[1], Tensor)
    assert torch.allclose(found[0].dense(), found[1], atol=1e-5)
    generator = torch.Generator().manual_seed(0)
    monkeypatch.setattr(moments, "FEW", 8)
    many = metrics(layer, {"": layer}, [*batches, *batches], generator)[""].outputs
    assert isinstance(many, Tensor)


def test_factors_are_the_same_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU())
    layers = {name: model.get_submodule(name) for name in ("0", "2")}
    edits = [Factor(name, "svd", (3,)) for name in layers]
    found = []
    for lean in (2**30, 0):
        monkeypatch.setattr(options, "LEAN", lean)
        generator = torch.Generator().manual_seed(0)
        seen = metrics(model, layers, [(_draw(40, 12),)], generator)  # type: ignore[arg-type]
        found.append(options.with_kernels(edits, layers, seen))  # type: ignore[arg-type]
        kept = [name for m in seen.values() for name in (*vars(m), *vars(m.seen)) if "root" in name]
        assert bool(kept) == bool(lean)
    for one, other in zip(*found, strict=True):
        assert all(map(torch.equal, one.kernels, other.kernels))


class _Bytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count what a call gives, as long as it is there."""
        found = func(*args, **(kwargs or {}))
        for tensor in tree_flatten(found)[0]:
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return found

    def _add(self, storage: torch.UntypedStorage) -> None:
        place, size = storage.data_ptr(), storage.nbytes()
        if not size or place in self._known:
            return
        self._known.add(place)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, place, size)

    def _gone(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.now -= size


def test_statistics_of_a_wide_audio_layer_take_few_bytes() -> None:
    layer, last = nn.Conv1d(16, 32, 512, stride=8), nn.Conv1d(32, 4, 1)  # 8,192 inputs
    model = nn.Sequential(layer, nn.ReLU(), last)
    x = _draw(256, 16, 600)
    with _Bytes() as counted:
        batches = [(part,) for part in x.split(8)]
        generator = torch.Generator().manual_seed(0)
        seen = metrics(model, {"0": layer, "2": last}, batches, generator)
        losses(layer.weight, ("tucker2", "input", "output"), seen["0"])
        seen["0"].decompose(layer.weight.detach(), "input", (4,))
        seen["0"].decompose(layer.weight.detach(), "output", (4,))
    assert counted.peak < 2e8  # a matrix of all second moments has 5.4e8 in float64
