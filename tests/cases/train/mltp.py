"""MLTP: its gradient by closed form and by differences, and what it leaves alone."""

from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.optim import SGD

from pliant.data import Data
from pliant.errors import DataError, MethodError, ModelError
from pliant.families.train.ahead import curvature
from pliant.methods.train.mltp import MLTP
from pliant.run import Run, start
from pliant.testing import Case

Order = Literal["second", "first", "difference"]
ORDERS: tuple[Order, ...] = ("second", "first", "difference")


def noise(*shape: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=random, dtype=torch.float64)


class Quadratic(nn.Module):
    """Gives w R, whose squares sum to w R R^T w^T."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(noise(1, 3, seed=2))

    def forward(self, root: Tensor) -> Tensor:
        return self.w @ root[0]


def half_square(output: Tensor, labels: Any) -> Tensor:
    return 0.5 * output.square().sum()


def the_gradient_of_a_quadratic_is_the_closed_form() -> None:
    """A1 w + beta (I - a A1) A2 (I - a A1) w; the first order lacks the left factor."""
    one, other = noise(1, 3, 3, seed=0), noise(1, 3, 3, seed=1)
    first, second = one[0] @ one[0].T, other[0] @ other[0].T
    ahead = torch.eye(3, dtype=torch.float64) - 0.1 * first
    for order in ORDERS:
        model = Quadratic()
        data = Data([(other, torch.zeros(1))])
        run = start(model, MLTP(0.7, 0.1, order), data=data, criterion=half_square)
        loss = half_square(model(one), None)
        found = run.loss(loss, None, (one, torch.zeros(1)))
        moved = model.w.detach() @ ahead
        value = 0.5 * (moved @ second @ moved.T)
        assert torch.allclose(found, loss + 0.7 * value.squeeze())
        found.backward()
        left = torch.eye(3, dtype=torch.float64) if order == "first" else ahead
        wanted = model.w.detach() @ first + 0.7 * moved @ second @ left
        assert model.w.grad is not None
        assert torch.allclose(model.w.grad, wanted, atol=1e-6), order


def mlp(*, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    middle = nn.BatchNorm1d(6) if norm else nn.Identity()
    return nn.Sequential(nn.Linear(4, 6), middle, nn.Tanh(), nn.Linear(6, 3)).double()


BATCHES = [(noise(8, 4, seed=seed), torch.arange(8) % 3) for seed in (0, 1)]


def asked(model: nn.Module, method: MLTP) -> Tensor:
    """The loss of the first batch; the second is drawn."""
    run = start(model, method, data=Data([BATCHES[1]]), optimizer=SGD([*model.parameters()], 0.3))
    inputs, labels = BATCHES[0]
    output = model(inputs)
    return run.loss(F.cross_entropy(output, labels), output, (inputs, labels))


def gradients_of(model: nn.Module, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def without_an_inner_step_it_is_twice_a_joined_batch() -> None:
    model = mlp()
    joined = F.cross_entropy(
        model(torch.cat([x for x, _ in BATCHES])), torch.cat([y for _, y in BATCHES])
    )
    wanted = gradients_of(model, 2 * joined)
    for order in ORDERS:
        found = gradients_of(model, asked(model, MLTP(1.0, 0.0, order)))
        assert torch.allclose(found, wanted, atol=1e-12), order


def the_gradient_is_that_of_the_two_losses() -> None:
    """By central differences of J itself, weight by weight; so too by a difference quotient."""
    model = mlp()
    names = [name for name, _ in model.named_parameters()]
    sizes = [p.numel() for p in model.parameters()]
    start_at = torch.cat([p.detach().flatten() for p in model.parameters()])

    def loss(flat: Tensor, batch: int) -> Tensor:
        parts = zip(names, flat.split(sizes), model.parameters(), strict=True)
        weights = {name: part.view_as(p) for name, part, p in parts}
        return F.cross_entropy(
            functional_call(model, weights, BATCHES[batch][0]), BATCHES[batch][1]
        )

    def both(flat: Tensor) -> Tensor:
        step = torch.func.grad(loss)(flat, 0)
        return loss(flat, 0) + 0.8 * loss(flat - 0.3 * step, 1)

    eye = 1e-5 * torch.eye(len(start_at), dtype=torch.float64)
    wanted = torch.stack([(both(start_at + e) - both(start_at - e)) / 2e-5 for e in eye])
    found = gradients_of(model, asked(model, MLTP(0.8)))  # the inner step is the learning rate
    assert (found - wanted).norm() / wanted.norm() < 1e-4
    near = gradients_of(model, asked(model, MLTP(0.8, 0.3, "difference")))
    assert (near - wanted).norm() / wanted.norm() < 1e-3
    first = gradients_of(model, asked(model, MLTP(0.8, 0.3, "first")))
    assert (first - wanted).norm() / wanted.norm() > 1e-2
    along = noise(len(start_at), seed=5)

    def gradient(at: list[Tensor]) -> list[Tensor]:
        return [torch.func.grad(loss)(at[0], 0)]

    exact = torch.func.jvp(lambda w: torch.func.grad(loss)(w, 0), (start_at,), (along,))[1]
    bent = curvature(gradient, [start_at], [along])[0]
    assert (bent - exact).norm() / exact.norm() < 1e-2


def statistics_are_those_of_the_first_batch() -> None:
    for order in ORDERS:
        model, alone = mlp(norm=True).train(), mlp(norm=True).train()
        alone(BATCHES[0][0])
        asked(model, MLTP(order=order)).backward()
        first, second = dict(model.named_buffers()), dict(alone.named_buffers())
        assert all(torch.equal(first[name], second[name]) for name in first), order


class Spare(nn.Module):
    """Has a weight that is never used, and one that does not learn."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.spare = mlp(), nn.Linear(4, 4).double()
        self.net[0].requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def unused_and_frozen_weights_do_no_harm() -> None:
    for order in ORDERS:
        model = Spare()
        asked(model, MLTP(order=order)).backward()
        assert model.net[0].weight.grad is None and model.net[3].weight.grad is not None
        assert model.spare.weight.grad is None or not model.spare.weight.grad.any()


class Once(torch.autograd.Function):
    """A square whose gradient knows no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, pull: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * pull


class Kernel(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = Once.apply(x)
        return found


def what_it_cannot_do_is_refused() -> None:
    fused = nn.Sequential(nn.Linear(4, 6), Kernel(), nn.Linear(6, 3)).double()
    with pytest.raises(ModelError, match='use order="difference" or "first"'):
        asked(fused, MLTP())
    for order in ORDERS[1:]:
        assert gradients_of(fused, asked(fused, MLTP(order=order))).isfinite().all()
    with pytest.raises(DataError, match="call pliant.start"):
        start(mlp(), MLTP(), example=(BATCHES[0][0],))
    run: Run = start(mlp(), MLTP(), data=Data([BATCHES[1]]))
    output = run.model(BATCHES[0][0])
    with pytest.raises(MethodError, match="or set alpha"):
        run.loss(F.cross_entropy(output, BATCHES[0][1]), output, BATCHES[0])


CASES = [
    Case(
        "mltp",
        variants=("mltp(order='first')", "mltp(order='difference', alpha=0.01)"),
        own=(
            the_gradient_of_a_quadratic_is_the_closed_form,
            without_an_inner_step_it_is_twice_a_joined_batch,
            the_gradient_is_that_of_the_two_losses,
            statistics_are_those_of_the_first_batch,
            unused_and_frozen_weights_do_no_harm,
            what_it_cannot_do_is_refused,
        ),
    )
]
