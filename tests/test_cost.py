import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.flop_counter import FlopCounterMode

from pliant import zoo
from pliant.cost import Cost, LayerCost, call, cost, layer_costs
from pliant.errors import ModelError
from pliant.method import Method
from pliant.observe.order import order
from pliant.run import start
from pliant.surgery.blocks import blocks


def flops(model: nn.Module, *inputs: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(*inputs)
    return counter.get_total_flops()


# Each of 16 blocks weighs the maps of all before it, number by number: torch counts matrices only.
WEIGHED = {f"dran-x{scale}": sum(range(1, 17)) * 64 * 48 * 48 for scale in (2, 3, 4)}


# The second product of a quadratic form is none of matrices either, and there are billions.
COUNTED = [name for name in zoo.NETWORKS if not name.startswith("cqnn")]


@pytest.mark.parametrize("name", COUNTED)
def test_macs_are_half_of_the_flops_torch_counts(name: str) -> None:
    model, network = zoo.build(name), zoo.NETWORKS[name]
    found = cost(model, network.example(2))
    assert 2 * (found.macs - WEIGHED.get(name, 0)) == flops(model, *network.example())
    assert found.uncounted == ()


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(4, 6, 3, stride=2, padding=1), (4, 9)),
        (nn.Conv2d(4, 6, (3, 5), dilation=2, groups=2), (4, 12, 13)),
        (nn.Conv2d(4, 8, 3, groups=4, padding="same"), (4, 7, 7)),
        (nn.Conv3d(2, 3, 3, padding=1), (2, 4, 5, 6)),
        (nn.ConvTranspose1d(4, 6, 3, stride=2), (4, 9)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), (4, 5, 5)),
        (nn.ConvTranspose3d(2, 3, 2), (2, 3, 3, 3)),
        (nn.Linear(5, 7), (5,)),
        (nn.Linear(5, 7, bias=False), (3, 2, 5)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_formula_of_each_layer(layer: nn.Module, shape: tuple[int, ...]) -> None:
    row = layer_costs(layer, (torch.randn(3, *shape),))[""]
    one = torch.randn(1, *shape)
    assert 2 * row.macs == flops(layer, one)
    assert row.params == sum(p.numel() for p in layer.parameters())
    assert row.weight == tuple(layer.weight.shape)
    assert row.input == shape
    assert row.output == tuple(layer(one).shape[1:])


def test_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
    model.append(nn.Linear(288, 10))
    assert cost(model, (torch.zeros(2, 3, 8, 8),)) == Cost(
        params=(216 + 8) + 16 + (2880 + 10),
        macs=36 * 216 + 2880,
        bytes=4 * (224 + 16 + 2890) + 4 * 16 + 8,  # running mean and variance, a counter
    )
    rows = layer_costs(model, (torch.zeros(2, 3, 8, 8),))
    assert list(rows) == ["0", "1", "4"]
    assert rows["1"].macs == 0
    assert rows["4"] == LayerCost("Linear", 2890, 2880, 11560, (10, 288), (288,), (10,))


def test_attention_counts_projections_and_products() -> None:
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 5, 8)
    row = layer_costs(layer, (x, x, x))[""]
    assert row.macs == 4 * 5 * 8 * 8 + 2 * 5 * 5 * 8
    assert row.params == 4 * 64 + 4 * 8  # out_proj belongs to it and has no row of its own


def test_transformer_layer_is_seen_through_its_fused_kernel() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    rows = layer_costs(layer, (torch.randn(2, 5, 8),))
    assert list(rows) == ["self_attn", "linear1", "linear2", "norm1", "norm2"]
    assert [row.calls for row in rows.values()] == [1] * 5
    assert rows["linear1"].macs == 5 * 8 * 16
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent(kind: type[nn.RNNBase]) -> None:
    layer = kind(4, 6, num_layers=2, batch_first=True)
    weights = sum(p.numel() for n, p in layer.named_parameters() if "weight" in n)
    assert layer_costs(layer, (torch.randn(2, 5, 4),))[""].macs == 5 * weights


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.alias = self.body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.alias(x))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))


def test_module_called_twice_pays_twice_and_weighs_once() -> None:
    rows = layer_costs(Twice(), (torch.randn(2, 4),))
    assert list(rows) == ["body"]
    assert (rows["body"].macs, rows["body"].calls, rows["body"].params) == (32, 2, 20)
    assert cost(Twice(), (torch.randn(2, 4),)).params == 20


def test_shared_parameter_counts_once() -> None:
    found = cost(Tied(), (torch.zeros(2, 3, dtype=torch.long),))
    assert (found.params, found.bytes, found.macs) == (40, 160, 3 * 40)


