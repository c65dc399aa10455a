"""The optimizer and the learning rates of a plan."""

import math
from typing import Any

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from pliant.data import Train
from pliant.data.train import Make
from pliant.errors import ModelError, TrainingError
from pliant.surgery.optim import check_holds


def optimizers_of(model: nn.Module, train: Train) -> list[Optimizer]:
    """Make the optimizers of a plan: its own, for all parameters that train, or the user's.

    Weight decay of its own is on all of them, biases and BatchNorm included, as in the papers'
    SGD.

    Raises:
        ModelError: no parameter trains.
        TrainingError: the user's function gives no optimizer of this model.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ModelError(
            f"Training needs parameters that require gradients, but {type(model).__name__} has "
            "none; unfreeze some, or train for 0 epochs."
        )
    if not isinstance(train.optimizer, str):
        return _made(model, train.optimizer)
    if train.optimizer == "adamw":
        return [AdamW(parameters, lr=train.lr, weight_decay=train.weight_decay)]
    return [
        SGD(
            parameters,
            lr=train.lr,
            momentum=train.momentum,
            weight_decay=train.weight_decay,
            nesterov=train.nesterov and train.momentum > 0,
        )
    ]


def optimizer_of(model: nn.Module, train: Train) -> Optimizer:
    """Make the optimizer of a plan, the first of several: see `optimizers_of`."""
    return optimizers_of(model, train)[0]


def _made(model: nn.Module, make: Make) -> list[Optimizer]:
    """Call a user's function, and check what it gives."""
    try:
        made: Any = make(model)
    except Exception as error:  # a function of the user's may fail in any way
        raise TrainingError(
            f"Train(optimizer=...) is called with the network as it is, before the search and "
            f"again before fine-tuning, when layers have been replaced, but it fails with "
            f"{type(error).__name__}: {error}; choose parameters by model.named_parameters()."
        ) from error
    found = [made] if isinstance(made, Optimizer) else made
    whole = isinstance(found, list | tuple) and found
    if not whole or not all(isinstance(each, Optimizer) for each in found):
        raise TrainingError(
            "Train(optimizer=...) must be a function that takes the network and gives a "
            f"torch.optim.Optimizer or a list of them, but it gave {type(made).__name__}."
        )
    check_holds(model, found)
    return list(found)


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
