"""Losses that are weighted, sample by sample; what has no label never counts."""

from typing import Any, Literal

import torch
from torch import Tensor

from pliant.errors import MethodError, ModelError
from pliant.observe.outputs import logits

Reduction = Literal["mean", "none"]


def classes_second(scores: Tensor, labels: Tensor) -> Tensor:
    """Bring (N, ..., C) into (N, C, ...), the order of cross-entropy."""
    if scores.dim() > 2 and (scores.shape[0], *scores.shape[2:]) != tuple(labels.shape):
        return scores.movedim(-1, 1)
    return scores


def weighted(losses: Tensor, weights: Tensor | None, output: Any, labels: Any) -> Tensor:
    """Return the weighted sum of losses, divided by how many have a label.

    Weights of one give the mean that the criterion itself would give. Losses without a label
    change nothing, whatever their weight; a batch without any label has the loss 0.

    Args:
        losses: one for each sample, or one for each label.
        weights: one for each sample, or one for each label; None for ones.
        output: of the network, which says how many classes there are.
        labels: whole numbers that are no class have no label: -100, or an ignored index such as
            255 that lies outside of the classes.

    Raises:
        MethodError: losses came as one number, or weights do not fit them.
    """
    if losses.dim() == 0:
        raise MethodError(
            "The method weighs every sample, but the loss came as one number for the whole batch: "
            'compute it with reduction=run.reduction, which is "none" for this method.'
        )
    known = _known(losses, output, labels)
    factor = torch.ones_like(losses) if weights is None else beside(weights, losses)
    if known is None:
        return (losses * factor).sum() / max(1, losses.numel())
    return (losses * torch.where(known, factor, 0)).sum() / known.sum().clamp(min=1)


def _known(losses: Tensor, output: Any, labels: Any) -> Tensor | None:
    """Say which losses belong to a class; None where labels are no classes.

    A label that is no class and whose loss is 0 was left out by the criterion. Losses may lie in
    a row, or be those of labels from the second on, as a language model's are.
    """
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
        return None
    inside = labels >= 0
    if (classes := _classes(output, labels)) > 1:
        inside &= labels < classes
    for each in (inside, inside[..., 1:] if labels.dim() > 1 else inside):
        if each.numel() == losses.numel():
            return each.reshape(losses.shape) | (losses.detach() != 0)
    return None


def _classes(output: Any, labels: Tensor) -> int:
    """Count the classes that scores are given for; 0 if there is no axis of classes."""
    try:
        scores = classes_second(logits(output), labels)
    except ModelError:  # what else a network gives, its own criterion understands
        return 0
    return scores.shape[1] if scores.dim() > labels.dim() else 0


def beside(weights: Tensor, losses: Tensor) -> Tensor:
    """Give weights the axes of the losses, of which they have all or the first."""
    if weights.shape not in (losses.shape, losses.shape[:1]):
        raise MethodError(
            f"Weights of samples must be ({len(losses)},) or have the shape of the losses, "
            f"{tuple(losses.shape)}, but {tuple(weights.shape)} came; weigh every sample once."
        )
    return weights.reshape(*weights.shape, *[1] * (losses.dim() - weights.dim()))
