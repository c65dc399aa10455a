"""Few distinct values for many numbers: by k-means, or by rounding at random to quantiles.

Source: Marinò, Ghidoli, Frasca, Malchiodi (ICPR 2020).
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 100  # of k-means; in one dimension it settles long before


def quantiles(values: Tensor, at: Tensor) -> Tensor:
    """Return the quantiles of numbers at shares 0..1, linear between neighbours.

    >>> quantiles(torch.tensor([4.0, 1.0, 2.0]), torch.tensor([0.0, 0.25, 1.0])).tolist()
    [1.0, 1.5, 4.0]
    """
    ordered = values.flatten().sort().values  # torch.quantile ends at 16 million numbers
    place = at.to(torch.float64) * (len(ordered) - 1)
    low = place.floor().long()
    high = (low + 1).clamp(max=len(ordered) - 1)
    part = (place - low).to(ordered.dtype)
    return torch.lerp(ordered[low], ordered[high], part)


def mask(weight: Tensor, share: float) -> Tensor:
    """Say which numbers survive when this share of them, the smallest ones, is pruned.

    Survivors lie strictly above the quantile of the magnitudes; nothing is pruned at a share of 0.

    >>> mask(torch.tensor([3.0, -1.0, 2.0, -4.0]), 0.5).tolist()
    [True, False, False, True]
    """
    if not share:
        return torch.ones_like(weight, dtype=torch.bool)
    size = weight.abs()
    return size > quantiles(size, torch.tensor([share], device=weight.device))


def representatives(values: Tensor, count: int) -> Tensor:
    """Return the distinct ones among ``count`` evenly spaced quantiles, least and largest included.

    >>> representatives(torch.tensor([0.0, 0.0, 0.0, 2.0, 4.0]), 5).tolist()
    [0.0, 2.0, 4.0]
    """
    at = torch.linspace(0, 1, count, dtype=torch.float64, device=values.device)
    return quantiles(values, at).unique()


def draw(values: Tensor, levels: Tensor, generator: torch.Generator) -> Tensor:
    """Round numbers to one of the two levels around them, at random and without bias.

    A number is rounded up with the share of the gap that lies below it as probability, so that
    the mean of what it is rounded to is the number itself.

    Args:
        values: within the levels.
        levels: ascending and distinct.
        generator: the source of randomness; draws on the CPU.

    Returns:
        The number of the level of each value.
    """
    chance = torch.rand(values.shape, generator=generator).to(values.device)
    if len(levels) == 1:
        return torch.zeros_like(values, dtype=torch.long)
    above = torch.searchsorted(levels, values.contiguous(), right=True)
    low = (above - 1).clamp(0, len(levels) - 2)
    below = (values - levels[low]) / (levels[low + 1] - levels[low])
    return low + (chance < below)


def kmeans(values: Tensor, count: int) -> Tensor:
    """Return at most ``count`` centroids of numbers: Lloyd's algorithm on the sorted line.

    It begins with centroids evenly spaced between the least and the largest number, ends when
    none moves, and drops those that no number is nearest to. Each round costs a search for the
    borders and a look-up in the running sum.

    >>> kmeans(torch.tensor([1.0, 1.5, 8.0, 9.0]), 2).tolist()
    [1.25, 8.5]
    """
    ordered = values.flatten().double().sort().values
    total = torch.cat([ordered.new_zeros(1), ordered.cumsum(0)])
    centers = torch.linspace(float(ordered[0]), float(ordered[-1]), count, dtype=torch.float64)
    centers = centers.to(ordered.device)
    for _ in range(ROUNDS):
        borders = torch.searchsorted(ordered, (centers[1:] + centers[:-1]) / 2)
        ends = torch.cat([borders.new_zeros(1), borders, borders.new_tensor([len(ordered)])])
        sizes = ends.diff()
        held = sizes > 0
        moved = (total[ends[1:]] - total[ends[:-1]])[held] / sizes[held]
        if len(moved) == len(centers) and torch.equal(moved, centers):
            break
        centers = moved
    return centers.to(values.dtype).unique()


def nearest(values: Tensor, levels: Tensor) -> Tensor:
    """Return the number of the level nearest to each value.

    >>> nearest(torch.tensor([0.4, 0.6]), torch.tensor([0.0, 1.0])).tolist()
    [0, 1]
    """
    return torch.searchsorted((levels[1:] + levels[:-1]) / 2, values.contiguous())
