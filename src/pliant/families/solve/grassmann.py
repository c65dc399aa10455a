"""Subspaces as points, how alike they are, and self-representations of them.

A point of a Grassmann manifold is a subspace of R^d, held as an orthonormal basis (d, p). Two of
them are as alike as their projectors: <X X^T, Y Y^T> = |X^T Y|^2, between 0 and p. Points of a
product of manifolds are one subspace per view; their likenesses add up.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pliant.errors import DataError, require

RESTARTS = 20  # of k-means
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
                f"Every sample must span {size} dimensions, but sample {number} spans {spanned}: "
                "ask for smaller subspaces, or leave it out."
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


# ---------------------------------------------------------------- self-representation


def representation(gram: Tensor, strength: float, rank: int) -> Tensor:
    """Minimise tr(Z^T G Z) - 2 tr(G Z) + strength * (nuclear norm of Z) over rank(Z) <= rank.

    The global optimum in closed form: of the eigenvectors of G with the `rank` largest
    eigenvalues d, each is kept with the gain max(0, 1 - strength / (2 d)). At full rank this is
    low-rank representation (LRR) itself.
    """
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values[-rank:], vectors[:, -rank:]
    safe = values.clamp_min(torch.finfo(values.dtype).tiny)
    gain = (1 - strength / (2 * safe)).clamp_min(0)
    return (vectors * gain) @ vectors.T


def errors(gram: Tensor, z: Tensor) -> Tensor:
    """Return the squared distance of every sample to its representation: (N,)."""
    found = ((gram @ z - 2 * gram) * z).sum(0) + gram.diagonal()
    return found.clamp_min(0)


def affinity(z: Tensor) -> Tensor:
    """Return how strongly samples represent one another, symmetric: (|Z| + |Z^T|) / 2."""
    return (z.abs() + z.abs().T) / 2


def normalized_cut(likeness: Tensor, groups: int, generator: torch.Generator) -> Tensor:
    """Divide samples into groups by spectral clustering: labels (N,), numbered as they appear.

    k-means on the rows, of length 1, of the first eigenvectors of D^-1/2 W D^-1/2. A sample
    without any affinity gets a small one to itself.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    eye = torch.eye(len(likeness), dtype=likeness.dtype, device=likeness.device)
    looped = likeness + 1e-10 * likeness.max().clamp_min(1e-12) * eye
    root = looped.sum(1).rsqrt()
    vectors = torch.linalg.eigh(root[:, None] * looped * root)[1][:, -groups:]
    rows = torch.nn.functional.normalize(vectors, dim=1)
    seed = int(torch.randint(2**31, (), generator=generator))
    means = require("sklearn.cluster", "cluster").KMeans(groups, n_init=RESTARTS, random_state=seed)
    found = torch.as_tensor(means.fit_predict(rows.cpu().numpy())).long()
    return renumbered(found).to(likeness.device)


def renumbered(labels: Tensor) -> Tensor:
    """Number groups in the order in which they appear, so that equal divisions are equal."""
    order = dict.fromkeys(labels.tolist())
    numbers = {label: number for number, label in enumerate(order)}
    return torch.tensor([numbers[label] for label in labels.tolist()])
