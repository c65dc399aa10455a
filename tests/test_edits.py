"""Edits: what a factorization computes, what it costs, what it carries over, what it refuses."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from pliant.cost import LayerCost, layer_costs
from pliant.edits import Edit, Factor, Replaced, from_json, replay, to_json
from pliant.errors import EditError
from pliant.math import forms
from pliant.nn import factorized
from pliant.surgery.optim import carry

CONVS: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {
    1: nn.Conv1d,
    2: nn.Conv2d,
    3: nn.Conv3d,
}

# Geometries by what is special about them: (dims, keyword arguments of the convolution).
GEOMETRIES: dict[str, tuple[int, dict[str, object]]] = {
    "1d": (1, {"kernel_size": 3, "padding": 1}),
    "1d-strided-dilated": (1, {"kernel_size": 3, "stride": 2, "padding": 2, "dilation": 2}),
    "1d-reflect": (1, {"kernel_size": 5, "padding": 2, "padding_mode": "reflect"}),
    "2d": (2, {"kernel_size": 3}),
    "2d-stride": (2, {"kernel_size": 3, "stride": 2, "padding": 1, "bias": False}),
    "2d-uneven": (
        2,
        {"kernel_size": (3, 2), "stride": (1, 2), "padding": (2, 0), "dilation": (1, 3)},
    ),
    "2d-same": (2, {"kernel_size": (3, 4), "padding": "same"}),
    "2d-same-dilated": (2, {"kernel_size": 3, "padding": "same", "dilation": 2}),
    "2d-valid": (2, {"kernel_size": 3, "padding": "valid"}),
    "2d-reflect": (2, {"kernel_size": 3, "padding": (1, 2), "padding_mode": "reflect"}),
    "2d-same-reflect": (2, {"kernel_size": 3, "padding": "same", "padding_mode": "reflect"}),
    "2d-replicate": (2, {"kernel_size": 3, "padding": 1, "padding_mode": "replicate"}),
    "2d-circular": (2, {"kernel_size": 3, "padding": 1, "padding_mode": "circular", "stride": 2}),
    "2d-row": (2, {"kernel_size": (1, 5), "padding": (0, 2)}),
    "2d-column": (2, {"kernel_size": (5, 1), "stride": 2}),
    "2d-pointwise": (2, {"kernel_size": 1}),
    "2d-pointwise-strided-padded": (2, {"kernel_size": 1, "stride": 2, "padding": 1}),
    "3d": (3, {"kernel_size": 3, "padding": 1}),
    "3d-strided": (3, {"kernel_size": (3, 1, 2), "stride": (2, 1, 1), "bias": False}),
}
CASES = [
    pytest.param(geometry, form, id=f"{geometry}-{form}")
    for geometry, (dims, options) in GEOMETRIES.items()
    for form in forms.forms_for(CONVS[dims](2, 2, **options).weight.shape)  # type: ignore[arg-type]
]


def net(*parts: nn.Module) -> nn.Sequential:
    return nn.Sequential(*parts).eval()


def conv(geometry: str) -> tuple[nn.Sequential, Tensor]:
    """A net of one convolution, 5 channels to 7, and a batch for it."""
    torch.manual_seed(0)
    dims, options = GEOMETRIES[geometry]
    x = torch.randn(2, 5, *(9, 8, 7)[:dims])
    return net(CONVS[dims](5, 7, **options)), x  # type: ignore[arg-type]


def relative(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    return float((found - wanted).norm() / wanted.norm())


def full(layer: str, weight: Tensor, form: str) -> Factor:
    return Factor(layer, form, forms.max_ranks(tuple(weight.shape), form))


def measured(model: nn.Module, layer: str, x: Tensor) -> LayerCost:
    """The cost of all layers that stand for one, added up."""
    rows = [row for name, row in layer_costs(model, (x,)).items() if name.startswith(layer + ".")]
    totals = {axis: sum(getattr(row, axis) for row in rows) for axis in ("params", "macs", "bytes")}
    return replace(rows[0], **totals, output=rows[-1].output)


# ---------------------------------------------------------------- what is computed


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(("geometry", "form"), CASES)
def test_full_rank_computes_what_the_dense_layer_does(geometry: str, form: str) -> None:
    model, x = conv(geometry)
    with torch.no_grad():
        wanted = model(x)
        full("0", model[0].weight, form).apply(model)
        assert relative(model(x), wanted) < 1e-5
    assert [name for name, _ in model[0].named_children()] == list(factorized.NAMES[form])


@pytest.mark.parametrize(("geometry", "form"), CASES)
def test_a_lower_rank_computes_what_its_composed_kernel_does(geometry: str, form: str) -> None:
    model, x = conv(geometry)
    dense = model[0]
    most = forms.max_ranks(tuple(dense.weight.shape), form)
    Factor("0", form, tuple(max(1, rank // 2) for rank in most)).apply(model)
    with torch.no_grad():
        kernel = forms.compose([part.weight for part in model[0]], form)
        dense.weight.copy_(kernel.reshape(dense.weight.shape))
        assert relative(model(x), dense(x)) < 1e-5


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 6), (3, 4, 6)])
def test_a_linear_layer_of_full_rank_stays_what_it_was(bias: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, x = net(nn.Linear(6, 4, bias=bias)), torch.randn(shape)
    with torch.no_grad():
        wanted = model(x)
        Factor("0", "svd", (4,)).apply(model)
        assert relative(model(x), wanted) < 1e-5
    assert (model[0].expand.bias is not None) is bias and model[0].reduce.bias is None


def test_given_kernels_are_taken_as_they_are() -> None:
    model = net(nn.Linear(6, 4))
    kernels = (torch.randn(2, 6), torch.randn(4, 2))
    Factor("0", "svd", (2,), kernels).apply(model)
    assert torch.equal(model[0].reduce.weight, kernels[0])
    assert torch.equal(model[0].expand.weight, kernels[1])


def test_the_bias_stays_the_very_same_parameter() -> None:
    model, _ = conv("2d")
    bias = model[0].bias
    Factor("0", "tucker2", (2, 3)).apply(model)
    assert model[0].expand.bias is bias


def test_dtype_mode_and_frozen_weights_are_kept() -> None:
    model = net(nn.Conv2d(4, 4, 3).bfloat16().requires_grad_(False)).train()
    Factor("0", "spatial", (3,)).apply(model)
    assert all(p.dtype == torch.bfloat16 and not p.requires_grad for p in model.parameters())
    assert all(module.training for module in model.modules())


def test_only_the_named_layer_changes_however_deep_it_is() -> None:
    torch.manual_seed(0)
    inner = nn.ModuleDict({"convs": nn.ModuleList([nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)])})
    model = nn.ModuleDict({"body": inner, "a[b]*": nn.Linear(4, 4)})
    before = {name: id(module) for name, module in model.named_modules()}
    Factor("body.convs.1", "input", (2,)).apply(model)
    after = {name: id(module) for name, module in model.named_modules()}
    assert {name for name in before if before[name] != after[name]} == {"body.convs.1"}
    Factor("a[b]*", "svd", (2,)).apply(model)  # a name is never a pattern
    assert isinstance(model["a[b]*"], nn.Sequential)


# ---------------------------------------------------------------- what it costs


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("full_rank", [True, False])
@pytest.mark.parametrize(("geometry", "form"), CASES)
def test_the_predicted_cost_is_the_measured_cost(geometry: str, form: str, full_rank: bool) -> None:
    model, x = conv(geometry)
    before = layer_costs(model, (x,))["0"]
    ranks = forms.max_ranks(before.weight, form)
    edit = Factor("0", form, ranks if full_rank else tuple(max(1, r // 3) for r in ranks))
    predicted = edit.predict(before)
    edit.apply(model)
    check_cost(predicted, measured(model, "0", x))


@pytest.mark.parametrize("shape", [(2, 6), (2, 5, 6), (2, 3, 5, 6)])
def test_the_predicted_cost_of_a_linear_layer_is_measured(shape: tuple[int, ...]) -> None:
    model, x = net(nn.Linear(6, 4)), torch.randn(shape)
    edit = Factor("0", "svd", (3,))
    predicted = edit.predict(layer_costs(model, (x,))["0"])
    edit.apply(model)
    check_cost(predicted, measured(model, "0", x))


class Pyramid(nn.Module):
    """Calls one convolution at full and at half size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1).double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.conv(x), self.conv(x[..., ::2, ::2])


