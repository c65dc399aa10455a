"""Classes as labels: of samples, of positions, of yes or no, and of the next token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pliant.data import measures
from pliant.data.sources import IGNORED
from pliant.data.task import INSTEAD, is_whole, labels_of, main_output, refuse, squeezed
from pliant.errors import DataError

LEFT_OUT = (-1, 255)  # what labels of positions say where there is no class


def class_view(
    output: Any, batch: Any, axis: int | None = None, void: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return class scores (N, C, ...) and labels (N, ...) of int64, `IGNORED` where there are none.

    Labels may have axes of 1 more, or be soft or one-hot, in the shape of the scores.

    Raises:
        DataError: they do not fit, or a label is no class.
    """
    scores, labels = main_output(output), labels_of(batch)
    if scores.dim() < 2:
        raise refuse("Classification needs a score for every class", scores, labels)
    scores = _classes_second(scores, labels, axis)
    wanted = (scores.shape[0], *scores.shape[2:])
    if labels.shape == scores.shape and labels.shape != wanted:
        return scores, labels  # soft, or one-hot
    labels = squeezed(labels, tuple(wanted))
    if labels.shape != wanted:
        raise refuse("Classification needs one label for every row of scores", scores, labels)
    if not is_whole(labels) and not bool((labels == labels.round()).all()):
        raise refuse("Labels of classes are whole numbers", scores, labels)
    return scores, _known(labels.long(), scores.shape[1], void)


def _classes_second(scores: Tensor, labels: Tensor, axis: int | None) -> Tensor:
    if axis is None:
        last = scores.dim() > 2 and (scores.shape[0], *scores.shape[2:]) != tuple(labels.shape)
        squeezed = labels.dim() == scores.dim() and labels.shape[1] == 1  # (N, 1, ...)
        soft = labels.shape == scores.shape
        axis = -1 if last and not squeezed and not soft else 1
    return scores.movedim(axis, 1) if axis != 1 else scores


def _known(labels: Tensor, classes: int, void: int | None) -> Tensor:
    """Mark what is no class by `IGNORED`.

    Raises:
        DataError: a label is neither a class nor left out.
    """
    voids = {IGNORED} if void is None else {IGNORED, void}
    if void is None and labels.dim() > 1:
        voids |= {value for value in LEFT_OUT if value < 0 or value >= classes}
    for value in voids - {IGNORED}:
        labels = torch.where(labels == value, IGNORED, labels)
    wrong = labels[((labels < 0) & (labels != IGNORED)) | (labels >= classes)]
    if wrong.numel():
        kind = "segmentation" if labels.dim() > 2 else "classification"
        raise DataError(
            f"Labels must lie in 0..{classes - 1}, one for each of the {classes} outputs, but "
            f"{int(wrong[0])} came; correct the labels, build the model with more classes, or "
            f"name the value that is no class, such as task='{kind}(void={int(wrong[0])})'."
        )
    return labels


def class_loss(
    output: Any,
    batch: Any,
    reduction: str = "mean",
    *,
    axis: int | None = None,
    void: int | None = None,
) -> Tensor:
    """Return the cross-entropy; 0 for a batch without any label."""
    scores, labels = class_view(output, batch, axis, void)
    return _entropy(scores, labels, reduction)


def _entropy(scores: Tensor, labels: Tensor, reduction: str) -> Tensor:
    if labels.shape == scores.shape:
        return F.cross_entropy(scores, labels.to(scores.dtype), reduction=reduction)
    if reduction == "mean" and bool((labels == IGNORED).all()):
        return (scores * 0).sum()  # the mean over nothing
    return F.cross_entropy(scores, labels, ignore_index=IGNORED, reduction=reduction)


def class_hits(
    output: Any, batch: Any, *, axis: int | None = None, void: int | None = None
) -> Tensor:
    """Say of every answer that was asked for whether it is right."""
    return _hits(*class_view(output, batch, axis, void))


def _hits(scores: Tensor, labels: Tensor) -> Tensor:
    if labels.shape == scores.shape:
        labels = labels.argmax(1)
    return (scores.argmax(1) == labels)[labels != IGNORED]


def class_scores(output: Any, axis: int | None = None) -> Tensor:
    """Return class scores with classes on the last axis."""
    scores = main_output(output)
    return scores.movedim(1 if axis is None else axis, -1)


