"""Subspaces as points of Grassmann manifolds, and how alike they are.

A point of a Grassmann manifold is a subspace of R^d, held as an orthonormal basis (d, p). Two of
them are as alike as their projectors: <X X^T, Y Y^T> = |X^T Y|^2, between 0 and p. Points of a
product of manifolds are one subspace per view; their likenesses add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pliant.errors import DataError, MethodError
from pliant.result import Views

DEPENDENT = 1e-9  # a singular value below this share of the largest is none


def points(sets: Sequence[Tensor], size: int) -> Tensor:
    """Return the subspaces (N, d, size) that hold most of each set of column vectors.

    Args:
        sets: N matrices (d, columns), not centred.
        size: dimensions of every subspace, at most the columns of the smallest set.

    Raises:
        DataError: a set spans fewer dimensions, so that its subspace is not defined.
    """
    found = []
    for number, matrix in enumerate(sets):
        basis, s, _ = torch.linalg.svd(matrix.double(), full_matrices=False)
        spanned = int((s > DEPENDENT * s.max()).sum()) if s.max() > 0 else 0
        if spanned < size:
            raise DataError(
                f"Every sample must span {size} dimensions, but sample {number} of n_samples = "
                f"{len(sets)} spans {spanned}: ask for smaller subspaces, or leave it out."
            )
        found.append(basis[:, :size])
    return torch.stack(found)


def grassmann_gram(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Return |X_i^T Y_j|^2 of points (N, d, p) and (M, d, q): (N, M), without any projector."""
    y = x if y is None else y
    angles = torch.einsum("idp,jdq->ipjq", x, y)
    return angles.square().sum((1, 3))


def product_gram(views: Sequence[Tensor], weights: Sequence[float] = ()) -> Tensor:
    """Add up the Gram matrices of several views, with weights of 1 if none are given."""
    given = list(weights) or [1.0] * len(views)
    grams = [weight * grassmann_gram(view) for weight, view in zip(given, views, strict=True)]
    return torch.stack(grams).sum(0)


def gram_of(name: str, views: Views, method: Any) -> Tensor:
    """Return the Gram matrix (N, N) of the samples, the weighted sum over views.

    Args:
        name: of the method that asks, for its refusals.
        views: sets of column vectors, or Gram matrices if they are precomputed.
        method: holds the options `size`, `centre`, `weights` and `precomputed`.

    Raises:
        DataError: subspaces are not defined, or a precomputed matrix is no Gram matrix.
        MethodError: the weights do not fit the views.
    """
    weights = method.weights
    if weights and (len(weights) != len(views) or min(weights) < 0):
        raise MethodError(
            f"{name}: weights must be one number of 0 or more for each of the {len(views)} views, "
            f"not {weights}."
        )
    if method.precomputed:
        given = zip(weights or (1.0,) * len(views), views, strict=True)
        return torch.stack([weight * _given(view) for weight, view in given]).sum(0)
    if method.centre:
        views = tuple(centred(view) for view in views)
    bases = [_points(number, view, method.size) for number, view in enumerate(views)]
    return product_gram(bases, weights)


def centred(sets: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Take the mean of all column vectors off each of them.

    What all sets share, such as a mean image, would otherwise be the first direction of every
    subspace and tell none of them apart. A single vector is its own mean, and stays.
    """
    columns = torch.cat([one.double() for one in sets], 1)
    mean = columns.mean(1, keepdim=True) if columns.shape[1] > 1 else 0.0
    return tuple(one.double() - mean for one in sets)


def _points(number: int, view: tuple[Tensor, ...], size: int) -> Tensor:
    features = len(view[0])
    size = min(size, features, min(one.shape[1] for one in view))
    if size < 1 or size == features:
        raise DataError(
            f"Subspaces must have at least one dimension and fewer than the vectors, but view "
            f"{number} has n_features={features} and subspaces of {size}: choose another size."
        )
    return points(view, size)


def _given(view: tuple[Tensor, ...]) -> Tensor:
    """Take a Gram matrix that came as samples of one column each."""
    matrix = torch.cat(view, 1).double()
    symmetric = matrix.shape[0] == matrix.shape[1] and torch.allclose(matrix, matrix.T)
    if not symmetric or float(torch.linalg.eigvalsh(matrix)[0]) < -1e-6 * float(matrix.trace()):
        raise DataError(
            "A precomputed x must be a Gram matrix (samples, samples), symmetric and positive "
            f"semidefinite, but a matrix of shape {tuple(matrix.T.shape)} came that is not."
        )
    return (matrix + matrix.T) / 2