def test_the_predicted_cost_counts_every_call_and_bytes_of_the_dtype() -> None:
    model, x = Pyramid(), torch.randn(1, 4, 6, 6, dtype=torch.float64)
    edit = Factor("conv", "tucker2", (2, 3))
    predicted = edit.predict(layer_costs(model, (x,))["conv"])
    edit.apply(model)
    check_cost(predicted, measured(model, "conv", x))
    assert predicted.calls == 2 and predicted.bytes == 8 * predicted.params


def check_cost(predicted: LayerCost, found: LayerCost) -> None:
    for axis in ("params", "macs", "bytes", "input", "output", "calls"):
        assert getattr(predicted, axis) == getattr(found, axis), axis


# ---------------------------------------------------------------- edits as data


EDITS: tuple[Edit, ...] = (
    Factor("0", "spatial", (3,)),
    Factor("2.body", "tucker2", (2, 3)),
    Factor("4", "svd", (2,)),
)


def small() -> nn.Sequential:
    torch.manual_seed(0)
    middle = nn.ModuleDict({"body": nn.Conv2d(4, 6, 3)})
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), middle, nn.Flatten(), nn.Linear(6, 4))


def test_replay_with_shapes_only_makes_room_for_the_same_tensors() -> None:
    done, empty = small(), small()
    replay(done, EDITS)
    replay(empty, EDITS, weights=False)
    assert {k: v.shape for k, v in done.state_dict().items()} == {
        k: v.shape for k, v in empty.state_dict().items()
    }
    empty.load_state_dict(done.state_dict())
    for name, tensor in done.state_dict().items():
        assert torch.equal(tensor, empty.state_dict()[name])


