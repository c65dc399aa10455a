"""Coding: what the paper computes, done by hand on small kernels."""

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from pliant.budget import Budget
from pliant.errors import BudgetError, MethodError, ModelError
from pliant.families.code.sharing import draw, kmeans, mask, nearest, representatives
from pliant.method import Method
from pliant.methods.code.hac import HAC, NO_GAIN, PAPER
from pliant.nn.coded import Coded
from pliant.run import Run, start
from pliant.testing import Case


def linear(weight: Tensor) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    with torch.no_grad():
        model[0].weight.copy_(weight)
    return model


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def run_of(
    model: nn.Module, method: Method, budget: Budget | None = None, *, steps: int = 0
) -> Run:
    weight = model[0].weight  # type: ignore[index]
    example = (torch.zeros(2, weight.shape[1], *(5,) * (weight.dim() - 2)),)
    optimizer = SGD(model.parameters(), 0.1, momentum=0.9)
    return start(model, method, budget, example=example, optimizer=optimizer, steps=steps)


def step(run: Run, gradient: Tensor) -> None:
    """One optimizer step with a given gradient, as a training loop takes it."""
    weight = run.model[0].weight  # type: ignore[index]
    weight.grad = gradient.clone()
    run.before_step()
    assert run.optimizer is not None
    run.optimizer.step()
    run.after_step()


def survivors_lie_strictly_above_the_percentile() -> None:
    """Of 1, 2, 3, 4 the median is 2.5; of 1, 1, 1, 4 it is 1, and 1 is not above it."""
    assert mask(torch.tensor([1.0, -2.0, 3.0, -4.0]), 0.5).tolist() == [False, False, True, True]
    assert mask(torch.tensor([1.0, -1.0, 1.0, -4.0]), 0.5).tolist() == [False, False, False, True]


def rounding_to_quantiles_is_unbiased() -> None:
    """The mean of 2000 draws lies within four standard errors of every weight."""
    weight, draws = noise(20, 20), 2000
    levels = representatives(weight, 8)
    assert len(levels) == 8 and levels[0] == weight.min() and levels[-1] == weight.max()
    random = torch.Generator().manual_seed(0)
    found = torch.stack([levels[draw(weight, levels, random)] for _ in range(draws)])
    error = (found.mean(0) - weight).abs()
    assert (error <= 4 * found.std(0) / draws**0.5 + 1e-6).all()
    distance = (found - weight).abs()  # only the levels next to a weight are drawn
    assert (distance <= levels.diff().max()).all()


def few_values_are_left_of_many() -> None:
    """At p = 99 % all quantiles but the ends are zero: min, 0 and max, and then a drifted zero."""
    model = linear(noise(60, 60))
    run = run_of(model, HAC(prune=0.99, zeros=True, masked=0.0, rate=0.5), steps=4)
    step(run, torch.zeros(60, 60))
    assert run.state["levels"]["0"].numel() == 3 and len(model[0].weight.unique()) == 3
    step(run, torch.ones(60, 60))
    values = model[0].weight.unique()
    assert len(values) == 4 and (values == 0).any()


def a_value_moves_as_its_weights_would() -> None:
    """Two weights share 2 and move by -0.1 and -0.3: it falls by rate x sum, or the mean."""
    for rate, fall in ((0.25, 0.1), (None, 0.2)):
        weight = torch.full((2, 40), -1.0)
        weight[0, :2] = 2.0
        model = linear(weight)
        run = run_of(model, HAC(prune=0.0, values=2, share="ws", masked=0.0, rate=rate), steps=9)
        step(run, torch.zeros(2, 40))
        assert torch.equal(model[0].weight, weight)
        gradient = torch.zeros(2, 40)
        gradient[0, :2] = torch.tensor([1.0, 3.0])
        step(run, gradient)
        weight[0, :2] -= fall
        assert torch.allclose(model[0].weight, weight)


def momentum_does_not_move_what_is_pruned() -> None:
    """Neither under the mask alone nor under shared values."""
    model = linear(noise(8, 40))
    run = run_of(model, HAC(prune=0.75, values=4), steps=4)
    dead = model[0].weight == 0
    assert dead.sum() == 240
    run.optimizer.state[model[0].weight]["momentum_buffer"] = torch.ones(8, 40)  # type: ignore[union-attr]
    for _ in range(4):
        step(run, torch.ones(8, 40))
        assert (model[0].weight[dead] == 0).all()
    assert len(model[0].weight.unique()) <= 5
    run.finish()
    assert (model[0].weight[dead] == 0).all()