def maps_view(
    output: Any, batch: Any, axis: int = 1, void: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return scores and labels of positions; scores of a coarser map are interpolated.

    Raises:
        DataError: labels are no maps, or as for `class_view`.
    """
    scores, labels = main_output(output), labels_of(batch)
    scores = scores.movedim(axis, 1)
    if labels.dim() == scores.dim() and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.dim() != scores.dim() - 1 or scores.dim() < 3 or len(labels) != len(scores):
        raise refuse("Segmentation needs a map of classes for every image", scores, labels)
    if scores.shape[2:] != labels.shape[1:]:
        way = {3: "linear", 4: "bilinear", 5: "trilinear"}[scores.dim()]
        size = tuple(labels.shape[1:])
        scores = F.interpolate(scores.float(), size=size, mode=way, align_corners=False)
    return class_view(scores, (None, labels), 1, void)


def maps_loss(
    output: Any, batch: Any, reduction: str = "mean", *, axis: int = 1, void: int | None = None
) -> Tensor:
    """Return the cross-entropy of positions."""
    scores, labels = maps_view(output, batch, axis, void)
    return _entropy(scores, labels, reduction)


def maps_hits(output: Any, batch: Any, *, axis: int = 1, void: int | None = None) -> Tensor:
    """Count right and known positions of every image: (N, 2)."""
    scores, labels = maps_view(output, batch, axis, void)
    known = labels != IGNORED
    right = ((scores.argmax(1) == labels) & known).flatten(1).sum(1)
    return torch.stack([right, known.flatten(1).sum(1)], 1).double()


def maps_overlaps(output: Any, batch: Any, *, axis: int = 1, void: int | None = None) -> Tensor:
    """Count intersections and unions of every image and class: (N, 2 C)."""
    scores, labels = maps_view(output, batch, axis, void)
    return measures.overlaps(scores.argmax(1), labels, scores.shape[1], IGNORED)


def share(sums: Tensor) -> Tensor:
    """Return what part of the second sum the first one is."""
    return sums[..., 0] / sums[..., 1].clamp(min=1)


def binary_view(
    output: Any, batch: Any, probabilities: bool = False, void: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return logits and targets 0 or 1 of the same shape; NaN where there is no label.

    There is none where NaN came, -100 or `void`; of maps neither where -1 or 255 did.

    Raises:
        DataError: shapes differ, or a label is neither 0 nor 1.
    """
    scores, labels = main_output(output), labels_of(batch)
    labels = squeezed(labels, tuple(scores.shape))
    if labels.shape != scores.shape or labels.is_complex():
        raise refuse("Yes and no need one logit for every label", scores, labels)
    left_out = (labels == IGNORED) | labels.isnan()
    for value in LEFT_OUT if void is None and labels.dim() > 2 else (void,):
        left_out = left_out | (labels == value) if value is not None else left_out
    targets = torch.where(left_out, torch.nan, labels.to(scores.dtype))
    wrong = labels[~left_out & ~((targets >= 0) & (targets <= 1))]
    if wrong.numel():
        raise _neither(wrong[0].item(), several=scores.dim() > 1 and scores.shape[1] > 1)
    if probabilities:
        edge = torch.finfo(scores.dtype).eps
        scores = scores.clamp(edge, 1 - edge).logit()
    return scores, targets


def _neither(value: float, *, several: bool) -> DataError:
    name = "multi-label" if several else "binary"
    void = f"name the value that is no label, such as task='{name}(void={int(value)})', " * (
        value == int(value)
    )
    return DataError(
        f"Labels of a yes or no must be 0 or 1, but {value} came: correct the labels, {void}name "
        f"another task, such as 'regression' where they are amounts, or {INSTEAD}."
    )


def binary_loss(
    output: Any,
    batch: Any,
    reduction: str = "mean",
    *,
    probabilities: bool = False,
    void: int | None = None,
) -> Tensor:
    """Return the binary cross-entropy of logits, a mean over all that has a label."""
    scores, targets = binary_view(output, batch, probabilities, void)
    known = ~targets.isnan()
    if bool(known.all()):
        return F.binary_cross_entropy_with_logits(scores, targets, reduction=reduction)
    targets = torch.where(known, targets, 0.0)
    found = F.binary_cross_entropy_with_logits(scores, targets, reduction="none")
    found = torch.where(known, found, 0.0)
    return found if reduction == "none" else found.sum() / known.sum().clamp(min=1)


def binary_hits(
    output: Any, batch: Any, *, probabilities: bool = False, void: int | None = None
) -> Tensor:
    """Say of every label whether it is on the side of its logit."""
    scores, targets = binary_view(output, batch, probabilities, void)
    return ((scores > 0) == (targets > 0.5))[~targets.isnan()]


def binary_counts(
    output: Any, batch: Any, *, probabilities: bool = False, void: int | None = None
) -> Tensor:
    """Count what is rightly, falsely and not found in every sample: (N, 3)."""
    scores, targets = binary_view(output, batch, probabilities, void)
    known, found, there = ~targets.isnan(), scores > 0, targets > 0.5
    rows = [known & found & there, known & found & ~there, known & ~found & there]
    return torch.stack([row.reshape(len(row), -1).sum(1) for row in rows], 1).double()


def binary_scores(output: Any, *, probabilities: bool = False) -> Tensor:
    """Return logits of no and yes on a new last axis."""
    scores = main_output(output)
    if probabilities:
        edge = torch.finfo(scores.dtype).eps
        scores = scores.clamp(edge, 1 - edge).logit()
    return torch.stack([torch.zeros_like(scores), scores], -1)


def token_view(output: Any, batch: Any, void: int | None = None) -> tuple[Tensor, Tensor]:
    """Return scores (N, V, T - 1) of the next token, and that token (N, T - 1).

    Raises:
        DataError: labels are no tokens of the positions scored.
    """
    scores, labels = main_output(output), labels_of(batch)
    if scores.dim() != 3 or labels.shape != scores.shape[:2] or not is_whole(labels):
        raise refuse("The next token needs scores (N, T, V) and labels (N, T)", scores, labels)
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if isinstance(mask, Tensor) and mask.shape == labels.shape:
        labels = torch.where(mask.to(labels.device) > 0, labels.long(), IGNORED)
    shifted = _known(labels[:, 1:].long(), scores.shape[2], void)
    return scores[:, :-1].movedim(2, 1), shifted


def token_loss(
    output: Any, batch: Any, reduction: str = "mean", *, void: int | None = None
) -> Tensor:
    """Return the cross-entropy of the next token."""
    scores, labels = token_view(output, batch, void)
    return _entropy(scores, labels, reduction)


def token_hits(output: Any, batch: Any, *, void: int | None = None) -> Tensor:
    """Say of every token but the first whether it was foreseen."""
    return _hits(*token_view(output, batch, void))


def token_sums(output: Any, batch: Any, *, void: int | None = None) -> Tensor:
    """Return the summed loss of every sample and the count of its tokens: (N, 2)."""
    scores, labels = token_view(output, batch, void)
    found = _entropy(scores.float(), labels, "none")
    return torch.stack([found.sum(1), (labels != IGNORED).sum(1)], 1).double()
