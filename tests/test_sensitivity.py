"""What data-aware factorization rests on: patches, moments, and the metric made of them."""

from statistics import median

import pytest
import torch
from torch import Tensor, nn

import pliant
from pliant.cost import layer_costs
from pliant.families.lowrank.losses import losses
from pliant.families.lowrank.options import options, ranks_at
from pliant.math import forms
from pliant.math.metric import Metric
from pliant.math.moments import channel_moments, dampen
from pliant.math.svd import spectrum
from pliant.observe.moments import metrics, patches
from pliant.surgery.batchnorm import recalibrate
from tests.metrics import smooth

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
    for metric in (None, smooth(6, 4)):
        found = losses(weight, forms.FORMS[:4], metric)
        for form, lost in found.items():
            for side in lost.sides:
                assert side[0] == 1 and (side.diff() <= 1e-9).all()
                assert form == "spatial" or side[-1] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("form", ["input", "spatial"])
def test_losses_end_where_a_form_is_no_longer_smaller(form):
    """And are what they are beside Tucker-2, which needs all ranks of its first layer."""
    weight, metric = torch.randn(6, 8, 3, 3), smooth(6, 8)
    (side,) = losses(weight, [form], metric)[form].sides
    last = len(side) - 1
    assert last < forms.max_ranks(weight.shape, form)[0]
    sizes = [forms.form_params(weight.shape, form, (rank,)) for rank in (last, last + 1)]
    assert sizes[0] < weight.numel() <= sizes[1]
    beside = losses(weight, forms.FORMS[:4], metric)[form].sides[0]
    assert torch.allclose(side, beside[: len(side)], atol=1e-9)


def test_losses_of_a_ladder_are_those_of_its_ranks_one_by_one():
    lost = losses(torch.randn(7, 6, 3, 3), ["tucker2"], smooth(7, 6))["tucker2"]
    ladder = [(3, 2), (1, 1), (6, 7), (3, 5), (2, 2)]
    assert lost.at(ladder) == pytest.approx([lost.at([ranks])[0] for ranks in ladder], abs=1e-9)
    kept = torch.linalg.svdvals(lost.seen[:3].flatten(0, 1))[:2].square().sum()
    assert lost.at([(3, 2)])[0] == pytest.approx(float(1 - kept / lost.seen.square().sum()))


def test_tucker2_options_are_those_of_one_energy():
    """Every rung is (R3(p), R4(p)) of one p, and its score is no more than 1 - p."""
    model = nn.Sequential(nn.Conv2d(6, 8, 3))
    cost = layer_costs(model, (torch.randn(1, 6, 5, 5),))["0"]
    weight = model[0].weight
    rows = options("0", weight, cost, allowed=("tucker2",))
    sides = [spectrum(weight, mode).double().square() for mode in (1, 0)]
    lost = [torch.cat([torch.ones(1), 1 - side.cumsum(0) / side.sum()]) for side in sides]
    assert len(rows) > 3 and rows[0].edit is None
    for row in rows[1:]:
        assert row.edit.ranks == ranks_at(lost, row.score + 1e-6, (6, 8))
        assert row.cost.params < cost.params


@pytest.mark.parametrize("seen", [True, False])
def test_scores_are_what_factors_lose(seen):
    """No option is scored below the loss of its factors, nor much above, whatever its form."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 10, 3))
    cost = layer_costs(model, (torch.randn(1, 8, 5, 5),))["0"]
    weight, metric = model[0].weight.detach(), smooth(10, 8) if seen else None
    rows = options("0", weight, cost, allowed=forms.FORMS, metric=metric)[1:]
    assert {row.edit.form for row in rows} == set(forms.FORMS[:4])
    ratios = {form: [] for form in forms.FORMS[:4]}
    for row in rows:
        lost = _lost(weight, row.edit.form, row.edit.ranks, metric)
        assert 0.999 * lost - 1e-6 <= row.score <= 1.6 * lost + 1e-4
        ratios[row.edit.form].append(row.score / lost)
    assert max(map(median, ratios.values())) < 1.4 * min(map(median, ratios.values()))


def test_a_kernel_of_zeros_loses_everything_or_nothing():
    for lost in losses(torch.zeros(6, 4, 3, 3), forms.FORMS[:4], smooth(6, 4)).values():
        assert lost.at([(2, 2)[: len(lost.sides)]]) == [1]


@pytest.mark.parametrize("form", ["input", "spatial", "tucker2"])
def test_losses_are_those_of_one_pass(form):
    """Without a sweep the factors lose just that, at every rank."""
    weight, metric = torch.randn(7, 6, 3, 3), smooth(7, 6)
    lost = losses(weight, [form], metric)[form]
    for rank in (1, 2, 4, 5):
        ranks = (rank, 3)[: len(lost.sides)]
        kernels = forms.decompose(weight, form, ranks, moments=metric.inputs, sweeps=0)
        once = metric.energy(weight - forms.compose(kernels, form)) / metric.energy(weight)
        (at,) = lost.at([ranks])
        assert once <= at * 1.001 + 1e-9
        assert at == pytest.approx(once, rel=0.05, abs=1e-9)


def test_large_kernels_are_swept_less_and_the_largest_by_channels(monkeypatch):
    """What is cheaper loses more, but far less than whitening channels did where patches can be."""
    weight, metric = torch.randn(8, 6, 3, 3), smooth(8, 6)
    ends = _lost(weight, "spatial", (5,), metric)
    monkeypatch.setattr("pliant.math.metric.SETTLING", 10)
    brief = _lost(weight, "spatial", (5,), metric)
    for module in ("math.metric", "families.lowrank.losses"):
        monkeypatch.setattr(f"pliant.{module}.WHOLE", 10)
    channels = _lost(weight, "spatial", (5,), metric)
    assert ends <= brief < 1.2 * ends < channels
    # As if the positions of a patch were uncorrelated, their losses are exact.
    moments = channel_moments(dampen(metric.inputs.double()), 9)
    kernels = forms.decompose(weight, "input", (3,), moments=moments)
    expected = forms.relative_error(weight, forms.compose(kernels, "input"), moments)
    found = losses(weight, ["input"], metric)["input"]
    assert found.at([(3,)]) == pytest.approx([expected], rel=1e-3)


def _lost(weight: Tensor, form: str, ranks: tuple[int, ...], metric: Metric | None) -> float:
    if metric is None:
        kernels = forms.decompose(weight, form, ranks)
        return forms.relative_error(weight, forms.compose(kernels, form))
    near = forms.compose(metric.decompose(weight, form, ranks), form)
    return metric.energy(weight - near) / metric.energy(weight)


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

    from pliant.edits import Factor
    from pliant.families.lowrank.refit import reconstruct

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

    from pliant.edits import Factor
    from pliant.families.lowrank.refit import reconstruct

    dense = nn.Sequential(nn.Linear(6, 4), nn.ReLU())
    model = copy.deepcopy(dense)
    Factor("0", "svd", (4,)).apply(model)
    inputs = torch.randn(64, 6)
    reconstruct(dense, model, ["0"], [(inputs,)])
    assert torch.allclose(model(inputs), dense(inputs), atol=1e-4)


class Keyed(nn.Module):
    """Calls its layers by keyword, and not in the order in which they are defined."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(12, 4)
        self.first = nn.Linear(12, 12)
        self.never = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(input=self.first(input=x).relu())


