"""Projections onto balls of norms: the constraint of a training, met after a step.

Sums run in float64, so that thresholds keep their digits over millions of entries. What lies in
the ball already comes back as it is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pliant.errors import PliantError


def onto_l1(values: Tensor, radius: float | Tensor) -> Tensor:
    """Return the nearest points of l1 balls, for vectors along the last axis.

    Args:
        values: vectors (..., n).
        radius: of the balls, at least 0: a number or one for each vector (...).

    Raises:
        PliantError: a radius is negative or a number is not finite.
    """
    radii = torch.as_tensor(radius, dtype=torch.float64, device=values.device)
    _check(values, radii)
    sizes = values.double().abs()
    theta = _theta(sizes, radii)
    inside = sizes.sum(-1) <= radii
    shrunk = values.sign() * (sizes - theta[..., None]).clamp_min(0).to(values.dtype)
    shrunk = torch.where((radii > 0)[..., None], shrunk, torch.zeros_like(shrunk))
    return torch.where(inside[..., None], values, shrunk)


def onto_l21(columns: Tensor, radius: float) -> Tensor:
    """Return the nearest matrix whose columns' l2 norms sum to at most a radius.

    Args:
        columns: the columns as rows, (columns, entries).
        radius: at least 0.
    """
    norms = columns.double().norm(dim=1)
    kept = onto_l1(norms, radius)
    if torch.equal(kept, norms):
        return columns
    factors = torch.where(norms > 0, kept / norms.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
    return (columns * factors[:, None]).to(columns.dtype)


def onto_l11(columns: Tensor, radius: float) -> Tensor:
    """Share a radius among columns, then project each onto the l1 ball of its share.

    The result lies in the l1 ball of the whole, but is not its nearest point: it trades distance
    for columns that are empty altogether.

    Args:
        columns: the columns as rows, (columns, entries).
        radius: at least 0.
    """
    return onto_l1(columns, onto_l1(columns.double().abs().sum(1), radius))


def onto_nuclear(matrix: Tensor, radius: float) -> Tensor:
    """Return the nearest matrix whose singular values sum to at most a radius.

    Args:
        matrix: of two axes.
        radius: at least 0.
    """
    _check(matrix, torch.tensor(radius))
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    kept = onto_l1(values, radius)
    if torch.equal(kept, values):
        return matrix
    return ((left * kept) @ right).to(matrix.dtype)


def vanishing(heights: Tensor, entries: Tensor | None = None) -> Tensor:
    """Return at which radius of the l1 ball something vanishes, as a share of the norm.

    A projection takes the same from all entries, so what is at most h high is gone when the
    others sum to no more than what they have above h.

    Args:
        heights: of what vanishes, (n,): norms of columns, or their largest entries.
        entries: all entries that share the radius; the heights themselves if None.
    """
    heights = heights.double()
    entries = heights if entries is None else entries.double().abs().flatten()
    ordered, _ = entries.sort()
    above = ordered.flip(0).cumsum(0).flip(0)  # sums of what is at least as high
    above = torch.cat([above, above.new_zeros(1)])
    at = torch.searchsorted(ordered, heights, right=True)
    left = above[at] - heights * (len(ordered) - at)
    return (left / above[0].clamp_min(1e-300)).clamp_min(0)


def _theta(sizes: Tensor, radii: Tensor) -> Tensor:
    """Return by how much entries are lowered, to sum to a radius."""
    ordered = sizes.sort(dim=-1, descending=True).values
    counts = torch.arange(1, sizes.shape[-1] + 1, device=sizes.device, dtype=torch.float64)
    return ((ordered.cumsum(-1) - radii[..., None]) / counts).amax(-1).clamp_min(0)


def _check(values: Tensor, radii: Tensor) -> None:
    if not torch.isfinite(values).all():
        raise PliantError(
            "A projection needs finite numbers, but some are not: lower the learning rate."
        )
    if not bool((radii >= 0).all()):
        lowest = float(radii.min()) if radii.numel() else math.nan
        raise PliantError(f"The radius of a ball must be at least 0, not {lowest}.")
