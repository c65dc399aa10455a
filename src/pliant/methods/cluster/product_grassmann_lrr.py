"""Tri-factor low-rank representation on product Grassmann manifolds: groups of image sets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from pliant.errors import DataError, MethodError
from pliant.families.solve.admm import Blocks, Pace, Solved, admm
from pliant.families.solve.grassmann import (
    affinity,
    errors,
    normalized_cut,
    points,
    product_gram,
    representation,
)
from pliant.registry import In, Paper, register
from pliant.result import Solution, Views

SETTLED = 1e-4  # relative change of the robust objective at which reweighting stops
ROUNDS = 20  # of reweighting, at most
SMOOTHING = 1e-8  # of robust errors, relative to their mean: keeps weights finite
TINY = 1e-12


@register(
    "product_grassmann_lrr",
    paper=Paper(
        "Low Rank Representation on Product Grassmann Manifolds for Multi-view Subspace Clustering",
        "J. Guo, Y. Sun, J. Gao, Y. Hu, B. Yin",
        "ICPR",
        2020,
    ),
    verb="cluster",
)
@dataclass(frozen=True)
class ProductGrassmannLRR:
    """Groups samples that are sets of vectors, seen in one or more views.

    Each set becomes the subspace that holds most of it, a point on a Grassmann manifold; the views
    of a sample make a point on the product. Every point is represented by the others through a
    matrix Z = P S Q^T with orthonormal P and Q and a small S of low nuclear norm, so the rank of Z
    is at most that of S. Groups come from a normalized cut of Z.

    The values are ``labels``, ``representation`` (Z) and ``affinity``.

    *Departs from the paper*: only its abstract could be read. With the squared error the model has
    a closed form, so that the two solvers agree, and so do other low-rank representations of equal
    rank: ``solver="spectral"``, the default, computes it; ``"admm"`` is the iteration.

    >>> ProductGrassmannLRR(rank=8).solver
    'spectral'
    """

    # p, dimensions of a subspace; fewer where a set has fewer vectors
    size: Annotated[int, In(1)] = 5
    # r, the most that Z may have; the number of groups if None
    rank: Annotated[int, In(1)] | None = None
    # lambda, in units of the largest eigenvalue of the Gram matrix
    strength: Annotated[float, In(0, 2, "high")] = 0.05
    weights: tuple[Annotated[float, In(0)], ...] = ()  # w, of the views; 1 each if empty
    solver: Literal["spectral", "admm"] = "spectral"  # closed form or iteration
    error: Literal["fro", "l21"] = "fro"  # squared, or robust to single samples (admm only)
    precomputed: bool = False  # x is a Gram matrix of the samples, or one per view
    # weight of the constraint at first, in units of the largest eigenvalue
    mu: Annotated[float, In(0, open="low")] = 0.15
    growth: Annotated[float, In(1, 10, "low")] = 1.01  # rho, of mu in each iteration
    tolerance: Annotated[float, In(0, open="low")] = 1e-6  # of the iteration
    iterations: Annotated[int, In(1)] = 2000  # at most

    def cluster(self, views: Views, groups: int, generator: torch.Generator) -> Solution:
        """Represent the samples by one another and cut the graph of their affinities."""
        self._check()
        gram = self.gram(views)
        rank = min(self.rank or groups, len(gram))
        top = float(torch.linalg.eigvalsh(gram)[-1])
        found, rows, converged = self._represent(gram, self.strength * top, rank)
        likeness = affinity(found)
        values = {
            "labels": normalized_cut(likeness, groups, generator),
            "representation": found,
            "affinity": likeness,
        }
        made = sum(row["iterations"] for row in rows)
        return Solution(values, tuple(rows), converged, made)

    def gram(self, views: Views) -> Tensor:
        """Return the Gram matrix (N, N) of the samples, the weighted sum over views.

        Raises:
            DataError: subspaces are not defined, or a precomputed matrix is no Gram matrix.
            MethodError: the weights do not fit the views.
        """
        if self.weights and (len(self.weights) != len(views) or min(self.weights) < 0):
            raise MethodError(
                f"product_grassmann_lrr: weights must be one number of 0 or more for each of the "
                f"{len(views)} views, not {self.weights}."
            )
        if self.precomputed:
            given = self.weights or (1.0,) * len(views)
            return torch.stack(
                [w * _given(view) for w, view in zip(given, views, strict=True)]
            ).sum(0)
        return product_gram([self._points(v, view) for v, view in enumerate(views)], self.weights)

    def _points(self, number: int, view: tuple[Tensor, ...]) -> Tensor:
        features = len(view[0])
        size = min(self.size, features, min(one.shape[1] for one in view))
        if size < 1 or size == features:
            raise DataError(
                f"Subspaces must have at least one dimension and fewer than the vectors, but view "
                f"{number} has n_features={features} and subspaces of {size}: choose another size."
            )
        return points(view, size)

    def _check(self) -> None:
        if not 0 <= self.strength < 2:
            raise MethodError(
                "product_grassmann_lrr: strength must lie in 0..2, since from 2 on nothing is left "
                f"of Z, not {self.strength}."
            )
        if self.rank is not None and self.rank < 1:
            raise MethodError(f"product_grassmann_lrr: rank must be 1 or more, not {self.rank}.")
        if self.error == "l21" and self.solver == "spectral":
            raise MethodError(
                'product_grassmann_lrr: the robust error has no closed form: use solver="admm".'
            )
        whole = self.mu > 0 and self.tolerance > 0 and self.iterations >= 1
        if not whole or not 1 < self.growth <= 10:
            raise MethodError(
                "product_grassmann_lrr: mu and tolerance must be positive, iterations 1 or more, "
                "and growth above 1 and at most 10: with a constant mu it may cycle."
            )

    def _represent(
        self, gram: Tensor, strength: float, rank: int
    ) -> tuple[Tensor, list[dict[str, Any]], bool]:
        """Solve for Z by the solver that was asked for."""
        if self.solver == "spectral":
            z = representation(gram, strength, rank)
            row = {"round": 0, "objective": _objective(gram, z, strength), "iterations": 1}
            return z, [row], True
        solved = self._iterate(gram, strength, rank, torch.ones_like(gram[0]))
        z = _product(solved.blocks)
        if self.error == "l21":
            return self._robust(gram, strength, rank, z)
        value = _objective(gram, z, strength)
        return z, [_row(0, value, solved)], solved.converged

    def _robust(
        self, gram: Tensor, strength: float, rank: int, z: Tensor
    ) -> tuple[Tensor, list[dict[str, Any]], bool]:
        """Weigh samples by 1 over their error until that changes nothing.

        Weights are scaled to a mean of 1 at the beginning, so that strength keeps its meaning.
        Each round minimises a bound of 2 / c * (sum of errors) + strength * (nuclear norm).
        """
        smooth = SMOOTHING * errors(gram, z).mean() + TINY
        scale = (errors(gram, z) + smooth).rsqrt().mean()
        rows: list[dict[str, Any]] = []
        for number in range(ROUNDS):
            weights = (errors(gram, z) + smooth).rsqrt() / scale
            solved = self._iterate(gram, strength, rank, weights)
            z = _product(solved.blocks)
            robust = 2 / scale * (errors(gram, z) + smooth).sqrt().sum()
            value = float(robust + strength * torch.linalg.svdvals(z).sum())
            rows.append(_row(number, value, solved))
            if number and abs(value / rows[-2]["objective"] - 1) < SETTLED:
                break
        return z, rows, solved.converged

    def _iterate(self, gram: Tensor, strength: float, rank: int, weights: Tensor) -> Solved:
        """The sweeps of the tri-factorization; sample j counts with weight j."""
        values, vectors = torch.linalg.eigh(gram)
        values = values.clamp_min(0)[:, None]
        scale = float(values.max().clamp_min(TINY))
        top, eye = vectors[:, -rank:], torch.eye(rank, dtype=gram.dtype, device=gram.device)

        def solve_z(now: Blocks, mu: float) -> Tensor:
            right = 2 * weights * gram + mu * _product(now) - now["dual"]
            return vectors @ ((vectors.T @ right) / (2 * weights * values + mu))

        def shifted(now: Blocks, mu: float) -> Tensor:
            return now["z"] + now["dual"] / mu

        start = {"z": top @ top.T, "p": top, "q": top, "s": eye, "dual": torch.zeros_like(gram)}
        return admm(
            start,
            {
                "z": solve_z,
                "p": lambda now, mu: _polar(shifted(now, mu) @ now["q"] @ now["s"].T),
                "q": lambda now, mu: _polar(shifted(now, mu).T @ now["p"] @ now["s"]),
                "s": lambda now, mu: _shrunk(
                    now["p"].T @ shifted(now, mu) @ now["q"], strength / mu
                ),
            },
            {"dual": lambda now: now["z"] - _product(now)},
            # A weight far below the eigenvalues lets Z drift to the identity, and the factors
            # to a subspace of no meaning.
            Pace(self.mu * scale, self.growth, 1e6 * scale, self.iterations, self.tolerance),
            watch=("z",),
        )


def _row(number: int, objective: float, solved: Solved) -> dict[str, Any]:
    return {
        "round": number,
        "objective": objective,
        "iterations": solved.iterations,
        "residual": solved.residual,
    }


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


def _product(now: Blocks) -> Tensor:
    return now["p"] @ now["s"] @ now["q"].T


def _polar(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns (the Procrustes problem)."""
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vh


def _shrunk(matrix: Tensor, by: float) -> Tensor:
    """Lower the singular values: the proximal point of the nuclear norm."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return (u * (s - by).clamp_min(0)) @ vh


def _objective(gram: Tensor, z: Tensor, strength: float) -> float:
    return float(errors(gram, z).sum() + strength * torch.linalg.svdvals(z).sum())
