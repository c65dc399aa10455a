"""Training methods: what their penalties do to weights, by hand."""

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from pliant.errors import MethodError
from pliant.math.filters import filter_norms, norm_gap
from pliant.methods.train.norm_loss import NormLoss
from pliant.run import Run, start
from pliant.surgery.optim import cancel_decay
from pliant.testing import Case


def rows(*norms: float) -> nn.Sequential:
    """A Linear whose filters have these norms, in float64."""
    model = nn.Sequential(nn.Linear(3, len(norms), bias=False, dtype=torch.float64))
    random = torch.Generator().manual_seed(0)
    directions = torch.randn(len(norms), 3, generator=random, dtype=torch.float64)
    with torch.no_grad():
        unit = directions / directions.norm(dim=1, keepdim=True)
        model[0].weight.copy_(unit * torch.tensor(norms, dtype=torch.float64)[:, None])
    return model


def begun(model: nn.Module, method: NormLoss, lr: float = 0.1, decay: float = 0.0) -> Run:
    optimizer = SGD(model.parameters(), lr, weight_decay=decay)
    example = (torch.zeros(1, 3, dtype=torch.float64),)
    return start(model, method, example=example, optimizer=optimizer, steps=100)


def step(run: Run) -> None:
    """One step without any task: gradients are zero but for the method's."""
    assert run.optimizer is not None
    for parameter in run.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    run.before_step()
    run.optimizer.step()
    run.after_step()


def the_gradient_is_radial() -> None:
    """It is 2 (1 - 1/|w|) w: no part of it is tangential; at zero it is zero."""
    weight = rows(0.5, 1.0, 3.0)[0].weight
    norm_gap(filter_norms(weight)).backward()
    norms = weight.detach().norm(dim=1, keepdim=True)
    assert weight.grad is not None
    assert torch.allclose(weight.grad, 2 * (1 - 1 / norms) * weight, atol=1e-6)
    along = weight.detach() / norms
    tangential = weight.grad - (weight.grad * along).sum(1, keepdim=True) * along
    assert tangential.abs().max() < 1e-12
    zero = torch.zeros(2, 3, requires_grad=True)
    norm_gap(filter_norms(zero)).backward()
    assert zero.grad is not None and torch.equal(zero.grad, torch.zeros(2, 3))


def norms_of(kernel: Tensor, **layout: int) -> list[float]:
    return filter_norms(kernel, **layout).tolist()  # type: ignore[arg-type]


def filters_are_those_of_the_output_channels() -> None:
    """Grouped, transposed and both: 3 and 4 in two places of one filter make 5."""
    kernel = torch.zeros(4, 2, 3)
    kernel[1, 0, 0], kernel[1, 1, 2] = 3.0, 4.0
    assert norms_of(kernel) == pytest.approx([0, 5, 0, 0], abs=1e-5)
    assert norms_of(kernel, transposed=True) == pytest.approx([3, 4], abs=1e-5)
    found = norms_of(kernel, transposed=True, groups=2)  # inputs 0 and 1 are of the first group
    assert found == pytest.approx([3, 4, 0, 0], abs=1e-5)


def norms_follow_the_closed_form(method: NormLoss) -> None:
    start_at = torch.tensor([0.2, 0.9, 4.0], dtype=torch.float64)
    run = begun(rows(*start_at.tolist()), method)
    directions = run.model[0].weight / run.model[0].weight.norm(dim=1, keepdim=True)  # type: ignore[index]
    for _ in range(100):
        step(run)
    weight = run.model[0].weight.detach()  # type: ignore[index]
    expected = 1 + (1 - 2 * 0.1 * method.weight) ** 100 * (start_at - 1)
    assert torch.allclose(weight.norm(dim=1), expected, atol=1e-5)
    assert torch.allclose(weight / weight.norm(dim=1, keepdim=True), directions, atol=1e-8)


