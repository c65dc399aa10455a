"""Looking at networks: sensitivity where it can be computed by hand."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import pliant
from pliant.data import Data
from pliant.errors import PliantError
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
        (nn.Embedding(9, 4), torch.arange(8), "real numbers"),
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
        ),
    )
]