def test_parametrized_layer_is_one_row() -> None:
    model = nn.Sequential(weight_norm(nn.Conv2d(2, 4, 3)), nn.ReLU())
    rows = layer_costs(model, (torch.randn(1, 2, 5, 5),))
    assert list(rows) == ["0"]
    assert rows["0"].kind == "Conv2d"
    assert rows["0"].weight == (4, 2, 3, 3)
    assert rows["0"].macs == 9 * 72
    assert rows["0"].params == 72 + 4 + 4 == cost(model, (torch.randn(1, 2, 5, 5),)).params
    assert parametrize.is_parametrized(model[0])


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.lin.weight)


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


class ByHand(nn.Module):
    """Attention in two products, and a vector in one."""

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.einsum("bhld,bhsd->bhls", x, x).softmax(-1)
        return (weights @ x) @ torch.ones(8)


def test_products_outside_of_layers_are_counted_where_they_run() -> None:
    x = torch.randn(2, 4)
    assert cost(nn.Sequential(nn.Linear(4, 4), Scale()), (x,)).macs == 16
    for model in (nn.Sequential(Functional()), Functional()):
        assert (cost(model, (x,)).macs, cost(model, (x,)).uncounted) == (16, ())
    one = torch.randn(2, 3, 5, 8)  # a sample of 3 heads, 5 positions, 8 features
    assert cost(nn.Sequential(Attention()), (one,)).macs == 3 * 5 * 5 * 8 * 2
    assert cost(ByHand(), (one,)).macs == 3 * 5 * 5 * 8 * 2 + 3 * 5 * 8


class Bilinear(nn.Module):
    """Owns a weight of its own class, which no formula knows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,oij,bj->bo", x, self.weight, x)


def test_a_layer_of_ones_own_has_its_products_in_its_row() -> None:
    model, x = nn.Sequential(Bilinear(), nn.Linear(6, 2)), torch.randn(3, 4)
    rows = layer_costs(model, (x,))
    assert 6 * 4 * 4 <= rows["0"].macs <= 2 * 6 * 4 * 4  # by the order that einsum chooses
    assert cost(model, (x,)).macs == rows["0"].macs + 12


@torch.library.custom_op("pliant_test::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return 2 * x


class Foreign(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return twice(x)


def test_where_foreign_operators_run_is_named() -> None:
    assert cost(nn.Sequential(nn.Linear(4, 4), Foreign()), (torch.randn(2, 4),)).uncounted == ("1",)


def test_layer_that_is_never_called_says_so() -> None:
    row = layer_costs(Functional(), (torch.randn(2, 4),))["lin"]
    assert (row.calls, row.macs, row.params) == (0, 0, 20)


class Moody(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(4)
        self.drop = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 4:
            raise RuntimeError("four features, please")
        assert not self.training
        return self.drop(self.bn(x)) + torch.rand(1)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("width", [4, 5])
def test_model_is_left_as_it_was(width: int) -> None:
    model = Moody()
    model.drop.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    if width == 4:
        cost(model, (torch.randn(8, 4, generator=torch.Generator()),))
    else:
        with pytest.raises(ModelError, match=r"\(1, 5\).*four features, please"):
            cost(model, (torch.zeros(8, 5),))
    assert hooks(model) == 0
    assert (model.training, model.bn.training, model.drop.training) == (True, True, False)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


def test_half_precision_frozen_and_unsaved_buffers() -> None:
    model = nn.Linear(4, 4).half().requires_grad_(False)
    model.register_buffer("scratch", torch.zeros(100), persistent=False)
    found = cost(model.to(torch.bfloat16), (torch.zeros(1, 4, dtype=torch.bfloat16),))
    assert (found.params, found.bytes) == (20, 40)


def test_named_inputs() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 2)

        def forward(self, *, pixel_values: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
            return {"logits": self.lin(pixel_values) * scale}

    rows = layer_costs(Named(), {"pixel_values": torch.zeros(3, 4), "scale": 2.0})
    assert rows["lin"].macs == 8


def test_compiled_model_costs_what_it_is_made_of() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    x = (torch.zeros(2, 4),)
    compiled = torch.compile(model, backend="eager")
    compiled(*x)
    assert cost(compiled, x) == cost(model, x)
    assert torch.compiler.is_compiling() is False


def test_lazy_parameters_are_refused() -> None:
    with pytest.raises(ModelError, match="lazy"):
        cost(nn.LazyLinear(3), (torch.zeros(1, 4),))


def test_a_model_is_called_on_its_own_device() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3))
    run = start(model, Method(), example=(torch.zeros(2, 3, 6, 6),))
    run.model.to("meta")  # as a training moves it, after the run has begun
    assert call(run.model, run.example).device.type == "meta"
    assert call(nn.Identity(), {"input": torch.ones(2)}).tolist() == [1, 1]
    assert order(run.model, run.example, ["0", "3"]).called == ("0", "3")
    assert blocks(run.model, ["0", "3"], run.example) == ["0", "3"]
    assert run.finish() == run.cost
