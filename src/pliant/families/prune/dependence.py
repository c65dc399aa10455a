"""How far two sets of activations depend on each other once others are known, by spanning trees.

The conditional geometric mutual information of X and Y given Z is the divergence of Henze and
Penrose between samples of (x, y, z) and samples in which y was exchanged for that of a row with
nearly the same z. In the Euclidean minimum spanning tree of both sets together, few edges join one
with the other if they differ: with R such edges among m and n samples, 1 - R (m + n) / (2 m n)
estimates the divergence (Friedman and Rafsky, 1979). 0 is independent, 1 is fully dependent.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]

LEAST = 12  # samples: four in each third


def spanning_tree(distances: Array) -> NDArray[np.int64]:
    """Return the edges of the minimum spanning tree of points, (points - 1, 2), by Prim's method.

    Points at the same place are joined like all others.

    Args:
        distances: between all points, symmetric; any rising function of them gives the same tree.
    """
    count = len(distances)
    nearest, parent = distances[0].copy(), np.zeros(count, np.int64)
    outside = np.ones(count, bool)
    outside[0], nearest[0] = False, np.inf
    edges = np.empty((max(0, count - 1), 2), np.int64)
    for number in range(len(edges)):
        new = int(nearest.argmin())
        edges[number] = parent[new], new
        outside[new], nearest[new] = False, np.inf
        closer = outside & (distances[new] < nearest)
        nearest[closer], parent[closer] = distances[new][closer], new
    return edges


def crossing(distances: Array, first: int) -> int:
    """Count the edges of the tree that join one of the first points with one of the others."""
    ends = spanning_tree(distances) < first
    return int((ends[:, 0] != ends[:, 1]).sum())


def divergence(distances: Array, first: int) -> float:
    """Return the estimated divergence of two sets of points, not cut off at 0.

    Args:
        distances: between all points, those of the first set first.
        first: how many these are.
    """
    other = len(distances) - first
    return 1 - crossing(distances, first) * (first + other) / (2 * first * other)


def squares(points: Tensor, others: Tensor | None = None) -> Tensor:
    """Return the squared distances between rows, in float64."""
    return torch.cdist(points.double(), (points if others is None else others).double()).square()


def standard(rows: Tensor) -> Tensor:
    """Return columns with mean 0 and variance 1, in float64; constant ones are 0."""
    rows = rows.double()
    spread = rows.std(0, correction=0)
    return (rows - rows.mean(0)) / torch.where(spread > 1e-9, spread, torch.inf)


def dependences(
    children: Sequence[Tensor],
    parents: Sequence[Tensor],
    generator: torch.Generator,
    repeats: int = 1,
) -> Tensor:
    """Return how far each child depends on each parent, given all other parents.

    Args:
        children: activations of groups of units, (samples, units) each, rows of one sample alike.
        parents: those of the groups that the children read.
        generator: draws the thirds that samples are divided into.
        repeats: divisions over which to average.

    Returns:
        (children, parents), in 0..1.
    """
    found = torch.zeros(len(children), len(parents), dtype=torch.float64)
    for _ in range(repeats):
        order = torch.randperm(len(children[0]), generator=generator)
        thirds = order[: 3 * (len(order) // 3)].view(3, -1)
        for column in range(len(parents)):
            found[:, column] += _given_the_others(children, parents, column, thirds) / repeats
    return found


def _given_the_others(
    children: Sequence[Tensor], parents: Sequence[Tensor], column: int, thirds: Tensor
) -> Tensor:
    own = parents[column]
    rest = torch.cat([own[:, :0], *parents[:column], *parents[column + 1 :]], 1)
    true, kept, given = thirds
    if rest.shape[1]:  # the row whose z is nearest gives its y
        given = given[squares(rest[kept], rest[given]).argmin(1)]
    rows = torch.cat([true, kept])
    exchanged = torch.cat([own[true], own[given]])
    fixed = squares(exchanged) + squares(rest[rows])
    values = [divergence((fixed + squares(child[rows])).numpy(), len(true)) for child in children]
    return torch.tensor(values, dtype=torch.float64).clamp_min(0)
