"""Keeps an optimizer's weight decay away from some parameters."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer


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
