"""Factors that minimise a layer's output error, given the second moments C of its inputs.

The error E of a weight matrix costs tr(E C E^T). A kernel is handled as a block (T, P, K):
P columns that the first layer mixes, K positions that only the last layer sees, so that the
approximation is W'[t, p, k] = sum_r B[t, r, k] A[r, p], with C over the P*K columns.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pliant.errors import PliantError
from pliant.math.svd import leading

DAMPING = 1e-4
"""Share of the mean eigenvalue added to the moments, which few samples leave singular."""

_STEPS = 8  # conjugate-gradient steps per sweep: the preconditioner leaves little to do
_SETTLED = 1e-3  # relative gain below which another sweep is not worth its time


def dampen(moments: Tensor, damping: float = DAMPING) -> Tensor:
    """Make moments symmetric and safely positive definite.

    Adds `damping` times the mean eigenvalue to the diagonal, and ten times as much as often as
    needed where moments summed in short floats have negative eigenvalues. Moments that are
    zero altogether say nothing about the inputs: the identity (plain weight error) takes their
    place.

    Raises:
        PliantError: the moments are not finite.
    """
    symmetric = (moments + moments.T) / 2
    eye = torch.eye(len(moments), dtype=moments.dtype, device=moments.device)
    mean = symmetric.diagonal().mean()
    if not symmetric.isfinite().all():
        raise PliantError(
            "Finite second moments were expected, not NaN or infinity: look for overflow in the "
            "inputs of this layer."
        )
    if mean <= 0:
        return eye
    # Half must do, so that whole leaves a margin.
    while torch.linalg.cholesky_ex(symmetric + damping / 2 * mean * eye).info:
        damping *= 10
    return symmetric + damping * mean * eye


def channel_moments(moments: Tensor, positions: int) -> Tensor:
    """Sum patch moments over the positions of the kernel: (P*K, P*K) becomes (P, P)."""
    size = len(moments) // positions
    return torch.einsum("pkqk->pq", moments.reshape(size, positions, size, positions))


def project_outputs(matrix: Tensor, metric: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the best rank-r factors (r, columns) and (T, r) of a matrix in a metric C.

    The leading eigenvectors U of W C W^T give W' = U U^T W, an exact optimum that inverts
    nothing (Eckart-Young for W C^(1/2)).
    """
    if matrix.shape[0] <= matrix.shape[1]:
        basis = torch.linalg.eigh(matrix @ metric @ matrix.T)[1][:, -rank:].flip(1)
    else:
        basis = leading(matrix @ torch.linalg.cholesky(metric), rank)
    return basis.T @ matrix, basis


def refine(
    block: Tensor,
    metric: Tensor,
    starts: list[Tensor],
    rank_out: int | None,
    sweeps: int,
) -> tuple[Tensor, ...]:
    """Alternate between the last layers (exactly) and the first (conjugate gradients).

    Given A the best B is a linear regression, and its best cut to `rank_out` output directions
    an eigen-problem (reduced-rank regression). The error never rises from sweep to sweep, and
    never exceeds that of the best start.

    Args:
        block: (T, P, K) kernel.
        metric: (P*K, P*K) positive definite moments; best whitened over P.
        starts: candidates for A, each (r, P).
        rank_out: rank of the outputs, or None to leave B whole.
        sweeps: most sweeps to make.

    Returns:
        (A, B) with B (T, r, K), or with rank_out (A, core, U): core (rank_out, r, K) and
        orthonormal U (T, rank_out).
    """
    weighted = (block.flatten(1) @ metric).reshape(block.shape)
    total = float((block * weighted).sum())
    found = [_last_layers(block, metric, start, rank_out) for start in starts]
    gain, factors = max(found, key=lambda candidate: candidate[0])
    for _ in range(sweeps):
        last = _multiplied(factors)
        first = _first_layer(weighted, metric, factors[0], last)
        after, candidate = _last_layers(block, metric, first, rank_out)
        error, lowered = total - gain, after - gain
        if lowered > 0:
            gain, factors = after, candidate
        if lowered <= _SETTLED * error:
            break
    return factors