def norms_approach_one_geometrically() -> None:
    """n_t - 1 = (1 - 2 lr lambda)^t (n_0 - 1), as a gradient and decoupled alike under SGD."""
    norms_follow_the_closed_form(NormLoss(weight=0.1))
    norms_follow_the_closed_form(NormLoss(weight=0.1, decoupled=True))


def too_long_a_step_diverges() -> None:
    """At lr lambda = 1.05 the distance to one grows by 1.1 each step, while no norm is near 0."""
    run = begun(rows(1.01), NormLoss(weight=10.0), lr=0.105)
    for _ in range(20):
        step(run)
    gap = float(run.model[0].weight.detach().norm()) - 1  # type: ignore[index]
    assert gap == pytest.approx(0.01 * 1.1**20, rel=1e-3)
    with pytest.raises(MethodError, match=r"weight must be float in 0\.\.10"):
        begun(rows(1.0), NormLoss(weight=11.0))


def it_takes_the_place_of_weight_decay() -> None:
    """Filters on the manifold stay there, though the optimizer decays; others shrink by decay."""
    run = begun(rows(1.0, 1.0), NormLoss(weight=0.1), decay=0.5)
    before = run.model[0].weight.detach().clone()  # type: ignore[index]
    step(run)
    assert torch.allclose(run.model[0].weight, before, atol=1e-12)  # type: ignore[index]
    run = begun(rows(1.0, 1.0), NormLoss(weight=0.1, replace_decay=False), decay=0.5)
    step(run)
    assert torch.allclose(run.model[0].weight, before * (1 - 0.1 * 0.5))  # type: ignore[index]


def decay_is_cancelled_of_every_kind() -> None:
    """SGD adds it to the gradient, AdamW scales the weights: either way one moves and one stays."""
    for kind in (SGD, AdamW):
        spared, other = (nn.Parameter(torch.tensor([2.0, -3.0])) for _ in range(2))
        optimizer: Optimizer = kind([spared, other], lr=0.1, weight_decay=0.5)  # type: ignore[operator]
        for parameter in (spared, other):
            parameter.grad = torch.zeros(2)
        cancel_decay(optimizer, [spared])
        optimizer.step()
        assert torch.allclose(spared, torch.tensor([2.0, -3.0]), atol=1e-6)
        assert torch.allclose(other, 0.95 * torch.tensor([2.0, -3.0]), atol=1e-6)
    cancel_decay(None, [spared])


def patterns_choose_and_shared_weights_count_once() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    model = nn.Sequential(first, second, nn.Linear(3, 2)).double()
    whole = begun(model, NormLoss(weight=1.0)).method.penalty
    both = sum(norm_gap(filter_norms(layer.weight)) for layer in (first, model[2]))
    run = begun(model, NormLoss(weight=1.0))
    assert torch.isclose(whole(run), both)  # type: ignore[arg-type]
    run = begun(model, NormLoss(weight=1.0, exclude=("2",)))
    only_first = norm_gap(filter_norms(first.weight))
    assert torch.isclose(run.method.penalty(run), only_first)  # type: ignore[arg-type]
    run.after_epoch()
    norms = first.weight.detach().norm(dim=1)
    assert run.log[-1]["filter_norms"] == pytest.approx(
        [float(norms.mean()), float(norms.std(correction=0))]
    )
    with pytest.raises(MethodError, match="'conv' matches none"):
        begun(model, NormLoss(only=("conv",)))


CASES = [
    Case(
        "norm_loss",
        spec="norm_loss(weight=0.1)",
        variants=("norm_loss(weight=0.1, decoupled=True, replace_decay=False)",),
        witnesses={
            "replace_decay": it_takes_the_place_of_weight_decay,
        },
        own=(
            the_gradient_is_radial,
            filters_are_those_of_the_output_channels,
            norms_approach_one_geometrically,
            too_long_a_step_diverges,
            it_takes_the_place_of_weight_decay,
            decay_is_cancelled_of_every_kind,
            patterns_choose_and_shared_weights_count_once,
        ),
    )
]
