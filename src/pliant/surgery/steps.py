"""What an optimizer does with a gradient: how far it goes, and how it scales every entry."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from pliant.surgery.optim import Optimizers, several


def way(optimizers: Optimizers, parameter: Tensor, *, step: int, steps: int) -> float:
    """Return how far an optimizer goes in some steps along a gradient that is always the same.

    In units of that gradient, which comes on top of all others since the first step. Momentum m
    makes it up to 1 / (1 - m) times the learning rate a step, after as many steps as it takes to
    build up. For an adaptive optimizer it is the learning rates alone: see `scaling`.

    Args:
        optimizers: with the learning rate that the parameter's group has now.
        parameter: 0 is returned for one that the optimizer does not have.
        step: steps since the gradient began, the last of these included.
        steps: how many steps.
    """
    if (found := _group(optimizers, parameter)) is None:
        return 0.0
    group = found[1]
    memory = float(group.get("momentum", 0.0))
    fresh = 1.0 if group.get("nesterov") else 1.0 - float(group.get("dampening", 0.0))
    ahead = int(bool(group.get("nesterov")))
    gains = (
        (1 - memory ** (t + ahead)) / (1 - memory) if memory else 1.0
        for t in range(step - steps + 1, step + 1)
    )
    return float(group["lr"]) * (fresh if memory else 1.0) * sum(gains)


def scaling(optimizers: Optimizers, parameter: Tensor, gradient: Tensor) -> Tensor | None:
    """Return by what an adaptive optimizer multiplies every entry of a gradient; None for SGD.

    Adam divides by the root of the mean squares of the gradients so far; those of this gradient,
    which is always the same, come on top, as if it and the others were uncorrelated.
    """
    known = _group(optimizers, parameter)
    if known is None or "betas" not in known[1]:
        return None
    optimizer, group = known
    state = optimizer.state.get(parameter, {})
    squares = gradient.square()
    found = state.get("max_exp_avg_sq", state.get("exp_avg_sq"))
    if found is not None:
        squares = squares + found / (1 - group["betas"][1] ** float(state["step"]))
    return 1 / (squares.sqrt() + group["eps"])


def _group(optimizers: Optimizers, parameter: Tensor) -> tuple[Optimizer, dict[str, Any]] | None:
    """The optimizer that holds a parameter, and its group there."""
    for optimizer in several(optimizers):
        for group in optimizer.param_groups:
            if any(each is parameter for each in group["params"]):
                return optimizer, group
    return None
