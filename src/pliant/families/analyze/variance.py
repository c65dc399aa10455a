"""How much of the error of several trainings is bias, and how much is variance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.cost import Example
from pliant.data import Data
from pliant.errors import DataError, ModelError
from pliant.families.analyze.inputs import check_logits, labelled, logits, shown
from pliant.observe.watch import capture

BATCH = 256


@dataclass(frozen=True)
class Division:
    """The squared error of class probabilities, divided; all are means over inputs and classes.

    Args:
        bias: (mean over networks of the probability - 1 for the right class, else 0)^2.
        variance: of the probability over networks, with their number as divisor.
        error: mean squared error of the networks, bias + variance.
        loss: mean cross-entropy of the networks.
    """

    bias: float
    variance: float
    error: float
    loss: float


def bias_variance(models: Sequence[nn.Module], data: Data) -> Division:
    """Divide the error of networks that were trained alike, from other seeds or on other samples.

    Of the squared error of probabilities, since only this divides into the two: the paper puts it
    in the place of cross-entropy (section 3), and its variance is what output sensitivity is to
    follow. All splits in one pass over the inputs; each network keeps its mode.

    Raises:
        ModelError: there are fewer than two networks, or one gives no logits.
        DataError: there are no labels, or a class that the networks do not know.
    """
    if len(models) < 2:
        raise ModelError(
            f"A variance over networks needs at least 2 of them, not {len(models)}: train the "
            "same network from other seeds."
        )
    sums, count = torch.zeros(4, dtype=torch.float64), 0
    for inputs, labels in labelled(data, shown(data), BATCH):
        scores = torch.stack([_scores(model, inputs) for model in models])
        if int(labels.max()) >= scores.shape[2] or int(labels.min()) < 0:
            raise DataError(
                f"Labels must be from 0 to {scores.shape[2] - 1}, the classes of the networks, but "
                f"{int(labels.min())} to {int(labels.max())} came."
            )
        sums += len(labels) * _divided(scores, labels)
        count += len(labels)
    return Division(*(sums / count).tolist())


def _scores(model: nn.Module, inputs: Example) -> Tensor:
    with capture(model, (), lambda *_: None):  # eval mode, no gradients, flags put back
        found = logits(model, inputs)
    check_logits(found)
    return found.double().cpu()


def _divided(scores: Tensor, labels: Tensor) -> Tensor:
    """Return bias, variance, squared error and cross-entropy of (networks, inputs, classes)."""
    labels = labels.cpu()
    chances, hot = scores.softmax(2), F.one_hot(labels, scores.shape[2])
    mean = chances.mean(0)
    loss = torch.stack([F.cross_entropy(each, labels) for each in scores]).mean()
    bias, variance = (mean - hot).square().mean(), (chances - mean).square().mean()
    return torch.stack([bias, variance, (chances - hot).square().mean(), loss])
