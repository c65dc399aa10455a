"""Losses and gradients at other weights than those of a network, and their change along a line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pliant.cost import Example, call, twin
from pliant.data import batch_of
from pliant.errors import ModelError
from pliant.math.alone import forked
from pliant.observe.aside import other_batch
from pliant.observe.outputs import logits
from pliant.run import Run

Weights = Mapping[str, Tensor]
REACH = 1e-2  # length of the step of the difference quotient


def after_step(
    run: Run,
    loss: Tensor,
    mine: tuple[Example, Any],
    other: tuple[Example, Any],
    inner: float,
    order: str,
) -> Tensor:
    """Return the loss of another batch after a gradient step on this one.

    Args:
        run: of the network.
        loss: of this batch, with its graph.
        mine: inputs and labels of this batch.
        other: those of the other one.
        inner: length of the step.
        order: "second" keeps the step's own gradient, "first" takes it for a constant, and
            "difference" replaces it by a difference quotient of the task's loss.
    """
    names, weights = trained(run.model)

    def at(values: Iterable[Tensor], batch: tuple[Example, Any]) -> Tensor:
        return loss_at(run, dict(zip(names, values, strict=True)), *batch)

    grads = gradient_of(loss, weights, twice=order == "second", again=True)
    if order != "difference":
        return at([w - inner * g for w, g in zip(weights, grads, strict=True)], other)
    fixed = [w.detach() for w in weights]
    moved = [(w - inner * g).requires_grad_() for w, g in zip(fixed, grads, strict=True)]
    second = at(moved, other)
    pulls = gradient_of(second, moved)
    bent = curvature(lambda values: gradient_of(at(values, mine), values), fixed, pulls)
    pulls = [pull - inner * bend for pull, bend in zip(pulls, bent, strict=True)]
    # A number equal to the second loss, whose gradient is the one that was found.
    moves = [((w - w.detach()) * p).sum() for w, p in zip(weights, pulls, strict=True)]
    return second.detach() + torch.stack(moves).sum()


def curvature(
    gradient: Callable[[list[Tensor]], list[Tensor]], at: list[Tensor], along: list[Tensor]
) -> list[Tensor]:
    """Return the Hessian times a vector, by a difference of two gradients.

    Args:
        gradient: of some loss, at weights that require gradients.
        at: the weights.
        along: the vector, in parts like the weights.
    """
    length = torch.stack([part.square().sum() for part in along]).sum().sqrt()
    step = REACH / length.clamp_min(1e-12)
    sides = [
        gradient([(w + sign * step * v).requires_grad_() for w, v in zip(at, along, strict=True)])
        for sign in (1, -1)
    ]
    return [(one - other) / (2 * step) for one, other in zip(*sides, strict=True)]


def loss_at(run: Run, weights: Weights, inputs: Example, labels: Any) -> Tensor:
    """Return the task's loss with other weights; statistics of the network stay as they are."""
    apart = {name: buffer.clone() for name, buffer in run.model.named_buffers()}
    args, named = ((), dict(inputs)) if isinstance(inputs, Mapping) else (tuple(inputs), {})
    with other_batch():
        output = functional_call(run.model, {**apart, **weights}, args, named)
    return run.task_loss(output, batch_of(inputs, labels))


def gradient_of(
    loss: Tensor, weights: Iterable[Tensor], *, twice: bool = False, again: bool = False
) -> list[Tensor]:
    """Return the gradient; 0 where the loss does not depend on a weight."""
    weights = [*weights]
    found = torch.autograd.grad(
        loss, weights, create_graph=twice, retain_graph=again or twice, allow_unused=True
    )
    return [torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True)]


def trained(model: nn.Module) -> tuple[list[str], list[Tensor]]:
    """Return the parameters that learn, with their names."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [name for name, _ in named], [p for _, p in named]


def check_twice(model: nn.Module, example: Example) -> None:
    """Differentiate a copy twice.

    Raises:
        ModelError: it cannot be.
    """
    trial = twin(model).train()
    with forked(), torch.enable_grad():
        weights = trained(trial)[1]
        squares = logits(call(trial, example)).square().mean()
        try:
            grads = gradient_of(squares, weights, twice=True)
            torch.stack([g.square().sum() for g in grads]).sum().backward()
        except RuntimeError as error:
            raise ModelError(
                f"mltp differentiates twice, but {type(model).__name__} cannot be so "
                f'({str(error).splitlines()[0].rstrip(".")}): use order="difference" or "first".'
            ) from error
