"""Distances to convex hulls: min over w >= 0, sum w = 1 of |A^T w - z|, A (points, features).

Two solvers. Pairwise Frank-Wolfe (Lacoste-Julien and Jaggi 2015) for many queries at once: each
step moves weight from the worst point of the support to the best point of all, so that it
converges linearly, and the duality gap bounds how much nearer the hull can be. Non-negative least
squares, exact and query by query, as its check and for queries that converge too slowly.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

TOLERANCE = 1e-6  # relative gap at which a distance is found
STEPS = 1000  # of Frank-Wolfe, after which a query is solved exactly
_TURN = 16  # steps between two looks at who has converged


@dataclass(frozen=True)
class Nearest:
    """The nearest points of a hull.

    Args:
        distance: of every query to the hull, (queries,), from above by at most the tolerance.
        lower: what the distance is at least, (queries,).
        weights: convex combinations of the points, (queries, points).
        steps: taken by the query that took most.
        exact: queries that had to be solved by non-negative least squares.
    """

    distance: Tensor
    lower: Tensor
    weights: Tensor
    steps: int
    exact: int


class Approach:
    """Convex combinations of points that come nearer to their queries, step by step.

    Args:
        points: (points, features) for all queries, or (queries, points, features) for each its
            own; float64.
        queries: (queries, features), float64.
        scale: what counts as the size of the data: nearer than `tolerance` times this is inside.

    Attributes:
        weights: (queries, points), begun at the nearest point of each.
        upper: distance of each query to its combination: an upper bound.
        lower: what the gap proves the distance to be at least.
        done: whose gap is at most `tolerance` times the squared distance, or who is inside.
    """

    def __init__(
        self, points: Tensor, queries: Tensor, scale: float, tolerance: float = TOLERANCE
    ) -> None:
        self.points, self.queries = points, queries
        self._tolerance, self._inside = tolerance, tolerance * scale
        count = len(queries)
        self.weights = queries.new_zeros(count, points.shape[-2])
        first = self._squares(queries).argmin(1)
        self.weights[torch.arange(count), first] = 1.0
        self.upper = torch.linalg.vector_norm(_combine(self.weights, points) - queries, dim=1)
        self.lower = torch.zeros_like(self.upper)
        self.done = self.upper <= self._inside
        self.steps = 0

    def refine(self, rows: Tensor, steps: int = _TURN) -> None:
        """Take steps for some queries, and update their bounds.

        Args:
            rows: indices of queries.
            steps: how many.
        """
        if not len(rows):
            return
        points, weights, queries = self._of(rows), self.weights[rows], self.queries[rows]
        near, row = _combine(weights, points), torch.arange(len(rows))
        for _ in range(steps):
            slope, best, worst, _ = _slopes(points, weights, near - queries)
            way = _pick(points, best) - _pick(points, worst)
            fall = (slope[row, worst] - slope[row, best]) / way.square().sum(1).clamp_min(1e-300)
            step = torch.minimum(fall.clamp_min(0), weights[row, worst])
            weights[row, best] += step
            weights[row, worst] -= step
            near = near + step[:, None] * way
        self._settle(rows, weights / weights.sum(1, keepdim=True))
        self.steps += steps

    def solve(self, row: int) -> None:
        """Solve one query exactly."""
        at = torch.tensor([row])
        points = self._of(at)
        weights = exact_weights(points if points.dim() == 2 else points[0], self.queries[row])
        self._settle(at, weights[None])
        self.done[row] = True

    def _of(self, rows: Tensor) -> Tensor:
        return self.points if self.points.dim() == 2 else self.points[rows]

    def _settle(self, rows: Tensor, weights: Tensor) -> None:
        """Write weights down with the bounds that they prove."""
        points = self._of(rows)
        away = _combine(weights, points) - self.queries[rows]
        gap = _slopes(points, weights, away)[3].clamp_min(0)
        upper = torch.linalg.vector_norm(away, dim=1)
        # The plane through the near point across the way to the query leaves the hull behind it.
        lower = (upper - gap / upper.clamp_min(1e-300)).clamp_min(0)
        self.weights[rows], self.upper[rows] = weights, upper
        self.lower[rows] = torch.maximum(self.lower[rows], lower)
        self.done[rows] = (gap <= self._tolerance * upper.square()) | (upper <= self._inside)

    def _squares(self, queries: Tensor) -> Tensor:
        """Squared distances of all points, but for what all of a query's have in common."""
        if self.points.dim() == 2:
            return self.points.square().sum(1) - 2 * queries @ self.points.T
        products = torch.einsum("bnd,bd->bn", self.points, queries)
        return self.points.square().sum(2) - 2 * products


