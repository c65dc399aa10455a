"""Carries an optimizer over a change, adds to gradients, and spares parameters from decay."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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
    """Put every parameter where the larger one was, with the part of its state that it keeps."""
    rows = zip(replaced.removed, replaced.added, replaced.cuts, strict=True)
    for old, new, cut in rows:
        for group in optimizer.param_groups:
            group["params"][:] = [new if p is old else p for p in group["params"]]
        if old not in optimizer.state:
            continue
        state = optimizer.state.pop(old)
        optimizer.state[new] = {
            key: cut(value) if isinstance(value, Tensor) and value.shape == old.shape else value
            for key, value in state.items()
        }


def add_gradient(model: nn.Module, penalty: Tensor) -> None:
    """Add the gradient of a penalty to those that the parameters have."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients: Sequence[Tensor | None] = torch.autograd.grad(penalty, parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


@torch.no_grad()
def cancel_decay(optimizer: Optimizer | None, parameters: Iterable[Tensor]) -> None:
    """Undo beforehand the weight decay that the coming step does to these parameters.

    Call it right before the step, with complete gradients. The optimizer keeps its groups, so it
    may be made before or after the method begins, by any trainer, and its state loads as before.
    Decay that joins the gradient (SGD, Adam) is taken off the gradient; decay that scales the
    weights (AdamW) is divided out of them. Nothing happens without an optimizer.
    """
    spared = {id(parameter) for parameter in parameters}
    for group in optimizer.param_groups if optimizer is not None else ():
        decay = float(group.get("weight_decay") or 0.0)
        for parameter in group["params"]:
            if not decay or id(parameter) not in spared or parameter.grad is None:
                continue
            if group.get("decoupled_weight_decay"):
                parameter.div_(1 - float(group["lr"]) * decay)
            else:
                sign = -1.0 if group.get("maximize") else 1.0
                parameter.grad.sub_(parameter, alpha=sign * decay)
