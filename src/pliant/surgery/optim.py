"""Carries an optimizer across a change of the model's parameters; gradients, and what it does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pliant.edits import Replaced


def carry(optimizer: Optimizer, replaced: Replaced) -> None:
    """Put the new parameters where the old ones were, keeping the state of all that survived.

    The new parameters join the group of the parameter they replace, with its learning rate and
    weight decay. SGD's momentum is linear in the gradient, so it is carried over by the chain
    rule; adaptive state (Adam's squares) is not, so those parameters start afresh. Where a
    parameter lost some of its rows, all of its state loses the same ones and nothing else changes.
    Groups and state are changed in place: schedulers and wrappers keep seeing them.
    """
    if replaced.cuts:
        _cut(optimizer, replaced)
        return
    gone, added = {id(parameter) for parameter in replaced.removed}, list(replaced.added)
    for group in optimizer.param_groups:
        places = [i for i, parameter in enumerate(group["params"]) if id(parameter) in gone]
        if not places:
            continue
        kept = [parameter for parameter in group["params"] if id(parameter) not in gone]
        kept[places[0] : places[0]] = added
        added = []  # of what was in several groups, the first one takes it
        group["params"][:] = kept
        states = [optimizer.state.pop(parameter, {}) for parameter in replaced.removed]
        momentum = states[0].get("momentum_buffer") if states else None
        if momentum is not None and replaced.project is not None:
            carried = replaced.project(momentum)
            for parameter, value in zip(replaced.added, carried, strict=True):
                optimizer.state[parameter]["momentum_buffer"] = value.to(parameter.dtype)


def _cut(optimizer: Optimizer, replaced: Replaced) -> None:
    """Put every parameter where the other one was, with the part of its state that it keeps."""
    squares = replaced.squares or replaced.cuts
    rows = zip(replaced.removed, replaced.added, replaced.cuts, squares, strict=True)
    for old, new, cut, square in rows:
        for group in optimizer.param_groups:
            group["params"][:] = [new if p is old else p for p in group["params"]]
        if old not in optimizer.state:
            continue
        state = optimizer.state.pop(old)
        optimizer.state[new] = {
            key: (square if key.endswith("_sq") else cut)(value)
            if isinstance(value, Tensor) and value.shape == old.shape
            else value
            for key, value in state.items()
        }


def add_gradient(model: nn.Module, penalty: Tensor) -> None:
    """Add the gradient of a penalty to those that the parameters have."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients: Sequence[Tensor | None] = torch.autograd.grad(penalty, parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


def way(optimizer: Optimizer, parameter: Tensor, *, step: int, steps: int) -> float:
    """Return how far an optimizer goes in some steps along a gradient that is always the same.

    In units of that gradient, which comes on top of all others since the first step. Momentum m
    makes it up to 1 / (1 - m) times the learning rate a step, after as many steps as it takes to
    build up. For an adaptive optimizer it is the learning rates alone: see `scaling`.

    Args:
        optimizer: with the learning rate that the parameter's group has now.
        parameter: 0 is returned for one that the optimizer does not have.
        step: steps since the gradient began, the last of these included.
        steps: how many steps.
    """
    if (group := _group(optimizer, parameter)) is None:
        return 0.0
    memory = float(group.get("momentum", 0.0))
    fresh = 1.0 if group.get("nesterov") else 1.0 - float(group.get("dampening", 0.0))
    ahead = int(bool(group.get("nesterov")))
    gains = (
        (1 - memory ** (t + ahead)) / (1 - memory) if memory else 1.0
        for t in range(step - steps + 1, step + 1)
    )
    return float(group["lr"]) * (fresh if memory else 1.0) * sum(gains)


def scaling(optimizer: Optimizer, parameter: Tensor, gradient: Tensor) -> Tensor | None:
    """Return by what an adaptive optimizer multiplies every entry of a gradient; None for SGD.

    Adam divides by the root of the mean squares of the gradients so far; those of this gradient,
    which is always the same, come on top, as if it and the others were uncorrelated.
    """
    group, state = _group(optimizer, parameter), optimizer.state.get(parameter, {})
    if group is None or "betas" not in group:
        return None
    squares = gradient.square()
    found = state.get("max_exp_avg_sq", state.get("exp_avg_sq"))
    if found is not None:
        squares = squares + found / (1 - group["betas"][1] ** float(state["step"]))
    return 1 / (squares.sqrt() + group["eps"])


def _group(optimizer: Optimizer, parameter: Tensor) -> dict[str, Any] | None:
    """The parameter group of a parameter."""
    for group in optimizer.param_groups:
        if any(each is parameter for each in group["params"]):
            return group
    return None
