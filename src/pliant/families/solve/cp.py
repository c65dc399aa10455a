"""Canonical polyadic (CP) models of cubes, by TensorLy, and the features of pixels they give.

A cube (I, J, K) is a sum of R outer products w_r a_r o b_r o c_r: a_r over rows, b_r over columns,
c_r over bands. The feature of pixel (i, j) is A[i] * B[j] in R^R, of which its spectrum is a linear
function: x_ij = C diag(w) (A[i] * B[j]).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from pliant.errors import MethodError, PliantError, require
from pliant.math.svd import leading

Kind = Literal["cp", "nncp", "cp_rand"]
Start = Literal["random", "svd"]
Weight = Literal["none", "w", "sqrt"]
Factors = tuple[Tensor, Tensor, Tensor]

SAMPLES = 10  # of cp_rand, rows of each least squares problem for every component
EXTRA = "recover"


@dataclass(frozen=True, eq=False)
class CP:
    """A CP model.

    Args:
        weights: w, (R,), 0 or more.
        factors: A (I, R), B (J, R) and C (K, R), of columns of length 1; of a_r and b_r the entry
            of the largest size is positive.
        errors: relative error after each iteration.
        converged: whether it settled.
    """

    weights: Tensor
    factors: Factors
    errors: tuple[float, ...] = ()
    converged: bool = True


def rebuilt(weights: Tensor, factors: Factors) -> Tensor:
    """Return the cube (I, J, K) of a model."""
    rows, columns, bands = factors
    return torch.einsum("ir,jr,kr->ijk", rows * weights, columns, bands)


def pixel_features(model: CP, rows: Tensor, columns: Tensor, weight: Weight = "none") -> Tensor:
    """Return the features (n, R) of n pixels: products of rows of A and B.

    Args:
        model: the model.
        rows: where the pixels lie, (n,).
        columns: the same.
        weight: "w" multiplies by w, "sqrt" by its root, so that strong components count more for
            whatever does not standardize.

    Raises:
        PliantError: there is no such weight.
    """
    if weight not in get_args(Weight):
        raise PliantError(f"A weight of {get_args(Weight)} was expected, not {weight!r}.")
    found = model.factors[0][rows] * model.factors[1][columns]
    if weight == "none":
        return found
    return found * (model.weights if weight == "w" else model.weights.sqrt())


def normalized(factors: Sequence[Tensor]) -> tuple[Tensor, Factors]:
    """Give all columns length 1 and fix signs; lengths go into the weights, signs into C."""
    lengths = [factor.norm(dim=0) for factor in factors]
    tiny = torch.finfo(factors[0].dtype).tiny
    rows, columns, bands = (f / n.clamp_min(tiny) for f, n in zip(factors, lengths, strict=True))
    signs = [_sign(rows), _sign(columns)]
    weights = lengths[0] * lengths[1] * lengths[2]
    return weights, (rows * signs[0], columns * signs[1], bands * signs[0] * signs[1])


def _sign(factor: Tensor) -> Tensor:
    """The sign of the largest entry of each column; of a column of zeros 1."""
    largest = factor.gather(0, factor.abs().argmax(0, keepdim=True))[0]
    return torch.where(largest < 0, -1.0, 1.0).to(factor.dtype)


# ---------------------------------------------------------------- solvers


@dataclass(frozen=True)
class Search:
    """How a model is looked for.

    Args:
        kind: "cp" by alternating least squares (ALS), "nncp" of nonnegative factors by HALS,
            "cp_rand" by ALS on sampled rows.
        start: factors to begin with: uniform in 0..1, or the first singular vectors of every
            unfolding, of which there are at most as many as its rows; the rest is uniform.
        ridge: of "cp", a share of the mean diagonal of the normal equations at the start.
        iterations: at most.
        tolerance: change of the relative error at which it has settled.
    """

    kind: Kind
    start: Start
    ridge: float
    iterations: int
    tolerance: float


def decompose(
    x: Tensor, mask: Tensor | None, rank: int, search: Search, generator: torch.Generator
) -> CP:
    """Fit a CP model of this rank to a cube in float64.

    Args:
        x: (I, J, K); for "nncp" nothing in it is negative.
        mask: true where it is known; elsewhere the model's own values take its place ("cp" only).
        rank: R.
        search: how.
        generator: of everything random.

    Raises:
        MethodError: the normal equations are singular.
        MissingExtraError: TensorLy is not installed.
    """
    factors = _begin(x, rank, search, generator)
    found, errors = _fit(x, mask, factors, (), search, generator)
    return CP(*normalized(found), errors, _settled(errors, search))


def project(x: Tensor, model: CP, search: Search, generator: torch.Generator) -> CP:
    """Fit the factors of rows and columns of another cube with the same bands; C and w stay.

    Its features are codes of its spectra in the same components.
    """
    rank = len(model.weights)
    bands = model.factors[2] * model.weights
    begin = [torch.rand(n, rank, generator=generator, dtype=x.dtype).to(x) for n in x.shape[:2]]
    cube = x.movedim(2, 0)
    found, errors = _fit(cube, None, [bands, *begin], (0,), search, generator)
    factors = (found[1], found[2], model.factors[2])
    return CP(model.weights, factors, errors, _settled(errors, search))


def _begin(x: Tensor, rank: int, search: Search, generator: torch.Generator) -> list[Tensor]:
    factors = []
    for mode, size in enumerate(x.shape):
        factor = torch.rand(size, rank, generator=generator, dtype=x.dtype).to(x)
        if search.start == "svd":
            count = min(size, rank)
            vectors = leading(x.movedim(mode, 0).reshape(size, -1), count)
            factor[:, :count] = vectors.abs() if search.kind == "nncp" else vectors
        factors.append(factor)
    return factors


def _fit(
    x: Tensor,
    mask: Tensor | None,
    factors: list[Tensor],
    fixed: tuple[int, ...],
    search: Search,
    generator: torch.Generator,
) -> tuple[list[Tensor], tuple[float, ...]]:
    """Let TensorLy solve, on tensors of torch; its choice of backend is as it was afterwards."""
    require("tensorly", EXTRA)
    solve: dict[str, Callable[..., Any]] = {"cp": _als, "nncp": _hals, "cp_rand": _sampled}
    kind = "cp" if fixed and search.kind == "cp_rand" else search.kind
    start = (torch.ones_like(factors[0][0]), factors)
    seed = int(torch.randint(2**31, (), generator=generator))
    with require("tensorly", EXTRA).backend_context("pytorch", local_threadsafe=True):
        try:
            (_, found), errors = solve[kind](x, mask, start, list(fixed), search, seed)
        except torch.linalg.LinAlgError as error:
            raise MethodError(
                f"The normal equations of a CP model of rank {len(start[0])} are singular: raise "
                f"ridge, which is {search.ridge:g}."
            ) from error
    return list(found), tuple(float(value) for value in errors)


def _als(
    x: Tensor, mask: Tensor | None, start: Any, fixed: list[int], search: Search, seed: int
) -> Any:
    sizes = [factor.square().sum(0) for factor in start[1]]
    others = (sizes[1] * sizes[2], sizes[0] * sizes[2], sizes[0] * sizes[1])
    return require("tensorly.decomposition", EXTRA).parafac(
        x,
        len(start[0]),
        init=start,
        n_iter_max=search.iterations,
        tol=search.tolerance,
        l2_reg=search.ridge * float(torch.stack(others).mean()),
        mask=None if mask is None else mask.to(x.dtype),
        fixed_modes=fixed,
        return_errors=True,
    )


def _hals(
    x: Tensor, mask: Tensor | None, start: Any, fixed: list[int], search: Search, seed: int
) -> Any:
    return require("tensorly.decomposition", EXTRA).non_negative_parafac_hals(
        x,
        len(start[0]),
        init=start,
        n_iter_max=search.iterations,
        tol=search.tolerance,
        fixed_modes=fixed,
        return_errors=True,
    )


def _sampled(
    x: Tensor, mask: Tensor | None, start: Any, fixed: list[int], search: Search, seed: int
) -> Any:
    errors: list[float] = []
    found = require("tensorly.decomposition", EXTRA).randomised_parafac(
        x,
        len(start[0]),
        n_samples=SAMPLES * len(start[0]),
        init=start,
        n_iter_max=search.iterations,
        tol=search.tolerance,
        random_state=np.random.RandomState(seed),
        callback=lambda _, error=None: errors.append(error) if error is not None else None,
    )
    return found, errors


def _settled(errors: tuple[float, ...], search: Search) -> bool:
    return len(errors) > 1 and abs(errors[-2] - errors[-1]) < search.tolerance
