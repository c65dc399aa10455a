"""Carries an optimizer over a change, adds to gradients, and spares parameters from decay."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from pliant.edits import Replaced
from pliant.errors import MethodError, TrainingError, must_be

Optimizers = Optimizer | Sequence[Optimizer] | None
"""What a caller may have: one optimizer, several, or none."""
Names = Mapping[int, str]


def several(optimizers: Optimizers) -> list[Optimizer]:
    """Return one optimizer, several or none as a list."""
    if isinstance(optimizers, Optimizer):
        return [optimizers]
    return list(optimizers or ())


def check_holds(model: nn.Module, optimizers: Optimizers) -> None:
    """Refuse an optimizer of other parameters: it would follow nothing.

    Raises:
        TrainingError: it holds none of the model.
    """
    mine = {id(parameter) for parameter in model.parameters()}
    words = "an optimizer of PyTorch, or a list of them"
    must_be(Optimizer | Sequence | None, "optimizer", optimizers, TrainingError, words)
    for optimizer in several(optimizers):
        must_be(Optimizer, "optimizer", optimizer, TrainingError, words)
        groups = optimizer.param_groups
        if not any(id(parameter) in mine for group in groups for parameter in group["params"]):
            raise TrainingError(
                f"The {type(optimizer).__name__} holds no parameter of the network, a "
                f"{type(model).__name__}; make it from this very network, after it was copied."
            )


def check_rate(rate: float, optimizers: Optimizers, method: str) -> None:
    """See that there is an optimizer whose learning rate a method can multiply.

    Raises:
        MethodError: there is none, and the factor is not 1.
    """
    if rate != 1 and not several(optimizers):
        raise MethodError(
            f"{method} multiplies the learning rate, but the run has no optimizer: hand it over, "
            "pliant.start(..., optimizer=optimizer) or run.optimizer = optimizer."
        )


def carry(optimizers: Optimizers, replaced: Replaced, names: Names | None = None) -> None:
    """Put the new parameters where the old ones were, keeping the state of all that survived.

    A new parameter joins the group of the one it replaces, with its learning rate and weight
    decay; where several left, that of the first with as many axes, so that biases stay among
    biases; where none left, that of the nearest one. What stands for parameters that no optimizer
    held is held by none. SGD's momentum is linear in the gradient, so it is carried over by the
    chain rule; adaptive state (Adam's squares) is not, so those parameters start afresh. Where a
    parameter lost or gained rows, all of its state does alike and nothing else changes. LBFGS,
    whose state is one vector of all parameters, starts afresh. Groups
    and state are changed in place: schedulers and wrappers keep seeing them.

    Args:
        optimizers: of the model.
        replaced: what took whose place.
        names: of the new parameters by `id`, for optimizers that were made with names.
    """
    known = several(optimizers)
    for optimizer in known:
        if isinstance(optimizer, LBFGS):  # its state is one vector of all parameters
            optimizer.state.clear()
            optimizer._numel_cache = None
    if replaced.cuts:
        squares = replaced.squares or replaced.cuts
        rows = zip(replaced.removed, replaced.added, replaced.cuts, squares, strict=True)
        for old, new, cut, square in rows:
            for optimizer in known:
                _cut(optimizer, old, new, (cut, square), names or {})
        return
    _join(known, replaced, names or {})
    parents = _parents(known, replaced)
    for optimizer in known:
        states = [optimizer.state.pop(old, {}) for old in replaced.removed]
        for group in optimizer.param_groups:
            for old in replaced.removed:
                heirs = [new for new, parent in parents if parent is old]
                _put(group, old, heirs, names or {})
        momentum = states[0].get("momentum_buffer") if states else None
        alone = bool(states) and set(states[0]) == {"momentum_buffer"}  # else it is adaptive
        if alone and momentum is not None and replaced.project is not None:
            values = replaced.project(momentum)
            for parameter, value in zip(replaced.added, values, strict=True):
                optimizer.state[parameter]["momentum_buffer"] = value.to(parameter.dtype)


def _join(optimizers: Sequence[Optimizer], replaced: Replaced, names: Names) -> None:
    """Put parameters that replace none behind the nearest one that an optimizer holds."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for near in replaced.beside:
        for group in groups:
            if any(parameter is near for parameter in group["params"]):
                _put(group, near, [near, *replaced.added], names)
                return


def _parents(
    optimizers: Sequence[Optimizer], replaced: Replaced
) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Say, for each new parameter, whose place it takes: of one that an optimizer holds."""
    gone = {id(parameter) for parameter in replaced.removed}
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    held = [p for group in groups for p in group["params"] if id(p) in gone]
    if not held:
        return []
    alike = {new: [old for old in held if old.dim() == new.dim()] for new in replaced.added}
    return [(new, (alike[new] or held)[0]) for new in replaced.added]


def _put(
    group: dict[str, Any], old: nn.Parameter, heirs: Sequence[nn.Parameter], names: Names
) -> None:
    """Put parameters in the place of another one, with their names where the group has names."""
    places = [i for i, parameter in enumerate(group["params"]) if parameter is old]
    for place in reversed(places):
        group["params"][place : place + 1] = heirs
        if (known := group.get("param_names")) is not None:
            known[place : place + 1] = [names.get(id(new), known[place]) for new in heirs]


def _cut(
    optimizer: Optimizer,
    old: nn.Parameter,
    new: nn.Parameter,
    cuts: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]],
    names: Names,
) -> None:
    """Put a parameter where the old one was, with what becomes of its state.

    State that is no number and not of the parameter's shape, as Adafactor's sums of rows, cannot
    be cut with it: that parameter starts afresh.
    """
    for group in optimizer.param_groups:
        _put(group, old, [new], names)
    if old not in optimizer.state:
        return
    state = optimizer.state.pop(old)
    tensors = [value for value in state.values() if isinstance(value, Tensor)]
    if all(value.shape == old.shape or value.dim() == 0 for value in tensors):
        optimizer.state[new] = {
            key: cuts[key.endswith("_sq")](value)
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


@torch.no_grad()
def cancel_decay(optimizers: Optimizers, parameters: Iterable[Tensor], factor: float = 1.0) -> None:
    """Undo beforehand the weight decay that the coming step does to these parameters.

    Call it right before the step, with complete gradients. The optimizer keeps its groups, so it
    may be made before or after the method begins, by any trainer, and its state loads as before.
    Decay that joins the gradient (SGD, Adam) is taken off the gradient; decay that scales the
    weights (AdamW) is divided out of them. Nothing happens without an optimizer.

    Args:
        optimizers: that will step.
        parameters: to spare.
        factor: by which the step multiplies the learning rates that the optimizers have now.
    """
    spared = {id(parameter) for parameter in parameters}
    for group in [group for each in several(optimizers) for group in each.param_groups]:
        decay = float(group.get("weight_decay") or 0.0)
        for parameter in group["params"]:
            if not decay or id(parameter) not in spared or parameter.grad is None:
                continue
            if group.get("decoupled_weight_decay"):
                parameter.div_(1 - float(group["lr"]) * factor * decay)
            else:
                sign = -1.0 if group.get("maximize") else 1.0
                parameter.grad.sub_(parameter, alpha=sign * decay)
