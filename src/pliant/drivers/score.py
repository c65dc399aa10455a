"""What an output is worth: the loss of its task, its accuracy, its distance to a teacher."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pliant.cost import call, evaluating
from pliant.data import IGNORED, Data, unpack
from pliant.data.criterion import classes_second, task_loss
from pliant.data.sources import moved
from pliant.data.splits import Split
from pliant.errors import DataError, ModelError
from pliant.math.divergence import divergence
from pliant.observe.outputs import logits


@dataclass(frozen=True)
class Score:
    """How good a network is on one split.

    Attributes:
        accuracy: share of right answers, in 0..1; nan where labels are not classes.
        loss: mean loss of the task.
        hits: for every answer that was asked for whether it was right, in the order of the split;
            empty where labels are not classes.
        classes: how many answers there are to choose from; 0 where labels are not classes.
    """

    accuracy: float
    loss: float
    hits: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool), compare=False)
    classes: int = 0


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: Data,
    split: Split = "val",
    *,
    batch: int = 256,
    device: torch.device | str | None = None,
) -> Score:
    """Score a network on a split, in eval mode and without autocast.

    Flags are left as they were, as is the random state.

    Args:
        model: gives a tensor of class scores, or something with ``logits``.
        data: labels that are whole numbers are classes; others are targets of a regression.
        split: which part of the data.
        batch: samples per forward call; a loader has its own.
        device: where to compute, the model is moved there; where it is now if None.

    Raises:
        DataError: the split is absent, empty or without labels.
        ModelError: the model fails on a batch.
    """
    device = torch.device(device) if device is not None else device_of(model)
    model.to(device)
    losses = count = 0.0
    rights: list[Tensor] = []
    classes = 0
    with evaluating(model):
        for sample in data.batches(split, batch):
            inputs, labels = unpack(moved(sample, device))
            scores = logits(forward(model, inputs))
            size = len(scores)
            losses += float(task_loss(scores, labels)) * size
            count += size
            if not labels.is_floating_point():
                rights.append(_right(scores, labels).cpu())
                classes = scores.shape[1] if scores.dim() == 2 else scores.shape[-1]
    if not count:
        raise DataError(f"The {split} split must hold samples, but it gave none; check the loader.")
    hits = torch.cat(rights) if rights else torch.empty(0, dtype=torch.bool)
    accuracy = float(hits.sum()) / len(hits) if len(hits) else math.nan
    return Score(accuracy, losses / count, hits, classes)


def forward(model: nn.Module, inputs: Any) -> Any:
    """Call a model, and name the inputs' shape if it fails.

    Raises:
        ModelError: the model fails.
    """
    try:
        return call(model, inputs)
    except Exception as error:
        raise ModelError(
            f"The model must take inputs of shape {shapes(inputs)}, but its forward fails with "
            f"{type(error).__name__}: {error}; check that model and data fit."
        ) from error


def shapes(inputs: Any) -> str:
    """Write down the shapes of a forward call's inputs."""
    named = isinstance(inputs, Mapping)
    values = inputs.items() if named else (("", value) for value in inputs)
    return ", ".join(
        (f"{name}=" if named else "") + str(tuple(v.shape) if isinstance(v, Tensor) else type(v))
        for name, v in values
    )


def distillation(output: Any, teacher: Any, temperature: float) -> Tensor:
    """Return the divergence from a teacher's softened classes (Hinton et al. 2015), times T^2."""
    return divergence(logits(output), logits(teacher), temperature)


def device_of(model: nn.Module) -> torch.device:
    """Say where a model's parameters are."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _right(scores: Tensor, labels: Tensor) -> Tensor:
    """Say of every answer that was asked for whether it is right."""
    return (classes_second(scores, labels).argmax(1) == labels)[labels != IGNORED]
