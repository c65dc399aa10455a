"""MLTP: the step that helps one batch shall help another too."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from torch.func import functional_call

from pliant.cost import Example, call
from pliant.data import batch_of, unpack
from pliant.errors import DataError, MethodError, ModelError
from pliant.math.alone import forked
from pliant.method import Method
from pliant.observe.outputs import logits
from pliant.observe.watch import samples
from pliant.registry import In, Paper, register
from pliant.run import Run

Weights = Mapping[str, Tensor]
REACH = 1e-2  # length of the step of the difference quotient


@register(
    "mltp",
    paper=Paper(
        "Is the Meta-Learning Idea Able to Improve the Generalization of Deep Neural Networks on "
        "the Standard Supervised Learning?",
        "X. Deng, Z. Zhang",
        "ICPR",
        2020,
        "https://arxiv.org/abs/2002.12455",
    ),
)
@dataclass(frozen=True)
class MLTP(Method):
    """Trains so that the gradient step on a batch lowers the loss of another batch, too.

    Every batch is a task, and a second one of the same size is drawn beside it. The loss is
    L(w; B1) + beta L(w - alpha grad L(w; B1); B2), which rewards batches whose gradients agree.
    Batch norms note the statistics of the first batch only. A step costs two passes in the first
    order, about four in the second, and the memory of both; the network stays as it is.

    *Departs from the paper*: how the two losses are weighed is our reading of its abstract.

    >>> MLTP(order="first").beta
    1.0
    """

    beta: Annotated[float, In(0, 100)] = 1.0  # weight of the second batch
    alpha: Annotated[float, In(0, 100)] | None = None  # inner step; None: the learning rate
    # second: exact; first: as if the inner gradient were constant; difference: its change by a
    # difference quotient, for networks that cannot be differentiated twice
    order: Literal["second", "first", "difference"] = "second"

    def refuse(self, run: Run) -> None:
        """Refuse a run without data, and a network that cannot be differentiated twice."""
        if not run.has_inputs:
            raise DataError(
                "mltp draws a second batch at every step, and the run has no training data: call "
                "pliant.start(..., data=data)."
            )
        assert run.data is not None
        if self.order == "second":
            _check_twice(run.model, run.data.example(2))

    def loss(self, run: Run, loss: Tensor, output: Any, batch: Any) -> Tensor:
        """Add the loss of another batch after a step on this one."""
        mine = unpack(batch)
        other = run.draw(samples(mine[0]))
        names, weights = _trained(run.model)
        inner = self._inner(run)
        grads = _gradient(loss, weights, twice=self.order == "second", again=True)
        if self.order != "difference":
            ahead = [w - inner * g for w, g in zip(weights, grads, strict=True)]
            return loss + self.beta * _loss(run, dict(zip(names, ahead, strict=True)), *other)
        ahead = [
            (w.detach() - inner * g).requires_grad_() for w, g in zip(weights, grads, strict=True)
        ]
        second = _loss(run, dict(zip(names, ahead, strict=True)), *other)
        pulls = _gradient(second, ahead)

        def gradient(at: list[Tensor]) -> list[Tensor]:
            return _gradient(_loss(run, dict(zip(names, at, strict=True)), *mine), at)

        bent = curvature(gradient, [w.detach() for w in weights], pulls)
        pulls = [pull - inner * bend for pull, bend in zip(pulls, bent, strict=True)]
        # A number equal to the second loss, whose gradient is the one that was found.
        moves = [((w - w.detach()) * p).sum() for w, p in zip(weights, pulls, strict=True)]
        return loss + self.beta * (second.detach() + torch.stack(moves).sum())

    def _inner(self, run: Run) -> float:
        """Return alpha, the length of the inner step."""
        if self.alpha is not None:
            return self.alpha
        if run.optimizer is None:
            raise MethodError(
                "mltp steps by the learning rate, but the run has no optimizer: hand it over, "
                "pliant.start(..., optimizer=optimizer), or set alpha."
            )
        return run.lr


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


def _loss(run: Run, weights: Weights, inputs: Example, labels: Any) -> Tensor:
    """Return the task's loss with other weights; statistics of the network stay as they are."""
    apart = {name: buffer.clone() for name, buffer in run.model.named_buffers()}
    args, named = ((), dict(inputs)) if isinstance(inputs, Mapping) else (tuple(inputs), {})
    output = functional_call(run.model, {**apart, **weights}, args, named)
    return run.task_loss(output, batch_of(inputs, labels))


def _gradient(
    loss: Tensor, weights: Iterable[Tensor], *, twice: bool = False, again: bool = False
) -> list[Tensor]:
    """Return the gradient; 0 where the loss does not depend on a weight."""
    weights = [*weights]
    found = torch.autograd.grad(
        loss, weights, create_graph=twice, retain_graph=again or twice, allow_unused=True
    )
    return [torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True)]


def _trained(model: torch.nn.Module) -> tuple[list[str], list[Tensor]]:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [name for name, _ in named], [p for _, p in named]


def _check_twice(model: torch.nn.Module, example: Example) -> None:
    """Differentiate a copy twice.

    Raises:
        ModelError: it cannot be.
    """
    trial = copy.deepcopy(model).train()
    with forked(), torch.enable_grad():
        weights = _trained(trial)[1]
        squares = logits(call(trial, example)).square().mean()
        try:
            grads = _gradient(squares, weights, twice=True)
            torch.stack([g.square().sum() for g in grads]).sum().backward()
        except RuntimeError as error:
            raise ModelError(
                f"mltp differentiates twice, but {type(model).__name__} cannot be "
                f'({str(error).splitlines()[0].rstrip(".")}): use order="difference" or "first".'
            ) from error