def nearest(
    points: Tensor,
    queries: Tensor,
    *,
    tolerance: float = TOLERANCE,
    most: int = STEPS,
    scale: float | None = None,
) -> Nearest:
    """Find the distances of queries to the hull of points, by pairwise Frank-Wolfe.

    Args:
        points: (points, features), or (queries, points, features) for each query its own.
        queries: (queries, features).
        tolerance: relative duality gap to stop at, hence also a bound of the distances' error.
        most: steps after which a query is solved by `exact_weights`.
        scale: the size of the data; their root mean square if None.
    """
    points, queries = points.double(), queries.double()
    found = Approach(points, queries, size(points) if scale is None else scale, tolerance)
    for _ in range(-(-most // _TURN)):
        if found.done.all():
            break
        found.refine((~found.done).nonzero()[:, 0])
    left = (~found.done).nonzero()[:, 0].tolist()
    for row in left:
        found.solve(row)
    return Nearest(found.upper, found.lower, found.weights, found.steps, len(left))


def exact_weights(points: Tensor, query: Tensor) -> Tensor:
    """Return the convex combination nearest to one query, by non-negative least squares.

    With the query as the origin, the squared distance is |B^T w|^2. Adding c^2 (sum w - 1)^2 and
    leaving out sum w = 1 changes the best w by a factor only, whatever c: for w = t v with v in
    the simplex, t^2 D^2 + c^2 (t - 1)^2 is least at D^2 c^2 / (D^2 + c^2), which rises with D.

    Args:
        points: (points, features), float64.
        query: (features,), float64.

    Returns:
        Weights (points,), float64.
    """
    moved = (points - query).cpu().numpy()
    row = max(float(np.linalg.norm(moved, axis=1).min()), 1e-12 * float(abs(moved).max()), 1e-300)
    system = np.concatenate([moved.T, np.full((1, len(moved)), row)])
    wanted = np.zeros(len(system))
    wanted[-1] = row
    weights = torch.as_tensor(
        nnls(system, wanted, maxiter=30 * len(moved))[0], device=points.device
    )
    return weights / weights.sum()


def size(points: Tensor) -> float:
    """Return the root mean square distance of points from their mean, 1 if they are one point."""
    flat = points.reshape(-1, points.shape[-1])
    return float((flat - flat.mean(0)).square().sum(1).mean().sqrt()) or 1.0


def _combine(weights: Tensor, points: Tensor) -> Tensor:
    if points.dim() == 2:
        return weights @ points
    return torch.einsum("bn,bnd->bd", weights, points)


def _slopes(points: Tensor, weights: Tensor, away: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what moving towards each point costs, the best point, the worst in use, the gap."""
    slope = away @ points.T if points.dim() == 2 else torch.einsum("bnd,bd->bn", points, away)
    best = slope.argmin(1)
    worst = slope.masked_fill(weights <= 0, -torch.inf).argmax(1)
    gap = (weights * slope).sum(1) - slope.gather(1, best[:, None])[:, 0]
    return slope, best, worst, gap


def _pick(points: Tensor, index: Tensor) -> Tensor:
    if points.dim() == 2:
        return points[index]
    return points[torch.arange(len(points)), index]