def test_layers_called_by_keyword_are_seen():
    from pliant.observe.order import order

    model, x = Keyed(), torch.randn(8, 12)
    layers = {"second": model.second, "first": model.first}
    assert order(model, (x,), list(layers)).called == ("first", "second")
    seen = metrics(model, layers, [(x,)], torch.Generator())
    assert torch.allclose(seen["first"].inputs, x.T @ x / 8, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_reconstruction_keeps_the_precision_of_the_network(dtype):
    import copy

    from pliant.edits import Factor
    from pliant.families.lowrank.refit import reconstruct

    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(12, 8)).to(dtype)
    model = copy.deepcopy(dense)
    inputs = (torch.randn(256, 12) * torch.arange(12)).to(dtype)
    Factor("0", "svd", (3,)).apply(model)
    before = (model(inputs) - dense(inputs)).square().mean()
    reconstruct(dense, model, ["0"], [(inputs,)])
    assert (model(inputs) - dense(inputs)).square().mean() < 0.9 * before
    assert all(parameter.dtype == dtype for parameter in model.parameters())


def test_reconstruction_goes_by_the_order_of_calls():
    import copy

    from pliant.edits import Factor
    from pliant.families.lowrank.refit import reconstruct

    torch.manual_seed(0)
    dense = Keyed()
    one = copy.deepcopy(dense)
    for name in ("first", "second", "never"):
        Factor(name, "svd", (3,)).apply(one)
    other, batches = copy.deepcopy(one), [(torch.randn(64, 12),)]
    reconstruct(dense, one, ["first", "second"], batches)
    reconstruct(dense, other, ["second", "first", "never"], batches)
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


class Frozen(nn.Module):
    """A backbone that runs without gradients, as in transfer learning."""

    def __init__(self, *, frozen: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8))
        self.head, self.frozen = nn.Linear(8, 4), frozen

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features = self.body(x)
        return self.head(features)  # type: ignore[no-any-return]


def test_a_backbone_without_gradients_is_looked_at_as_any_other() -> None:
    x = torch.randn(32, 6)
    found = []
    for frozen in (True, False):
        model = Frozen(frozen=frozen)
        layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        found.append(metrics(model, layers, [(x,)], torch.Generator().manual_seed(0)))
        assert torch.is_grad_enabled()
    for name in ("body.0", "body.2", "head"):
        assert torch.equal(found[0][name].outputs, found[1][name].outputs)  # type: ignore[arg-type]


class Routed(nn.Module):
    """Experts, of which one gets no sample."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = (x[:, 0] > 0) == bool(number) if number < 2 else x[:, 0] > 1e9
            out[rows] = expert(x[rows])
        return self.head(out)  # type: ignore[no-any-return]


def test_an_expert_without_samples_is_no_error_and_counts_as_the_others() -> None:
    model, x = Routed(), torch.randn(64, 6)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    found = metrics(model, layers, [(x[:32],), (x[32:],)], torch.Generator().manual_seed(0))
    assert set(found) == {"experts.0", "experts.1", "head"}
    share = (x[:, 0] <= 0)[:, None] * x
    assert torch.allclose(found["experts.0"].inputs, share.T @ share / 64, atol=1e-5)
    data = (x, torch.zeros(64, dtype=torch.long))
    rows = pliant.compress(model, data, "nrmf(samples=64)", "params=0.6").report.layers
    assert not any(row.reason == "never called in a forward pass" for row in rows)


@pytest.mark.parametrize("method", ["energy(samples=64)", "groupwise_ptq(independent=2)"])
def test_networks_with_experts_without_samples_stay_sound(method: str) -> None:
    torch.manual_seed(0)
    model, x = Routed(), torch.randn(64, 6)
    data = (x, torch.zeros(64, dtype=torch.long))
    result = pliant.compress(model, data, method, strict=False)
    assert torch.isfinite(result.model(x)).all() and result.edits
