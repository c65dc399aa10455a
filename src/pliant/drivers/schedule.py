"""The optimizer and the learning rates of a plan."""

import math

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from pliant.data import Train
from pliant.errors import ModelError


def optimizer_of(model: nn.Module, train: Train) -> Optimizer:
    """Make the optimizer of a plan, for all parameters that train.

    Weight decay is on all of them, biases and BatchNorm included, as in the papers' SGD.

    Raises:
        ModelError: there are none.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ModelError(
            f"Training needs parameters that require gradients, but {type(model).__name__} has "
            "none; unfreeze some, or train for 0 epochs."
        )
    if train.optimizer == "adamw":
        return AdamW(parameters, lr=train.lr, weight_decay=train.weight_decay)
    return SGD(
        parameters,
        lr=train.lr,
        momentum=train.momentum,
        weight_decay=train.weight_decay,
        nesterov=train.nesterov and train.momentum > 0,
    )


def rate(train: Train, step: int, steps: int) -> float:
    """Return the learning rate of a step, counted from 0: a function of nothing else."""
    warm = round(train.warmup * steps)
    if step < warm:
        return train.lr * (step + 1) / warm
    if train.schedule == "cosine":
        return train.lr * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2
    if train.schedule == "step":
        return train.lr * 0.1 ** ((2 * step >= steps) + (4 * step >= 3 * steps))
    return train.lr