def whiten(block: Tensor, metric: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Change the basis of the P columns so that their summed moments become the identity.

    Returns the block and the metric in the new basis, and the root L (P, P) with which a first
    layer A of the old basis is A L in the new one.
    """
    root = whitening(metric, block.shape[2])
    half = _solved(root, metric)
    white = _solved(root, half.T)
    return mix_inputs(block, root), (white + white.T) / 2, root


def whitening(metric: Tensor, positions: int) -> Tensor:
    """Return the root L (P, P) of the moments (P*K, P*K) summed over the K positions."""
    return torch.linalg.cholesky(channel_moments(metric, positions))


def mix_inputs(weight: Tensor, matrix: Tensor) -> Tensor:
    """Multiply the input axis of a kernel (T, r, ...) by a matrix (r, S)."""
    return torch.einsum("tr...,rs->ts...", weight, matrix)


def _solved(root: Tensor, matrix: Tensor) -> Tensor:
    """Apply the inverse of root (P, P) to the P part of the rows of a (P*K, P*K) matrix."""
    tall = matrix.reshape(len(root), -1)
    return torch.linalg.solve_triangular(root, tall, upper=False).reshape(matrix.shape)


def _last_layers(
    block: Tensor, metric: Tensor, first: Tensor, rank_out: int | None
) -> tuple[float, tuple[Tensor, ...]]:
    """Return how much a first layer explains with its best last layers, and all of them."""
    out, columns, positions = block.shape
    # Only the span of A matters: orthonormal rows keep the regression well conditioned.
    first = torch.linalg.qr(first.T)[0].T
    rank = len(first)
    seen = (first @ metric.reshape(columns, -1)).reshape(rank * positions, columns, positions)
    inner = torch.einsum("xpk,qp->xqk", seen, first).flatten(1)
    cross = seen.flatten(1) @ block.flatten(1).T
    last = torch.cholesky_solve(cross, torch.linalg.cholesky((inner + inner.T) / 2)).T
    if rank_out is None:
        return float((last * cross.T).sum()), (first, last.reshape(out, rank, positions))
    explained = last @ cross
    values, vectors = torch.linalg.eigh((explained + explained.T) / 2)
    basis = vectors[:, -rank_out:].flip(1)
    core = (basis.T @ last).reshape(rank_out, rank, positions)
    return float(values[-rank_out:].sum()), (first, core, basis)


def _multiplied(factors: tuple[Tensor, ...]) -> Tensor:
    """The last layers as one; a core alone will do, as its basis is orthonormal."""
    if len(factors) == 2:
        return factors[1]
    return torch.einsum("tq,qrk->trk", factors[2], factors[1])


def _first_layer(weighted: Tensor, metric: Tensor, start: Tensor, last: Tensor) -> Tensor:
    """Improve A for fixed B by preconditioned conjugate gradients, which never raise the error."""
    columns, positions = weighted.shape[1:]
    rank = len(start)
    flat = last.flatten(1)
    overlap = (flat.T @ flat).reshape(rank, positions, rank, positions)
    wide = metric.reshape(columns, -1)

    def normal(matrix: Tensor) -> Tensor:
        seen = (matrix @ wide).reshape(rank, positions, columns, positions)
        return torch.einsum("qlrk,rksl->qs", overlap, seen)

    target = torch.einsum("tql,tsl->qs", last, weighted)
    root = _preconditioner(overlap, metric.reshape(columns, positions, columns, positions))
    return _conjugate_gradients(normal, target, start, root)


def _preconditioner(overlap: Tensor, metric: Tensor) -> Tensor:
    """Cholesky root of the normal equations with the columns taken as white."""
    average = torch.einsum("pkpl->kl", metric) / len(metric)
    small = torch.einsum("qlrk,kl->qr", overlap, average)
    small = (small + small.T) / 2
    ridge = 1e-10 * small.diagonal().mean() + torch.finfo(small.dtype).tiny
    eye = torch.eye(len(small), dtype=small.dtype, device=small.device)
    return torch.linalg.cholesky(small + ridge * eye)


def _conjugate_gradients(
    normal: Callable[[Tensor], Tensor], target: Tensor, start: Tensor, root: Tensor
) -> Tensor:
    """Take a few steps towards normal(x) = target from a start."""
    point, residual = start, target - normal(start)
    ahead = torch.cholesky_solve(residual, root)
    slope = float((residual * ahead).sum())
    direction, first_slope = ahead, slope
    for _ in range(_STEPS):
        if slope <= 1e-16 * first_slope or slope == 0.0:
            break
        curved = normal(direction)
        curvature = float((direction * curved).sum())
        if curvature <= 0.0:
            break
        point = point + direction * (slope / curvature)
        residual = residual - curved * (slope / curvature)
        ahead = torch.cholesky_solve(residual, root)
        slope, before = float((residual * ahead).sum()), slope
        direction = ahead + direction * (slope / before)
    return point
