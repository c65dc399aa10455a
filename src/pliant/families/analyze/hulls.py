"""Classes as convex hulls of their features, and which hull is nearest to others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pliant.errors import DataError
from pliant.math.hull import Approach, exact_weights, nearest, size

Sampling = Literal["none", "random", "kmeans", "extreme", "query-local"]
Normalize = Literal["none", "l2", "standardize"]
Solver = Literal["frank-wolfe", "nnls"]

NUMBERS = 2**21  # of weights and distances that are held for some queries at once
WIDE = 512  # features above which they are reduced to COMPONENTS
COMPONENTS = 256
INSIDE = 1e-6  # of the features' spread: nearer than this, a query is inside a hull
STEPS = 128  # of Frank-Wolfe: to solve a query exactly takes about as long as so many
LOOK = 4  # steps between two looks at which hulls may still be nearest
_LLOYD = 10  # rounds of k-means: members near the centres are wanted, not the centres


@dataclass(frozen=True, eq=False)
class Space:
    """What is done to features before hulls are made of them: affine, but for l2.

    Args:
        mean: taken off, (features,).
        scale: divided by, (features,).
        unit: whether rows are first brought to length one.
        basis: the principal directions, (features, components), or None for all features.
    """

    mean: Tensor
    scale: Tensor
    unit: bool = False
    basis: Tensor | None = None

    def enter(self, features: Tensor) -> Tensor:
        """Return features in this space, float64."""
        rows = _unit(features.double()) if self.unit else features.double()
        rows = (rows - self.mean) / self.scale
        return rows if self.basis is None else rows @ self.basis


def space(features: Tensor, normalize: Normalize = "none", components: int | None = None) -> Space:
    """Fit a space to training features.

    Args:
        features: (samples, features).
        normalize: nothing, rows of length one, or features of mean 0 and variance 1.
        components: principal components to keep; None for all features, or `COMPONENTS` of more
            than `WIDE`. A linear map sends hulls to hulls, so only what is left out is lost.
    """
    rows = _unit(features.double()) if normalize == "l2" else features.double()
    mean, scale = rows.mean(0), torch.ones_like(rows[0])
    if normalize == "standardize":
        spread = rows.std(0, correction=0)
        scale = torch.where(spread > 0, spread, 1.0)
    wanted = components or (COMPONENTS if rows.shape[1] > WIDE else rows.shape[1])
    basis = None
    if wanted < rows.shape[1]:
        basis = torch.linalg.svd((rows - mean) / scale, full_matrices=False)[2][:wanted].T
    return Space(mean, scale, normalize == "l2", basis)


@dataclass(frozen=True, eq=False)
class Hulls:
    """The hull of every class, and how queries are held against them.

    Args:
        classes: their labels, (classes,), ascending.
        points: of every class, (points, features).
        means: of every class, of all its points, (classes, features).
        space: that the points are in.
        scale: the spread of all points.
        rows: most points of a class that one query is held against: its nearest ones.
        solver: pairwise Frank-Wolfe for many queries at once, or non-negative least squares.
        tolerance: relative gap at which Frank-Wolfe stops.
        most: its steps after which a query is solved exactly.
    """

    classes: Tensor
    points: tuple[Tensor, ...]
    means: Tensor
    space: Space
    scale: float
    rows: int | None = None
    solver: Solver = "frank-wolfe"
    tolerance: float = 1e-6
    most: int = STEPS

    def scores(self, features: Tensor) -> Tensor:
        """Return a number for each query and class, the greatest for the class to choose.

        Outside of a hull it is minus the distance. Inside it is positive and the greater the
        nearer the mean of the class, and less than the smallest distance that is told from zero.

        Args:
            features: (queries, features) as they were fitted.

        Returns:
            (queries, classes), float64.
        """
        queries = self.space.enter(features)
        parts = [self._distances(part) for part in self._chunks(queries)]
        distances = torch.cat(parts) if parts else queries.new_zeros(0, len(self.classes))
        return self._scored(distances, queries)

    def predict(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the index of the nearest hull of each query, and which hulls hold it.

        Equal to the greatest of `scores` without computing them all: a class is given up as soon
        as the least its distance can be is more than the most that another's can be. Where a query
        is in one hull only, that one may be left unsaid.

        Returns:
            (queries,), and (queries, classes) of truth values.
        """
        queries = self.space.enter(features)
        found = [self._prune(part) for part in self._chunks(queries)]
        distances = torch.cat(found) if found else queries.new_zeros(0, len(self.classes))
        scores = self._scored(distances, queries)
        return scores.argmax(1), scores > 0

    def _scored(self, distances: Tensor, queries: Tensor) -> Tensor:
        """Put the depth inside in the place of distances that are zero but for rounding."""
        limit = INSIDE * self.scale
        depth = limit / (1 + torch.cdist(queries, self.means) / self.scale)
        return torch.where(distances <= limit, depth, -distances)

    def _distances(self, queries: Tensor) -> Tensor:
        columns = []
        for number in range(len(self.classes)):
            points = self._points(number, queries)
            if self.solver == "nnls":
                each = points.expand(len(queries), *points.shape[-2:])
                pairs = zip(each, queries, strict=True)
                ways = [exact_weights(rows, query) @ rows - query for rows, query in pairs]
                columns.append(torch.stack(ways).norm(dim=1))
            else:
                found = nearest(
                    points, queries, tolerance=self.tolerance, most=self.most, scale=self.scale
                )
                columns.append(found.distance)
        return torch.stack(columns, 1)

    def _prune(self, queries: Tensor) -> Tensor:
        """Return upper bounds of all distances, tight for the nearest hull of each query."""
        if self.solver == "nnls":
            return self._distances(queries)
        hulls = [
            Approach(self._points(number, queries), queries, self.scale, self.tolerance)
            for number in range(len(self.classes))
        ]
        while True:
            rivals = self._rivals(hulls)
            if not rivals.any():
                break
            for hull, rows in zip(hulls, rivals.T, strict=True):
                at = rows.nonzero()[:, 0]
                if hull.steps < self.most:
                    hull.refine(at, LOOK)
                else:
                    for row in at.tolist():
                        hull.solve(row)
        return torch.stack([hull.upper for hull in hulls], 1)

    @staticmethod
    def _rivals(hulls: Sequence[Approach]) -> Tensor:
        """Say which classes of which queries may still be nearest and are not settled."""
        lower = torch.stack([hull.lower for hull in hulls], 1)
        upper = torch.stack([hull.upper for hull in hulls], 1)
        open_ = ~torch.stack([hull.done for hull in hulls], 1)
        possible = lower <= upper.min(1, keepdim=True).values
        contested = possible.sum(1, keepdim=True) > 1
        return open_ & possible & contested

    def _points(self, number: int, queries: Tensor) -> Tensor:
        """The points of a class, or of many those nearest to each query."""
        points = self.points[number]
        if self.rows is None or len(points) <= self.rows:
            return points
        near = torch.cdist(queries, points).topk(self.rows, dim=1, largest=False).indices
        return points[near]

    def _chunks(self, queries: Tensor) -> Iterator[Tensor]:
        each = sum(len(points) for points in self.points)
        if self.rows is not None:
            each += min(self.rows, max(map(len, self.points))) * queries.shape[1]
            each *= 2  # gathered points, and the products with them
        yield from queries.split(max(1, NUMBERS // each)) if len(queries) else ()


def fit(
    features: Tensor,
    labels: Tensor,
    *,
    sampling: Sampling = "query-local",
    rows: int = 500,
    normalize: Normalize = "none",
    components: int | None = None,
    solver: Solver = "frank-wolfe",
    tolerance: float = 1e-6,
    most: int = STEPS,
    generator: torch.Generator | None = None,
) -> Hulls:
    """Make the hull of each class of training features.

    Args:
        features: (samples, features), finite.
        labels: (samples,), whole numbers.
        sampling: which points of a class with more than `rows` are used: all, a draw, the members
            nearest to the centres of k-means, the points that are farthest from the hull of those
            before, or for every query the nearest ones, which is exact if they hold its support.
        rows: most points of one class that are used; of all `sampling` but "none".
        normalize: as for `space`.
        components: as for `space`.
        solver: as for `Hulls`.
        tolerance: as for `Hulls`.
        most: as for `Hulls`.
        generator: draws points and the first centres.

    Raises:
        DataError: there is no sample, or a number that is not finite.
    """
    if features.dim() != 2 or not len(features) or len(features) != len(labels):
        raise DataError(
            f"Hulls are made of features (samples, features) with as many labels, but "
            f"{tuple(features.shape)} and {len(labels)} labels came."
        )
    if not torch.isfinite(features).all():
        raise DataError("Features must be finite, but some are NaN or infinity.")
    generator = generator or torch.Generator().manual_seed(0)
    found = space(features, normalize, components)
    entered = found.enter(features)
    classes, index = labels.unique(return_inverse=True)
    groups = [entered[index == number] for number in range(len(classes))]
    means = torch.stack([group.mean(0) for group in groups])
    scale = size(entered)
    if sampling not in ("none", "query-local"):
        groups = [_sampled(group, sampling, rows, generator) for group in groups]
    local = rows if sampling == "query-local" else None
    return Hulls(classes, tuple(groups), means, found, scale, local, solver, tolerance, most)


def _sampled(points: Tensor, how: Sampling, rows: int, generator: torch.Generator) -> Tensor:
    if len(points) <= rows:
        return points
    drawn = torch.randperm(len(points), generator=generator)[:rows]
    if how == "random":
        return points[drawn]
    return points[_central(points, drawn) if how == "kmeans" else extremes(points, rows)]


def _central(points: Tensor, first: Tensor) -> Tensor:
    """Return the members nearest to the centres of k-means, begun at some members."""
    centres = points[first].clone()
    for _ in range(_LLOYD):
        nearest_ = torch.cdist(points, centres).argmin(1)
        counts = torch.bincount(nearest_, minlength=len(centres))
        sums = torch.zeros_like(centres).index_add_(0, nearest_, points)
        filled = counts > 0
        centres[filled] = sums[filled] / counts[filled, None]
    return torch.cdist(centres, points).argmin(1).unique()


def extremes(points: Tensor, count: int) -> Tensor:
    """Choose points one by one, each the farthest from the hull of those before.

    Distances only fall as points join, so an old one is an upper bound: the greatest is computed
    anew until it stays the greatest.

    Args:
        points: (points, features), float64.
        count: how many; fewer if the hull of fewer holds all.

    Returns:
        Indices, in the order chosen; the first is the farthest from the mean.
    """
    scale = size(points)
    first = int((points - points.mean(0)).square().sum(1).argmax())
    chosen = [first]
    bounds = (points - points[first]).norm(dim=1)
    fresh = torch.ones(len(points), dtype=torch.bool)
    while len(chosen) < count:
        row = int(bounds.argmax())
        if float(bounds[row]) <= INSIDE * scale:
            break
        if fresh[row]:
            chosen.append(row)
            bounds[row], fresh[:] = 0.0, False
            continue
        hull = points[chosen]
        bounds[row] = float((exact_weights(hull, points[row]) @ hull - points[row]).norm())
        fresh[row] = True
    return torch.tensor(chosen)


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
