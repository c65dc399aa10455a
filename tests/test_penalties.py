"""Penalties of a low-rank search: every form against autograd through svdvals, step by step."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from pliant.budget import Budget
from pliant.data import Data
from pliant.errors import MethodError
from pliant.families.lowrank.frames import Frame
from pliant.math.metric import Metric
from pliant.math.norms import KNEE, POWER, SMOOTHING
from pliant.math.prox import SOFTENING
from pliant.methods.lowrank.nrmf import NRMF
from pliant.run import Run, start

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda parameters: SGD(parameters, 0.02),
    "SGD with momentum": lambda parameters: SGD(parameters, 0.02, momentum=0.9),
    "SGD with Nesterov's": lambda parameters: SGD(parameters, 0.02, momentum=0.9, nesterov=True),
    "AdamW": lambda parameters: AdamW(parameters, 5e-5, weight_decay=0.0),
}
STEPS = 60
EXAMPLE = (torch.zeros(1, 12, 5, 5),)


def root_mean_square(sigma: Tensor) -> Tensor:
    return sigma.detach().square().mean().sqrt()


# What each form minimises; where a threshold is in units of the spectrum, these units are fixed.
MINIMISED: dict[str, Callable[[Tensor], Tensor]] = {
    "soft": torch.sum,
    "gradient": torch.sum,
    "relative": lambda s: s.detach().max() * s.sum(),
    "reweighted": lambda s: (
        root_mean_square(s) ** 2 * (s + SOFTENING * root_mean_square(s)).log().sum()
    ),
    "logdet": lambda s: (s.square() / (KNEE * s.square().mean())).log1p().sum(),
    "schatten": lambda s: (s.square() + SMOOTHING**2).pow(POWER / 2).sum(),
    "hoyer": lambda s: s.sum() / s.norm(),
}


def unfoldings(weight: Tensor) -> list[Tensor]:
    return [weight.flatten(1), weight.transpose(0, 1).flatten(1)]


def nuclear(weight: Tensor) -> float:
    return sum(float(torch.linalg.svdvals(m).sum()) for m in unfoldings(weight.detach().double()))


def kernel() -> nn.Sequential:
    noise = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Conv2d(12, 16, 3, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(16, 12, 3, 3, generator=noise) / 10)
    return model


def trained(
    model: nn.Sequential, optimizer: Optimizer, noise: float, act: Callable[[int], None]
) -> float:
    """Take steps on the same random gradients; return the nuclear norm lost per step."""
    random = torch.Generator().manual_seed(1)
    before, weight = nuclear(model[0].weight), model[0].weight
    for step in range(STEPS):
        weight.grad = noise * torch.randn(weight.shape, generator=random)
        act(step)
    return (before - nuclear(weight)) / STEPS


def lost(form: str, which: str, noise: float, alpha: float) -> tuple[float, float]:
    """What a form takes per step, and what autograd does; what noise alone does is left out."""
    plainly, own, theirs = kernel(), kernel(), kernel()
    optimizers = [OPTIMIZERS[which](model.parameters()) for model in (plainly, own, theirs)]
    method: Any = NRMF(alpha=alpha, shrinkage=form, interval=5, keep_norm=False, search=1.0)
    run = start(own, method, example=EXAMPLE, optimizer=optimizers[1], steps=10**6)

    def with_autograd(step: int) -> None:
        weight = theirs[0].weight
        value = sum(MINIMISED[form](torch.linalg.svdvals(m)) for m in unfoldings(weight))
        (gradient,) = torch.autograd.grad(value, weight)
        weight.grad += alpha * gradient
        optimizers[2].step()

    def with_method(step: int) -> None:
        run.before_step()
        optimizers[1].step()
        run.after_step()

    nothing = trained(plainly, optimizers[0], noise, lambda step: optimizers[0].step())
    found = trained(own, optimizers[1], noise, with_method)
    expected = trained(theirs, optimizers[2], noise, with_autograd)
    return found - nothing, expected - nothing


@pytest.mark.parametrize("noise", [0.0, 0.05])
@pytest.mark.parametrize("which", OPTIMIZERS)
@pytest.mark.parametrize("form", MINIMISED)
def test_a_form_takes_as_much_per_step_as_autograd_does(
    form: str, which: str, noise: float
) -> None:
    alpha = {"hoyer": 0.01, "relative": 0.02, "reweighted": 0.05}.get(form, 0.005)
    found, expected = lost(form, which, noise, alpha)
    near = 1e-3 if form in ("gradient", "logdet", "schatten", "hoyer") else 0.1
    if which == "AdamW" and not noise and near > 0.01:
        near = 0.2  # steps along the signs alone also stir what has no force: that costs some of it
    assert found == pytest.approx(expected, rel=near), (found, expected)


def run_of(model: nn.Module, method: NRMF, optimizer: Optimizer, **more: Any) -> Run:
    return start(model, method, optimizer=optimizer, steps=100, **more)


def test_every_group_has_its_own_rate() -> None:
    """One layer learns ten times as fast as the other, a third does not learn: 0.1, 0.01, 0."""
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(3)))
    for layer in model:
        nn.init.eye_(layer.weight)
    rates = [{"params": [model[0].weight], "lr": 0.1}, {"params": [model[1].weight], "lr": 0.01}]
    method = NRMF(alpha=1.0, shrinkage="soft", interval=1, keep_norm=False, search=1.0, samples=0)
    run_of(model, method, SGD(rates), example=(torch.zeros(1, 4),)).after_step()
    for layer, left in zip(model, (0.9, 0.99, 1.0), strict=True):
        assert torch.allclose(layer.weight, left * torch.eye(4), atol=1e-6)


@pytest.mark.parametrize("form", ["gradient", "schatten"])
def test_a_gradient_that_keeps_the_norm_moves_across_the_kernel_only(form: Any) -> None:
    for keep_norm in (True, False):
        model = kernel()
        method = NRMF(alpha=1.0, shrinkage=form, keep_norm=keep_norm, search=1.0)
        run = run_of(model, method, SGD(model.parameters(), 0.1), example=EXAMPLE)
        model[0].weight.grad = torch.zeros_like(model[0].weight)
        run.before_step()
        pull, weight = model[0].weight.grad, model[0].weight.detach()
        along = float((pull * weight).sum() / (pull.norm() * weight.norm()))
        assert pull.norm() > 0.5 and (abs(along) < 1e-5 if keep_norm else along > 0.5)


def reading(model: nn.Module, spread: Tensor, count: int = 512) -> Data:
    """Images whose channels vary as told, and labels that the network itself would give."""
    noise = torch.Generator().manual_seed(3)
    images = torch.randn(count, len(spread), 5, 5, generator=noise) * spread[:, None, None]
    with torch.no_grad():
        return Data((images, model(images).argmax(1)), classes=16)


def classifier() -> nn.Sequential:
    return nn.Sequential(*kernel(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def test_a_frame_keeps_the_norm_and_is_left_as_it_was_entered() -> None:
    noise = torch.Generator().manual_seed(2)
    weight = torch.randn(6, 4, 3, 3, generator=noise)
    rows = torch.randn(50, 36, generator=noise)
    frame = Frame.of(Metric(rows.T @ rows, torch.diag(torch.arange(1.0, 7.0))), weight)
    whitened = frame.enter(weight)
    assert whitened.norm() == pytest.approx(float(weight.norm()), rel=1e-4)
    assert torch.allclose(frame.leave(whitened), weight, atol=1e-4)
    assert Frame().enter(weight) is weight and Frame().leave(weight) is weight


def test_the_whitened_gradient_is_that_of_the_whitened_kernel() -> None:
    model = classifier()
    data = reading(model, torch.ones(12))
    method = NRMF(
        alpha=0.5, shrinkage="gradient", space="whitened", keep_norm=False, search=1.0, samples=64
    )
    run = run_of(model, method, SGD(model.parameters(), 0.1), data=data)
    weight = model[0].weight
    frame = Frame(*run.state["frames"]["0"])
    value = sum(torch.linalg.svdvals(m).sum() for m in unfoldings(frame.enter(weight)))
    (expected,) = torch.autograd.grad(value, weight)
    weight.grad = torch.zeros_like(weight)
    run.before_step()
    assert torch.allclose(weight.grad, 0.5 * expected, atol=1e-4)
    assert not torch.allclose(frame.enter(weight), weight, atol=0.05)


@pytest.mark.parametrize("keep_norm", [False, True])
@pytest.mark.parametrize("space", ["weights", "whitened"])
def test_a_plan_pulls_along_the_way_to_what_it_leaves(space: Any, keep_norm: bool) -> None:
    """The gradient of half the squared distance, without its part along the kernel or with it."""
    model = classifier()
    options: dict[str, Any] = {"space": space, "keep_norm": keep_norm, "samples": 64}
    method = NRMF(alpha=0.5, shrinkage="planned", search=1.0, **options)
    data = reading(model, torch.linspace(0.1, 2, 12))
    run = run_of(model, method, SGD(model.parameters(), 0.1), data=data, budget=Budget(params=0.5))
    weight, goal = model[0].weight, run.state["goals"]["0"]
    frame = Frame(*run.state["frames"].get("0", ()))
    inner = frame.enter(weight).detach().requires_grad_()
    value = (inner - frame.enter(goal)).square().sum() / 2
    (expected,) = torch.autograd.grad(value, inner)
    if keep_norm:
        along = inner.detach() / inner.detach().norm()
        expected = expected - along * (along * expected).sum()
    weight.grad = torch.zeros_like(weight)
    run.before_step()
    assert torch.allclose(weight.grad, 0.5 * frame.enter(expected), atol=1e-5)
    assert float(weight.grad.norm()) > 0.01


def test_a_plan_spends_the_budget_on_all_layers_also_those_it_does_not_pull_at() -> None:
    """Most numbers are in a table, whose weight is not pulled at: without it no plan would fit."""
    model = nn.Sequential(nn.Embedding(200, 16), nn.Linear(16, 8))
    method = NRMF(shrinkage="planned", search=1.0, samples=0)
    example = (torch.zeros(1, 4, dtype=torch.long),)
    optimizer = SGD(model.parameters(), 0.1)
    run = run_of(model, method, optimizer, example=example, budget=Budget(params=0.15))
    for layer in (model[0], model[1]):
        layer.weight.grad = torch.zeros_like(layer.weight)
    run.before_step()
    assert not model[0].weight.grad.any() and model[1].weight.grad.any()


@pytest.mark.parametrize("form", ["soft", "gradient"])
def test_what_is_hardly_read_dies_first_in_the_whitened_space(form: Any) -> None:
    """Half of the channels vary a hundred times less than the others: theirs shrink the most."""
    spread = torch.cat([torch.ones(6), torch.full((6,), 0.01)])
    shares = {}
    for space in ("weights", "whitened"):
        model = classifier()
        options: dict[str, Any] = {"alpha": 0.05, "interval": 1, "keep_norm": False}
        method = NRMF(shrinkage=form, space=space, search=1.0, samples=256, **options)  # type: ignore[arg-type]
        optimizer = SGD(model.parameters(), 0.1)
        run = run_of(model, method, optimizer, data=reading(model, spread))
        before = model[0].weight.detach().square().sum((0, 2, 3)).sqrt()
        for _ in range(20):
            model[0].weight.grad = torch.zeros_like(model[0].weight)
            run.before_step()
            optimizer.step()
            run.after_step()
        left = model[0].weight.detach().square().sum((0, 2, 3)).sqrt() / before
        shares[space] = float(left[6:].mean() / left[:6].mean())
    assert shares["weights"] == pytest.approx(1, abs=0.1)
    if form == "soft":
        assert shares["whitened"] < 0.5 * shares["weights"]


def test_statistics_are_refreshed_and_whitening_needs_data() -> None:
    model = classifier()
    data, method = reading(model, torch.ones(12)), NRMF(space="whitened", search=1.0, samples=32)
    run = run_of(model, method, SGD(model.parameters(), 0.1), data=data)
    first = copy.deepcopy(run.state["frames"]["0"])
    changed = []
    for step in range(1, 100):
        with torch.no_grad():
            model[0].weight.mul_(1.01)
        run.after_step()
        if not torch.equal(run.state["frames"]["0"][0], first[0]):
            changed.append(step)
            first = copy.deepcopy(run.state["frames"]["0"])
    assert changed == [20, 40, 60, 80]
    with pytest.raises(MethodError, match='pass data and samples above 0, or take space="weights"'):
        other = classifier()
        run_of(other, method, SGD(other.parameters(), 0.1), example=EXAMPLE)