def test_shapes_only_never_decomposes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "decompose", lambda *_, **__: pytest.fail("weights were computed"))
    replay(small(), EDITS, weights=False)
    with torch.device("meta"):
        model = small()
    replay(model, EDITS, weights=False)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_edits_survive_json() -> None:
    rows = json.loads(json.dumps(to_json(EDITS), allow_nan=False))
    assert rows[1] == {"edit": "factor", "layer": "2.body", "form": "tucker2", "ranks": [2, 3]}
    assert tuple(from_json(rows)) == EDITS
    kernels = (torch.zeros(2, 6), torch.zeros(4, 2))
    assert from_json(to_json([Factor("4", "svd", (2,), kernels)])) == [EDITS[2]]


GOOD = {"edit": "factor", "layer": "0", "form": "svd", "ranks": [2]}


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ({}, "must be a list"),
        (["factor"], "Unknown edit 'factor'"),
        ([{}], "Unknown edit 'None'"),
        ([GOOD | {"edit": "os.system"}], "Unknown edit 'os.system'"),
        ([GOOD | {"edit": ["factor"]}], "Unknown edit"),
        ([GOOD | {"kernels": None}], "takes form, layer, ranks"),
        ([{k: v for k, v in GOOD.items() if k != "ranks"}], "takes form, layer, ranks"),
        ([GOOD | {"layer": 0}], "layer of the edit"),
        ([GOOD | {"form": ["svd"]}], "form of the edit"),
        ([GOOD | {"ranks": 2}], "ranks of the edit"),
        ([GOOD | {"ranks": [2.0]}], "ranks of the edit"),
        ([GOOD | {"ranks": [True]}], "ranks of the edit"),
        ([GOOD | {"ranks": [[2]]}], "ranks of the edit"),
    ],
)
def test_only_known_edits_with_fitting_fields_are_read(rows: object, says: str) -> None:
    with pytest.raises(EditError, match=says):
        from_json(rows)


# ---------------------------------------------------------------- optimizers


def momentum_model() -> tuple[nn.Sequential, torch.optim.SGD, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Flatten())
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters()}],
        lr=0.01,
        momentum=0.9,
    )
    x = torch.randn(2, 3, 6, 6)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    return model, optimizer, x