def kmeans_finds_planted_clusters() -> None:
    """Three tight groups give their means; a group more than there are values gives one less."""
    values = torch.cat([noise(50) * 0.01 + mean for mean in (-3.0, 0.0, 5.0)])
    found = kmeans(values, 3)
    means = torch.stack([part.mean() for part in values.split(50)])
    assert torch.allclose(found, means, atol=1e-6)
    assert nearest(values, found).bincount().tolist() == [50, 50, 50]
    assert kmeans(torch.tensor([1.0, 1.0, 2.0]), 7).tolist() == [1.0, 2.0]


def kernels_are_coded_as_matrices() -> None:
    """A convolution has a row per output channel; its outputs stay those of shared weights."""
    model = nn.Sequential(nn.Conv2d(6, 12, 3, padding=1))
    run = run_of(model, HAC(prune=0.5, values=8, format="hac"))
    run.finish()
    layer = model[0]
    assert isinstance(layer, Coded) and len(layer.weight.unique()) <= 9
    plain = nn.functional.conv2d(x := noise(2, 6, 5, 5), layer.weight, layer.bias, padding=1)
    assert torch.equal(layer(x), plain)
    assert run.edits[0].form == "hac" and run.finish().bytes == layer.code.numel() + 4 * 12


def a_budget_is_met_by_pruning() -> None:
    """Less room, more zeros, and never more bytes than allowed."""
    zeros = []
    for share in (0.2, 0.1, 0.05):
        model = linear(noise(100, 200))
        run = run_of(model, HAC(values=16), Budget(bytes=share))
        assert run.finish().bytes <= share * 80_000
        zeros.append(int((model[0].weight == 0).sum()))
    assert zeros[0] < zeros[1] < zeros[2]
    with pytest.raises(BudgetError, match="hac reaches"):
        run_of(linear(noise(100, 200)), HAC(), Budget(bytes=100))


def forms_follow_the_paper() -> None:
    """One stream is smaller at p = 80 %, sparse columns are at p = 97 %; the entropy always is."""
    for level, smaller in ((0.8, "hac"), (0.97, "shac")):
        sizes = {}
        for form in ("hac", "shac", "ans", "auto"):
            run = run_of(linear(noise(120, 256)), HAC(prune=level, format=form))  # type: ignore[arg-type]
            run.finish()
            sizes[form] = run.edits[0].size  # type: ignore[attr-defined]
        assert min(("hac", "shac"), key=lambda form: sizes[form]) == smaller
        assert sizes["auto"] == sizes["ans"] < min(sizes["hac"], sizes["shac"])


def small_layers_are_left_alone() -> None:
    run = run_of(linear(noise(2, 3)), HAC())
    run.finish()
    assert not run.edits and run.reasons["0"] == NO_GAIN


def odd_options_and_weights_are_refused() -> None:
    for method in (HAC(prune=1.0), HAC(rate=2.0), HAC(masked=-1.0), HAC(values=1)):
        with pytest.raises(MethodError, match=r"must be (float|int) in"):
            run_of(linear(noise(8, 8)), method)
    with pytest.raises(ModelError, match="finite"):
        run_of(linear(noise(8, 8) * torch.inf), HAC())


CASES = [
    Case(
        "hac",
        variants=(
            PAPER,
            'hac(share="ws", format="hac", masked=0.0)',
            'hac(format="shac", prune=0.5, values=4)',
        ),
        own=(
            survivors_lie_strictly_above_the_percentile,
            rounding_to_quantiles_is_unbiased,
            few_values_are_left_of_many,
            a_value_moves_as_its_weights_would,
            momentum_does_not_move_what_is_pruned,
            kmeans_finds_planted_clusters,
            kernels_are_coded_as_matrices,
            a_budget_is_met_by_pruning,
            forms_follow_the_paper,
            small_layers_are_left_alone,
            odd_options_and_weights_are_refused,
        ),
    )
]
