"""Tri-factor low-rank representation on product Grassmann manifolds: groups of image sets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from pliant.families.solve.admm import Blocks, Solved, admm
from pliant.families.solve.grassmann import gram_of
from pliant.families.solve.selfrep import (
    Fit,
    check_error,
    closed_form,
    grouped,
    iterated,
    nuclear_norm,
)
from pliant.math.svd import polar, soft_spectrum
from pliant.registry import In, Paper, register
from pliant.result import Solution, Views


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

    *Measured* (bench ``clustering``): 83.75 % of the 80 objects of ETH-80 are grouped rightly by
    the defaults, which were chosen on skeletons and digits, 81.5 % by k-means of projectors and
    65.25 % by k-means of means.

    A subspace counts all its directions alike. Where the groups differ in their means already,
    k-means of the means is the better and cheaper choice: 90 % against 82 % on sets of digits half
    of which are strangers. Under strong white noise ``centre=False`` leaves the one direction that
    noise cannot turn.

    *Departs from the paper*: only its abstract could be read. With the squared error the model has
    a closed form, so that the two solvers agree, and so do other low-rank representations of equal
    rank: ``solver="spectral"``, the default, computes it; ``"admm"`` is the iteration. Centring,
    one direction more than groups and the affinity by angles are ours, chosen on skeletons and
    digits.

    >>> ProductGrassmannLRR(rank=8).solver
    'spectral'
    """

    # p, dimensions of a subspace; fewer where a set has fewer vectors
    size: Annotated[int, In(1)] = 5
    centre: bool = True  # take the mean of all vectors of a view off them first
    # r, the most that Z may have; one more than the groups if None
    rank: Annotated[int, In(1)] | None = None
    # lambda, in units of the largest eigenvalue of the Gram matrix
    strength: Annotated[float, In(0, 2, "high")] = 0.05
    weights: tuple[Annotated[float, In(0)], ...] = ()  # w, of the views; 1 each if empty
    affinity: Literal["angles", "sizes"] = "angles"  # of samples: in the space of Z, or its entries
    solver: Literal["spectral", "admm"] = "spectral"  # closed form or iteration
    error: Literal["fro", "l21"] = "fro"  # squared, or robust to single samples (admm only)
    precomputed: bool = False  # x is a Gram matrix of the samples, or one per view
    # at first, in units of the largest eigenvalue; at least twice the strength
    mu: Annotated[float, In(0, open="low")] = 0.15
    growth: Annotated[float, In(1, 10, "low")] = 1.01  # rho, of mu in each iteration
    tolerance: Annotated[float, In(0, open="low")] = 1e-6  # of the iteration
    iterations: Annotated[int, In(1)] = 2000  # at most

    def cluster(self, views: Views, groups: int, generator: torch.Generator) -> Solution:
        """Represent the samples by one another and cut the graph of their affinities."""
        check_error("product_grassmann_lrr", self)
        gram = gram_of("product_grassmann_lrr", views, self)
        rank = min(self.rank or groups + 1, len(gram))
        strength = self.strength * float(torch.linalg.eigvalsh(gram)[-1])
        if self.solver == "spectral":
            found = closed_form(gram, strength, rank)
            return grouped(found, groups, self.affinity, generator)
        found = iterated(
            gram,
            lambda fit: self._sweeps(fit, strength, rank),
            _product,
            lambda now: strength * nuclear_norm(_product(now)),
            robust=self.error == "l21",
        )
        return grouped(found, groups, self.affinity, generator)

    def _sweeps(self, fit: Fit, strength: float, rank: int) -> Solved:
        """The tri-factorization: Z, then P and Q by Procrustes, then S by soft thresholding."""
        top, like = fit.vectors[:, -rank:], fit.gram
        eye = torch.eye(rank, dtype=like.dtype, device=like.device)
        linear = fit.linear

        def solve_z(now: Blocks, mu: float) -> Tensor:
            return fit.least(linear + mu * _product(now) - now["dual"], mu)

        def target(now: Blocks, mu: float) -> Tensor:
            return now["z"] + now["dual"] / mu

        return admm(
            {"z": top @ top.T, "p": top, "q": top, "s": eye, "dual": torch.zeros_like(like)},
            {
                "z": solve_z,
                "p": lambda now, mu: polar(target(now, mu) @ now["q"] @ now["s"].T),
                "q": lambda now, mu: polar(target(now, mu).T @ now["p"] @ now["s"]),
                "s": lambda now, mu: soft_spectrum(
                    now["p"].T @ target(now, mu) @ now["q"], strength / mu
                ),
            },
            {"dual": lambda now: now["z"] - _product(now)},
            fit.pace(self),
            watch=("z",),
        )


def _product(now: Blocks) -> Tensor:
    return now["p"] @ now["s"] @ now["q"].T