@pytest.mark.parametrize(
    "edit",
    [
        Factor("2", "tucker2", (2, 3)),
        Factor("2", "input", (2,)),
        Factor("2", "output", (3,)),
        Factor("2", "spatial", (4,)),
    ],
    ids=lambda edit: edit.form,
)
def test_momentum_follows_by_the_chain_rule(edit: Factor) -> None:
    """Momentum is linear in gradients: it must turn into what autograd gives for the factors."""
    model, optimizer, _ = momentum_model()
    dense = model[2]
    momentum = optimizer.state[dense.weight]["momentum_buffer"].clone()
    kept = {
        id(p): optimizer.state[p]["momentum_buffer"] for p in (*model[0].parameters(), dense.bias)
    }
    carry(optimizer, edit.apply(model))
    factors = [part.weight for part in model[2]]
    # The layers' response to unit pulses is the kernel they stand for; a loss whose gradient by
    # that kernel is the momentum must have the carried momentum as its gradient by the factors.
    pulses = torch.zeros(4, 4, 5, 5)
    pulses[range(4), range(4), 2, 2] = 1
    seen = model[2](pulses) - dense.bias.reshape(1, -1, 1, 1)
    composed = seen.flip(2, 3).transpose(0, 1)
    wanted = torch.autograd.grad((composed * momentum).sum(), factors)
    for factor, gradient in zip(factors, wanted, strict=True):
        assert torch.allclose(optimizer.state[factor]["momentum_buffer"], gradient, atol=1e-5)
    assert all(optimizer.state[p]["momentum_buffer"] is kept[id(p)] for p in kept_parameters(model))
    assert dense.weight not in optimizer.state


def kept_parameters(model: nn.Sequential) -> list[nn.Parameter]:
    return [*model[0].parameters(), model[2][-1].bias]


def test_new_parameters_take_the_place_and_the_group_of_the_old() -> None:
    model, optimizer, x = momentum_model()
    groups = list(optimizer.param_groups)
    carry(optimizer, Factor("0", "spatial", (2,)).apply(model))
    assert optimizer.param_groups[0] is groups[0] and groups[0]["lr"] == 0.1
    new = [*(part.weight for part in model[0]), model[0].rest.bias]
    assert [id(p) for p in groups[0]["params"]] == [id(p) for p in new]
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in model.parameters()}
    before = [p.detach().clone() for p in model.parameters()]
    model(x).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_adaptive_state_starts_afresh_and_only_for_the_factors() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(3, 6)).sum().backward()
    optimizer.step()
    bias, other = model[0].bias, model[1].weight
    carry(optimizer, Factor("0", "svd", (2,)).apply(model))
    assert all(not optimizer.state[part.weight] for part in model[0])
    assert "exp_avg" in optimizer.state[bias] and "exp_avg" in optimizer.state[other]
    optimizer.zero_grad()
    model(torch.randn(3, 6)).sum().backward()
    optimizer.step()


def test_what_stands_for_parameters_of_two_groups_joins_the_first_of_them() -> None:
    model, optimizer, _ = momentum_model()
    new = nn.Parameter(torch.zeros(2))
    carry(optimizer, Replaced((model[2].weight, model[0].weight), (new,)))
    groups = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    assert groups == [[id(new), id(model[0].bias)], [id(model[2].bias)]]
    assert not {model[0].weight, model[2].weight} & {*optimizer.state}


def test_an_optimizer_of_other_parameters_is_left_alone() -> None:
    model, _, _ = momentum_model()
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1, momentum=0.9)
    before = other.state_dict()
    carry(other, Factor("2", "input", (2,)).apply(model))
    assert other.state_dict() == before


# ---------------------------------------------------------------- what is refused


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return model


def twice_named() -> nn.Module:
    layer = nn.Linear(4, 4)
    return nn.Sequential(nn.Linear(4, 4), layer, layer)


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 4)))


def pruned() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4))
    prune.l1_unstructured(model[0], "weight", 0.5)
    return model


def parametrized() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4))
    parametrize.register_parametrization(model[0], "weight", nn.Identity())
    return model


