"""What data-aware factorization rests on: patches, moments, and the metric made of them."""

import copy

import pytest
import torch
from torch import nn

from pliant.budget import Budget
from pliant.cost import layer_costs
from pliant.data import Data
from pliant.errors import MethodError
from pliant.factorize import look, subjects
from pliant.math import forms
from pliant.math.forms import compose
from pliant.math.metric import Metric
from pliant.method import Method
from pliant.methods.lowrank.energy import Energy
from pliant.methods.lowrank.nrmf import NRMF
from pliant.ops.batchnorm import recalibrate
from pliant.ops.lowrank import damage, losses, options, ranks_at
from pliant.ops.sensitivity import metrics, patches
from pliant.run import start

LAYERS = {
    "plain": (nn.Conv2d(4, 6, 3, padding=1, bias=False), (2, 4, 8, 8)),
    "strided": (nn.Conv2d(4, 6, (3, 5), stride=(2, 1), padding=(1, 2), bias=False), (2, 4, 8, 7)),
    "dilated": (nn.Conv2d(4, 6, 3, dilation=2, bias=False), (2, 4, 9, 8)),
    "same": (nn.Conv2d(4, 6, (2, 3), padding="same", bias=False), (2, 4, 6, 7)),
    "reflect": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", bias=False), (2, 4, 6, 6)),
    "1-d": (nn.Conv1d(4, 6, 5, stride=2, padding=2, bias=False), (2, 4, 15)),
    "3-d": (nn.Conv3d(2, 3, 3, padding=1, bias=False), (2, 2, 4, 5, 6)),
    "linear": (nn.Linear(4, 6, bias=False), (2, 3, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_patches_times_the_kernel_are_the_outputs(name):
    layer, shape = LAYERS[name]
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = patches(layer, inputs) @ layer.weight.flatten(1).T
    expected = layer(inputs)
    if not isinstance(layer, nn.Linear):
        expected = expected.movedim(1, -1)
    assert torch.allclose(found, expected.reshape(-1, expected.shape[-1]), atol=1e-5)


def test_large_maps_are_thinned_out():
    rows = patches(nn.Conv2d(3, 4, 3, padding=1), torch.randn(1, 3, 64, 64))
    assert len(rows) <= 81


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)
    )


def _metrics(model: nn.Module, count: int = 256) -> dict[str, Metric]:
    layers = {"0": model[0], "3": model[3]}
    batches = [(torch.randn(64, 3, 6, 6),) for _ in range(count // 64)]
    return metrics(model, layers, batches, torch.Generator().manual_seed(0))


def test_the_metric_predicts_the_rise_of_the_loss():
    """tr(G E C E^T) / 2 is the mean divergence of a small change of the last layer."""
    model, changed = _network(), _network()
    with torch.no_grad():
        model[3].weight.mul_(0.3)
        change = 1e-2 * torch.randn_like(model[3].weight)
        changed.load_state_dict(model.state_dict())
        changed[3].weight.add_(change)
    torch.manual_seed(1)
    metric = _metrics(model, 2048)["3"]
    inputs = torch.randn(2048, 3, 6, 6)
    logs = [m(inputs).log_softmax(1) for m in (changed, model)]
    rise = torch.nn.functional.kl_div(*logs, log_target=True, reduction="batchmean").item()
    assert metric.outputs is not None
    damage = (metric.outputs @ change @ metric.inputs * change).sum().item() / 2
    assert damage == pytest.approx(rise, rel=0.25)


def test_looking_leaves_the_network_as_it_was():
    model = _network().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _metrics(model)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("form", ["tucker2", "input", "output", "spatial"])
def test_factors_in_the_metric_do_less_damage(form):
    model = _network()
    metric, weight = _metrics(model)["0"], model[0].weight.detach()
    ranks = (2, 3) if form == "tucker2" else (3,)
    assert metric.outputs is not None

    def damage(kernels):
        error = metric.enter(forms.compose(kernels, form) - weight).flatten(1)
        return float((error @ metric.inputs * error).sum())

    aware = metric.decompose(weight, form, ranks)
    assert damage(aware) <= damage(forms.decompose(weight, form, ranks)) * 1.01
    norms = [float(kernel.norm()) for kernel in aware]
    assert max(norms) == pytest.approx(min(norms), rel=1e-4)


def test_losses_fall_from_all_to_nothing():
    weight = torch.randn(6, 4, 3, 3)
    for form in ("tucker2", "input", "output", "spatial"):
        for row in losses(weight, form):
            assert row[0] == 1 and row[-1] == pytest.approx(0, abs=1e-6)
            assert (row.diff() <= 1e-9).all()


def test_tucker2_options_are_those_of_one_energy():
    """Every rung is (R3(p), R4(p)) of one p, and its score is no more than 1 - p."""
    model = nn.Sequential(nn.Conv2d(6, 8, 3))
    cost = layer_costs(model, (torch.randn(1, 6, 5, 5),))["0"]
    weight = model[0].weight
    rows = options("0", weight, cost, allowed=("tucker2",))
    lost = losses(weight, "tucker2")
    assert len(rows) > 3 and rows[0].edit is None
    for row in rows[1:]:
        assert row.edit.ranks == ranks_at(lost, row.score, (6, 8))
        assert row.cost.params < cost.params


def test_exact_scores_are_what_factors_lose():
    """Bounds stay where they are exact, else they fall to the truth at all ranks, and no lower."""
    noise = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 10, 3))
    cost = layer_costs(model, (torch.randn(1, 8, 5, 5),))["0"]
    weight = model[0].weight.detach()
    mix = torch.randn(72, 72, generator=noise) * torch.linspace(1, 0.05, 72)
    metric = Metric(mix @ mix.T / 72, torch.eye(10))
    bounds, exact = (
        options("0", weight, cost, allowed=forms.FORMS, metric=metric, exact=exact)[1:]
        for exact in (False, True)
    )
    assert [row.edit for row in bounds] == [row.edit for row in exact]
    for bound, row in zip(bounds, exact, strict=True):
        kernels = metric.decompose(weight, row.edit.form, row.edit.ranks)
        lost = damage(weight, compose(kernels, row.edit.form), metric) / metric.energy(weight)
        assert row.score <= bound.score
        assert row.score == pytest.approx(lost, rel=0.35, abs=1e-4)
    assert sum(row.score for row in exact) < 0.8 * sum(row.score for row in bounds)


def test_exact_scores_plan_a_better_network():
    """At equal parameters less is lost, of what the metrics say, than with bounds."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)
    )
    smooth = nn.functional.avg_pool2d(torch.randn(64, 3, 14, 14), 5, 1)
    data = Data((smooth, torch.randn(64, 16, 4, 4)))
    seen = look(run := start(model, Method(), data=data), layers := subjects(run), 64)
    lost = []
    for exact in (False, True):
        energy = Energy(form="auto", samples=64, exact=exact)
        edits = start(copy.deepcopy(model), energy, Budget(params=0.1), data=data).edits
        near = {edit.layer: compose(edit.kernels, edit.form) for edit in edits}
        lost.append(sum(damage(layers[n].weight.detach(), near[n], seen[n]) for n in near))
    assert lost[1] < 0.95 * lost[0]


@pytest.mark.parametrize("method", [Energy(exact=True), NRMF(exact=True, samples=0)])
def test_exact_scores_need_inputs(method):
    with pytest.raises(MethodError, match="samples=0 looks at none: set samples=1024"):
        start(
            nn.Sequential(nn.Conv2d(3, 4, 3)), method, example=(torch.zeros(1, 3, 8, 8),), steps=4
        )


def test_recalibration_restores_spoiled_statistics():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
    inputs = torch.randn(512, 3, 6, 6)
    model[1].running_mean.fill_(7.0)
    momentum = model[1].momentum
    model.eval()
    assert recalibrate(model, [(part,) for part in inputs.split(128)]) == 1
    outputs = model[0](inputs)
    assert torch.allclose(model[1].running_mean, outputs.mean((0, 2, 3)), atol=1e-4)
    assert torch.allclose(model[1].running_var, outputs.var((0, 2, 3)), rtol=2e-2)
    assert model[1].momentum == momentum and not model.training and not model[1].training


def test_an_activation_in_place_changes_no_gradient():
    model, other = _network(), _network()
    other[1] = nn.ReLU(inplace=True)
    torch.manual_seed(1)
    plain = _metrics(model, 64)
    torch.manual_seed(1)
    inplace = _metrics(other, 64)
    assert torch.allclose(plain["0"].outputs, inplace["0"].outputs)


def test_frozen_layers_are_seen_and_stay_frozen():
    model, frozen = _network(), _network().requires_grad_(False)
    torch.manual_seed(1)
    expected = _metrics(model, 64)
    torch.manual_seed(1)
    found = _metrics(frozen, 64)
    assert all(torch.allclose(expected[n].outputs, found[n].outputs) for n in expected)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


@pytest.mark.parametrize("sizes", [(), (1,)])
def test_without_batches_the_statistics_stay(sizes):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model[1].running_mean.fill_(7.0)
    recalibrate(model, [(torch.randn(size, 3),) for size in sizes])
    assert (model[1].running_mean == 7).all() and model[1].momentum == 0.1


def test_a_short_last_batch_does_not_count():
    """One sample has no variance, and a few would weigh as much as a whole batch."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    inputs = torch.randn(65, 3)
    recalibrate(model, [(part,) for part in inputs.split(32)])
    assert torch.allclose(model[1].running_mean, model[0](inputs[:64]).mean(0), atol=1e-5)


def test_reconstruction_brings_the_outputs_nearer_to_the_dense_ones():
    import copy

    from pliant.ops.edits import Factor
    from pliant.ops.reconstruct import reconstruct

    torch.manual_seed(0)
    dense = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False), nn.Flatten(),
        nn.Linear(8 * 16, 5),
    )  # fmt: skip
    model = copy.deepcopy(dense)
    for edit in (Factor("0", "spatial", (4,)), Factor("2", "tucker2", (3, 3))):
        edit.apply(model)
    batches = [(torch.randn(32, 3, 6, 6),) for _ in range(4)]
    fresh = torch.randn(256, 3, 6, 6)

    def gap() -> float:
        return (model(fresh) - dense(fresh)).square().mean().item()

    before = gap()
    reconstruct(dense, model, ["0", "2"], batches)
    assert gap() < 0.9 * before
    assert not any(module._forward_hooks for module in model.modules())


def test_reconstruction_of_a_full_rank_layer_changes_nothing():
    import copy

    from pliant.ops.edits import Factor
    from pliant.ops.reconstruct import reconstruct

    dense = nn.Sequential(nn.Linear(6, 4), nn.ReLU())
    model = copy.deepcopy(dense)
    Factor("0", "svd", (4,)).apply(model)
    inputs = torch.randn(64, 6)
    reconstruct(dense, model, ["0"], [(inputs,)])
    assert torch.allclose(model(inputs), dense(inputs), atol=1e-4)
