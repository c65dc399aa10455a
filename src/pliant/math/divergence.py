"""Losses that compare outputs with other outputs: those of a teacher, or of similar samples."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def divergence(scores: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Return the divergence from softened target classes (Hinton et al., 2015), times T^2.

    The sum over all but the first axis is averaged over the first.

    Args:
        scores: class scores, classes on the last axis.
        target: class scores of the teacher.
        temperature: T, by which both are divided.
    """
    return divergences(scores, target, temperature).sum() / max(1, len(scores))


def divergences(scores: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Return T^2 KL(softmax(target / T) || softmax(scores / T)) of every sample.

    >>> divergences(torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0, 3.0]]), 4.0)
    tensor([0.])
    """
    softened = (scores / temperature).log_softmax(-1)
    aim = (target / temperature).log_softmax(-1)
    return F.kl_div(softened, aim, reduction="none", log_target=True).sum(-1) * temperature**2


@torch.no_grad()
def neighbour_means(
    rows: Tensor,
    labels: Tensor,
    neighbours: int | None,
    *,
    others: tuple[Tensor, Tensor] | None = None,
    cosine: bool = False,
    weighted: bool = False,
    furthest: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the mean of every sample's nearest samples of its own class, and who has any.

    A sample is never its own neighbour; with fewer than ``neighbours`` of its class all of them
    count. Distances are in float32 at least. Labels below 0 are no class.

    Args:
        rows: (N, D).
        labels: (N,), whole numbers.
        neighbours: how many; None takes all of the class.
        others: rows and labels of more samples, which may be neighbours too.
        cosine: compare directions, not places.
        weighted: near ones count more: by exp(-d^2 / s), s their mean squared distance.
        furthest: take the furthest instead of the nearest, of those who have more than
            ``neighbours`` in their class only.

    Returns:
        The means (N, D), zero where there are no neighbours, and a mask (N,) of who has some.

    >>> rows, labels = torch.tensor([[0.0], [1.0], [5.0], [7.0]]), torch.tensor([0, 0, 0, 1])
    >>> neighbour_means(rows, labels, 1)
    (tensor([[1.],
            [0.],
            [1.],
            [0.]]), tensor([ True,  True,  True, False]))
    """
    exact = rows if rows.dtype == torch.float64 else rows.float()
    every, known = exact, labels
    if others is not None and len(others[0]):
        every = torch.cat([exact, others[0].to(exact)])
        known = torch.cat([labels, others[1].to(labels)])
    mates = (labels[:, None] == known) & (labels >= 0)[:, None]
    mates[:, : len(rows)].fill_diagonal_(False)
    count = len(every) if neighbours is None else neighbours
    if furthest:
        mates &= (mates.sum(1) > count)[:, None]
    far = _distances(exact, every, cosine=cosine) if weighted or count < len(every) else None
    if far is not None and count < len(every):
        ranked = far.masked_fill(~mates, -math.inf if furthest else math.inf)
        chosen = ranked.topk(count, largest=furthest).indices
        mates &= torch.zeros_like(mates).scatter(1, chosen, True)
    shares = mates.to(exact.dtype)
    if weighted and far is not None:
        squares = far.square()
        spread = (squares * shares).sum(1, keepdim=True) / shares.sum(1, keepdim=True).clamp(min=1)
        shares = shares * (-squares / spread.clamp_min(1e-12)).exp()
    means = shares @ every / shares.sum(1, keepdim=True).clamp(min=1e-12)
    return means.to(rows.dtype), mates.any(1)


def _distances(rows: Tensor, every: Tensor, *, cosine: bool) -> Tensor:
    if cosine:
        rows, every = F.normalize(rows, dim=1), F.normalize(every, dim=1)
    return torch.cdist(rows, every, compute_mode="donot_use_mm_for_euclid_dist")


def mean_where(values: Tensor, known: Tensor) -> Tensor:
    """Return the mean over the samples of a mask; 0, with zero gradients, over none."""
    return (values * known).sum() / known.sum().clamp(min=1)