@pytest.mark.parametrize(
    ("build", "layer", "says"),
    [
        (tied, "0", "tied to 1.weight"),
        (parametrized, "0", "parametrized"),
        (lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4))), "0", "parametrized"),
        (old_weight_norm, "0", "forward-pre hook"),
        (pruned, "0", "forward-pre hook"),
        (lambda: nn.Sequential(nn.MultiheadAttention(4, 2)), "0", "packed in one tensor"),
        (lambda: nn.Sequential(nn.MultiheadAttention(4, 2)), "0.out_proj", "factorized"),
        (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=4)), "0", "grouped"),
        (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), "0", "grouped"),
        (lambda: nn.Sequential(nn.ConvTranspose2d(4, 4, 3, groups=2)), "0", "grouped"),
        (lambda: nn.Sequential(nn.Linear(1, 4)), "0", "single channel"),
        (lambda: nn.Sequential(nn.ReLU()), "0", "ReLU has no weights"),
        (lambda: nn.Sequential(nn.LSTM(4, 4)), "0", "one fused operation"),
        (lambda: nn.Sequential(nn.Linear(4, 4)), "1", "no layer '1'"),
        (lambda: nn.Sequential(nn.Linear(4, 4)), "0.weight", "no layer"),
        (lambda: nn.Linear(4, 4), "", "wrap it in nn.Sequential"),
        (lambda: nn.Sequential(nn.Sequential(nn.Linear(4, 4))), "0", "Sequential"),
    ],
)
def test_a_layer_that_cannot_be_read_is_refused(
    build: Callable[[], nn.Module], layer: str, says: str
) -> None:
    model = build()
    before = [id(module) for module in model.modules()]
    with pytest.raises(EditError, match=says):
        Factor(layer, "svd", (2,)).apply(model)
    assert [id(module) for module in model.modules()] == before


def test_a_layer_with_two_names_is_replaced_under_both() -> None:
    model = twice_named()
    Factor("1", "svd", (2,)).apply(model)
    assert model[1] is model[2] and isinstance(model[1], nn.Sequential)


def test_hooks_go_on_and_their_handles_stay_good() -> None:
    model, calls = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), []
    before = model[1].register_forward_pre_hook(lambda *_: calls.append("before"))
    after = model[1].register_forward_hook(lambda module, args, output: output * 0 + 7)
    Factor("1", "svd", (2,)).apply(model)
    assert torch.equal(model(torch.randn(2, 4)), torch.full((2, 4), 7.0))
    after.remove()
    before.remove()
    assert not torch.equal(model(torch.randn(2, 4)), torch.full((2, 4), 7.0))
    assert calls == ["before"]


@pytest.mark.parametrize(
    ("form", "ranks", "says"),
    [
        ("cp", (2,), "Unknown form 'cp'"),
        ("svd", (2,), "has no svd form"),
        ("tucker2", (2,), "do not fit"),
        ("tucker2", (0, 2), "do not fit"),
        ("tucker2", (2, -1), "do not fit"),
        ("tucker2", (5, 2), r"from 1 to \(4, 6\)"),
        ("output", (10**12,), "do not fit"),
        ("input", (True,), "do not fit"),
        ("input", (1.5,), "do not fit"),
        ("input", (), "do not fit"),
    ],
)
def test_forms_and_ranks_that_do_not_fit_are_refused(
    form: str, ranks: tuple[int, ...], says: str
) -> None:
    model = net(nn.Conv2d(4, 6, 3))
    edit, dense = Factor("0", form, ranks), model[0]
    with pytest.raises(EditError, match=says):
        edit.apply(model, weights=False)
    with pytest.raises(EditError, match=says):
        edit.predict(layer_costs(model, (torch.zeros(1, 4, 5, 5),))["0"])
    assert model[0] is dense


def test_a_layer_is_factorized_once() -> None:
    model = net(nn.Linear(6, 4))
    replay(model, [Factor("0", "svd", (2,))])
    with pytest.raises(EditError, match="Sequential"):
        replay(model, [Factor("0", "svd", (2,))])


# ---------------------------------------------------------------- transformer blocks


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_transformer_block_runs_where_pytorch_would_fuse_it() -> None:
    """In eval mode PyTorch reads linear1.weight itself, unless the block says it cannot."""
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(block, 2).eval()
    x = torch.randn(2, 5, 8)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        wanted, masked = model(x), model(x, src_key_padding_mask=mask)
        for name in ("layers.0.linear1", "layers.0.linear2"):
            Factor(name, "svd", (8,)).apply(model)
        assert relative(model(x), wanted) < 1e-5
        found = model(x, src_key_padding_mask=mask)
        assert relative(found[~mask], masked[~mask]) < 1e-5
    alone = block.eval()
    Factor("linear1", "svd", (8,)).apply(alone)
    with torch.no_grad():
        assert alone(x).shape == x.shape
