"""Sensitivity where it can be computed by hand, and what it is compared with."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import pliant
from pliant.api.probe import compare
from pliant.data import Data
from pliant.errors import PliantError
from pliant.families.analyze.variance import bias_variance
from pliant.testing import TOYS, Case

SIGMA = 0.01


def sensitivity(model: nn.Module, inputs: Tensor, sigma: float = SIGMA, seed: int = 0) -> float:
    found = pliant.analyze(model, inputs, f"output_sensitivity(noise={sigma})", seed=seed)
    return float(found.value)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def mlp(widths: tuple[int, ...], seed: int, gain: Callable[[int], float]) -> nn.Sequential:
    """Linear layers without bias and ReLUs; weights have the standard deviation gain(fan_in)."""
    layers: list[nn.Module] = []
    random = torch.Generator().manual_seed(seed)
    for rows, columns in zip(widths[1:], widths, strict=False):
        layers += [nn.Linear(columns, rows, bias=False), nn.ReLU()]
        with torch.no_grad():
            layers[-2].weight.normal_(0, gain(columns), generator=random)  # type: ignore[operator, union-attr]
    return nn.Sequential(*layers[:-1])


def a_linear_network_moves_as_its_weights_say() -> None:
    """Of f = W x + b: S = sigma^2 |W^T 1|^2 / K^2, up to 3 percent with 20,000 inputs."""
    model = nn.Linear(50, 10)
    with torch.no_grad():
        model.weight.copy_(noise(10, 50))
    weight = model.weight.detach()
    expected = 0.1**2 * float(weight.sum(0).square().sum()) / 100
    found = pliant.analyze(model, noise(20_000, 50, seed=1), "output_sensitivity")
    assert abs(found.value / expected - 1) < 0.03
    each = 0.1**2 * weight.square().sum(1)
    rows = torch.tensor([row["variance"] for row in found.rows])
    assert torch.allclose(rows, each, rtol=0.05)
    assert abs(found.values["per_output"] / float(each.mean()) - 1) < 0.03
    assert found.values["noise"].shape == (20_000,)


def he_networks_are_equally_sensitive_at_any_depth() -> None:
    """S / sigma^2 = 2 / K, whatever depth and width."""
    for widths in ((64, 400, 10), (64, 200, 100, 10), (64, 100, 200, 300, 100, 10)):
        nets = [mlp(widths, seed, lambda fan_in: (2 / fan_in) ** 0.5) for seed in range(40)]
        inputs = noise(400, 64)
        mean = sum(sensitivity(net, inputs, seed=k) for k, net in enumerate(nets)) / 40 / SIGMA**2
        assert abs(mean / 0.2 - 1) < 0.05, (widths, mean)


def standard_normal_networks_grow_by_half_their_width() -> None:
    """S = sigma^2 (D / K) (H / 2) for one hidden layer of H units."""
    nets = [mlp((64, 100, 10), seed, lambda fan_in: 1.0) for seed in range(40)]
    inputs = noise(400, 64)
    mean = sum(sensitivity(net, inputs, 0.1, k) for k, net in enumerate(nets)) / 40
    assert abs(mean / (0.01 * 6.4 * 50) - 1) < 0.10


def outputs_that_cannot_move_are_refused() -> None:
    inputs = noise(8, 12)
    linear = nn.Linear(12, 4)

    class Centred(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = x[:, :4] - x[:, :4].mean(1, keepdim=True)
            return found

    for model, data, words in (
        (nn.Sequential(linear, nn.Softmax(1)), inputs, "before the softmax"),
        (Centred(), inputs, "always the same"),
        (nn.Linear(12, 1), inputs, "at least 2 outputs"),
        (linear, inputs[:1], "at least 2 of them"),
        (nn.Unflatten(1, (3, 4)), inputs, "a row of logits"),
        (nn.Embedding(9, 4), torch.arange(8), "a row of logits"),
        (nn.Linear(12, 4).bfloat16(), inputs.bfloat16(), "model.float()"),
        (linear, Data(), "give some"),
    ):
        try:
            pliant.analyze(model, data, "output_sensitivity")
        except PliantError as refusal:
            assert words in str(refusal), refusal
        else:
            raise AssertionError(words)


def dropout_and_batch_norms_are_at_rest() -> None:
    """S is that of eval mode: the same for a batch of all and for two halves, twice."""
    toy = TOYS["plain"]
    model, inputs = toy.model().train(), noise(64, 3, 6, 6)
    whole, again = sensitivity(model, inputs), sensitivity(model, inputs)
    halves = Data(test=[(inputs[:32],), (inputs[32:],)])
    found = pliant.analyze(model, halves, f"output_sensitivity(noise={SIGMA})").value
    assert whole == again and abs(found / whole - 1) < 1e-3 and model.training


def s_is_that_of_the_jacobian_for_small_noise() -> None:
    """S = sigma^2 / K^2 times the mean of |J^T 1|^2, to first order; per output, of |J_k|^2."""
    model, inputs = mlp((12, 30, 5), 0, lambda fan_in: (2 / fan_in) ** 0.5), noise(400, 12, seed=1)
    rows: Tensor = torch.func.vmap(torch.func.jacrev(model))(inputs).detach()
    expected = SIGMA**2 / 25 * float(rows.sum(1).square().sum(1).mean())
    found = pliant.analyze(model, inputs, f"output_sensitivity(noise={SIGMA}, draws=60)")
    assert abs(found.value / expected - 1) < 0.03
    each = SIGMA**2 * float(rows.square().sum(2).mean())
    assert abs(found.values["per_output"] / each - 1) < 0.03


def s_grows_with_the_square_of_the_noise() -> None:
    model, inputs = nn.Linear(12, 4), noise(50, 12, seed=1)
    assert abs(sensitivity(model, inputs, 0.3) / sensitivity(model, inputs, 0.1) - 9) < 1e-3


def draws_are_fresh_and_steady_the_estimate() -> None:
    """Twenty draws of 10 inputs are 200 numbers, all different, with a spread like theirs."""
    model, inputs = nn.Linear(12, 4), noise(10, 12, seed=1)
    found = pliant.analyze(model, inputs, "output_sensitivity(draws=20)")
    moved = found.values["noise"]
    assert len(moved) == len(moved.unique()) == 200
    assert torch.isclose(moved.var(correction=0), torch.tensor(found.value).double())
    assert "on 10 inputs" in found.text

    def spread(draws: int) -> float:
        spec = f"output_sensitivity(draws={draws})"
        seen = [float(pliant.analyze(model, inputs, spec, seed=k).value) for k in range(20)]
        return float(torch.tensor(seen).std())

    assert spread(25) < spread(1) / 3  # five times less but for chance


def the_squared_error_is_bias_and_variance() -> None:
    """Two networks say 0.9 and 0.5 for the right one of two classes.

    Mean 0.7: bias 0.3^2 for either class, variance 0.2^2, error (0.1^2 + 0.5^2) / 2 = 0.13.
    """
    chances = torch.tensor([[0.9, 0.1], [0.5, 0.5]])
    models = [nn.Linear(3, 2) for _ in chances]
    for model, row in zip(models, chances, strict=True):
        nn.init.zeros_(model.weight)
        model.bias.data = row.log()
    data = Data(test=(noise(6, 3), torch.zeros(6, dtype=torch.long)))
    found = bias_variance(models, data)
    wanted = {"bias": 0.09, "variance": 0.04, "error": 0.13}
    for name, value in wanted.items():
        assert abs(getattr(found, name) - value) < 1e-6, name
    assert abs(found.loss + float(chances[:, 0].log().mean())) < 1e-6


def bias_and_variance_add_up_over_batches_of_any_size() -> None:
    toy = TOYS["plain"]
    models = [toy.model(seed).train() for seed in range(3)]
    inputs, labels = noise(20, 3, 6, 6), torch.arange(20) % 4
    whole = bias_variance(models, Data(test=(inputs, labels)))
    parts = Data(test=[(inputs[:3], labels[:3]), (inputs[3:], labels[3:])])
    assert abs(whole.bias + whole.variance - whole.error) < 1e-9
    assert abs(bias_variance(models, parts).variance / whole.variance - 1) < 1e-5
    assert all(model.training for model in models)
    for given, data, words in (
        (models[:1], Data(test=(inputs, labels)), "at least 2"),
        (models, Data(test=[(inputs,)]), "class of every input"),
        (models, Data(test=(inputs, labels + 1)), "from 0 to 3"),
    ):
        try:
            bias_variance(given, data)
        except PliantError as refusal:
            assert words in str(refusal), refusal
        else:
            raise AssertionError(words)


def networks_are_compared_under_the_same_noise() -> None:
    """Doubling a linear network's weights makes S four times as large, to the last digits."""
    once, twice = nn.Linear(12, 4), nn.Linear(12, 4)
    twice.load_state_dict({name: 2 * value for name, value in once.state_dict().items()})
    pair = (noise(30, 12), torch.arange(30) % 4)
    found = compare({"twice": twice, "once": once}, Data(train=pair, test=pair), seed=3)
    assert list(found.values) == ["once", "twice"]
    assert abs(found.values["twice"] / found.values["once"] - 4) < 1e-4
    row = found.rows[0]
    alone = pliant.analyze(once, pair[0], "output_sensitivity", seed=3)
    assert row["network"] == "once" and abs(row["sensitivity"] - alone.value) < 1e-12
    expected = float(nn.functional.cross_entropy(once(pair[0]), pair[1]).detach())
    assert abs(row["loss"] - expected) < 1e-6 and abs(row["train_loss"] - expected) < 1e-6
    assert 0 <= row["accuracy"] <= 1 and "once has the lowest sensitivity" in found.text
    unlabelled = compare({"one": once}, pair[0], "output_sensitivity(noise=0.3)")
    assert "loss" not in unlabelled.rows[0] and unlabelled.method["options"]["noise"] == 0.3
    try:
        compare({}, pair[0])
    except PliantError as refusal:
        assert "none came" in str(refusal)
    else:
        raise AssertionError("no networks were compared")


CASES = [
    Case(
        "output_sensitivity",
        variants=("output_sensitivity(draws=3, noise=0.5)",),
        own=(
            a_linear_network_moves_as_its_weights_say,
            he_networks_are_equally_sensitive_at_any_depth,
            standard_normal_networks_grow_by_half_their_width,
            outputs_that_cannot_move_are_refused,
            dropout_and_batch_norms_are_at_rest,
            s_is_that_of_the_jacobian_for_small_noise,
            s_grows_with_the_square_of_the_noise,
            draws_are_fresh_and_steady_the_estimate,
            the_squared_error_is_bias_and_variance,
            bias_and_variance_add_up_over_batches_of_any_size,
            networks_are_compared_under_the_same_noise,
        ),
    )
]
