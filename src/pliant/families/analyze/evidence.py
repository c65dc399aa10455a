"""What positions a decision needs: curves of taking them away or putting them in, one by one."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.errors import DataError
from pliant.families.analyze.heads import Head
from pliant.families.analyze.inputs import logits
from pliant.observe.watch import capture

POOLS: dict[int, Callable[..., Tensor]] = {
    1: F.adaptive_avg_pool1d,
    2: F.adaptive_avg_pool2d,
    3: F.adaptive_avg_pool3d,
}


def ranking(evidence: Tensor, classes: Tensor) -> Tensor:
    """Order positions by their evidence for one class of each sample, the strongest first.

    Args:
        evidence: (samples, classes, *positions).
        classes: (samples,).

    Returns:
        Indices of flattened positions, (samples, positions).
    """
    return chosen(evidence, classes).flatten(1).argsort(dim=1, descending=True, stable=True)


def chosen(evidence: Tensor, classes: Tensor) -> Tensor:
    """Return the evidence for one class of each sample, (samples, *positions)."""
    return evidence[torch.arange(len(evidence)), classes]


def filled(head: Head, value: Tensor) -> Tensor:
    """Return the evidence of positions that hold the same features, (classes, positions).

    Args:
        head: that reads them.
        value: (channels,).
    """
    whole = value.reshape(1, -1, *[1] * (len(head.shape) - 1)).expand(1, *head.shape)
    return head.evidence(whole)[0].flatten(1)


def removals(head: Head, evidence: Tensor, order: Tensor, fill: Tensor) -> Tensor:
    """Return the scores with the first 0, 1, ... positions of an order replaced by a filling.

    Exact, since scores are sums over positions: nothing is run again.

    Args:
        head: that reads the map.
        evidence: (samples, classes, *positions).
        order: (samples, positions), which to replace first.
        fill: evidence of the filling, (classes, positions).

    Returns:
        (samples, classes, positions + 1), float64.
    """
    flat = evidence.flatten(2)
    change = (fill - flat).gather(2, order[:, None].expand_as(flat))
    steps = torch.cat([torch.zeros_like(change[..., :1]), change.cumsum(2)], 2)
    return flat.sum(2, keepdim=True) + head.bias.double()[:, None] + steps


def minimal_points(kept: Tensor, classes: Tensor) -> Tensor:
    """Return how many of the strongest positions are enough for a decision.

    The least number for which, and for every larger one, the class stays the greatest.

    Args:
        kept: scores with all but the first 0, 1, ... positions replaced, (samples, classes,
            positions + 1).
        classes: (samples,).
    """
    wrong = kept.argmax(1) != classes[:, None]
    count = torch.arange(1, wrong.shape[1] + 1)
    return (wrong * count).amax(1)


def insertions(head: Head, evidence: Tensor, order: Tensor, fill: Tensor) -> Tensor:
    """Return the scores with all but the first 0, 1, ... positions of an order replaced."""
    return removals(head, evidence, order.flip(1), fill).flip(2)


def chances(scores: Tensor, classes: Tensor, steps: int) -> Tensor:
    """Return the probability of one class at evenly spaced numbers of positions.

    Args:
        scores: (samples, classes, positions + 1).
        classes: (samples,).
        steps: how many parts the positions are divided into; all if there are fewer.

    Returns:
        (samples, steps + 1).
    """
    last = scores.shape[2] - 1
    count = min(steps, last)
    at = [round(step * last / count) for step in range(count + 1)]
    return chosen(scores[..., at].softmax(1), classes)


def area(curve: Tensor) -> Tensor:
    """Return the area under curves over shares from 0 to 1, (samples,)."""
    return torch.trapezoid(curve, dx=1 / (curve.shape[1] - 1), dim=1)


def saliency(model: nn.Module, inputs: Tensor, classes: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the size of the input's gradient of one score, at the positions of a map.

    The absolute values, summed over channels, averaged over the part of the input that lies where
    a position of the map does.

    Args:
        model: gives class scores; its gradients stay as they are.
        inputs: (samples, channels, *positions).
        classes: whose score, (samples,).
        shape: positions of the map.

    Raises:
        DataError: inputs have another number of axes than the map.
    """
    if inputs.dim() - 2 != len(shape):
        raise DataError(
            f"Inputs must have as many axes of positions as the last map, {len(shape)}, but are "
            f"of shape {tuple(inputs.shape)}."
        )
    asked = inputs.detach().clone().requires_grad_(True)
    with capture(model, (), lambda *_: None, gradients=True):
        total = chosen(logits(model, (asked,)), classes).sum()
        slope = torch.autograd.grad(total, asked)[0]
    return POOLS[len(shape)](slope.abs().sum(1, keepdim=True), shape)[:, 0]
