"""Factors that minimise a layer's output error, given the second moments C of its inputs.

The error E of a weight matrix costs tr(E C E^T). A kernel is handled as a block (T, P, K):
P columns that the first layer mixes, K positions that only the last layer sees, so that the
approximation is W'[t, p, k] = sum_r B[t, r, k] A[r, p], with C over the P*K columns.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from pliant.errors import PliantError
from pliant.math.svd import leading, unfold

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
    symmetric = moments + moments.T
    symmetric /= 2
    mean = symmetric.diagonal().mean()
    if not symmetric.isfinite().all():
        raise PliantError(
            "Finite second moments were expected, not NaN or infinity: look for overflow in the "
            "inputs of this layer."
        )
    if mean <= 0:
        return torch.eye(len(moments), dtype=moments.dtype, device=moments.device)
    plain = symmetric.diagonal().clone()
    # Half must do, so that whole leaves a margin.
    symmetric.diagonal().copy_(plain + damping / 2 * mean)
    while torch.linalg.cholesky_ex(symmetric).info:
        damping *= 10
        symmetric.diagonal().copy_(plain + damping / 2 * mean)
    symmetric.diagonal().copy_(plain + damping * mean)
    return symmetric


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
    starts: Sequence[Tensor],
    sizes: Sequence[tuple[int, ...]],
    sweeps: int,
) -> tuple[Tensor, ...]:
    """Alternate between the last layers (exactly) and the first (conjugate gradients).

    Given A the best B is a linear regression, and its best output directions an eigen-problem
    (reduced-rank regression). Several sizes, each of the first components of the same factors, are
    one such problem: a component counts as often as there are sizes that have it. The error,
    summed over sizes, never rises from sweep to sweep, and never exceeds that of the best start.

    Args:
        block: (T, P, K) kernel.
        metric: (P*K, P*K) positive definite moments; best whitened over P.
        starts: candidates for A, each (r, P) of the largest size.
        sizes: the ranks (r,) of each size, or (r, q) to cut B to q output directions.
        sweeps: most sweeps to make.

    Returns:
        (A, B) of the largest size with B (T, r, K), or (A, core, U): core (q, r, K) and
        orthonormal U (T, q).
    """
    weighted = (block.flatten(1) @ metric).reshape(block.shape)
    total = len(sizes) * float((block * weighted).sum())
    found = [_last_layers(block, metric, start, sizes) for start in starts]
    gain, factors = max(found, key=lambda candidate: candidate[0])
    for _ in range(sweeps):
        first = _first_layer(weighted, metric, factors, sizes)
        after, candidate = _last_layers(block, metric, first, sizes)
        error, lowered = total - gain, after - gain
        if lowered > 0:
            gain, factors = after, candidate
        if lowered <= _SETTLED * error:
            break
    return factors


def explained(block: Tensor, metric: Tensor | None = None, most: int | None = None) -> Tensor:
    """Return what a first layer of each rank explains of a kernel, with the best last layers.

    The first layer reads the kernel's leading directions, strongest first, on inputs that are
    white but for their positions: those of one rank are among those of the next. Its best last
    layers are a linear regression, and one Cholesky factor solves those of all ranks.

    Args:
        block: (T, P, K) kernel.
        metric: (P*K, P*K) positive definite moments; None for the weights themselves.
        most: largest rank to look at; None for all.

    Returns:
        Y (R, K, T) with R = min(P, T*K, most). With the first r rows as a matrix (r*K, T), Y^T Y
        is what rank r explains of W C W^T; min(P, T*K) rows explain the whole.
    """
    out, columns, positions = block.shape
    most = min(columns, out * positions, most or columns)
    if metric is None:
        first = leading(unfold(block, 1), most).T.to(block)
        return torch.einsum("rp,tpk->rkt", first, block)
    root = whitening(metric, positions)
    first = leading(unfold(mix_inputs(block, root), 1), most).T
    first = torch.linalg.solve_triangular(root, first, upper=False, left=False)
    inner, cross = _regression(block, metric, first)
    found = torch.linalg.solve_triangular(torch.linalg.cholesky(inner), cross, upper=False)
    return found.reshape(most, positions, out)


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
    block: Tensor, metric: Tensor, first: Tensor, sizes: Sequence[tuple[int, ...]]
) -> tuple[float, tuple[Tensor, ...]]:
    """Return how much a first layer explains with its best last layers, and all of them."""
    positions = block.shape[2]
    # Only the spans of A's first rows matter: orthonormal ones keep the regression in condition.
    first = torch.linalg.qr(first.T)[0].T
    inner, cross = _regression(block, metric, first)
    rest: tuple[Tensor, ...] = ()
    if len(sizes[0]) > 1:
        whole = cross.T @ torch.cholesky_solve(cross, torch.linalg.cholesky(inner))
        vectors = torch.linalg.eigh((whole + whole.T) / 2)[1]
        rest = (vectors[:, -max(size[1] for size in sizes) :].flip(1),)
        cross = cross @ rest[0]
    last, gain = torch.zeros_like(cross), 0.0
    for rows, uses in _uses(sizes, cross):
        uses = uses[uses > 0].repeat_interleave(positions)
        most = len(uses)
        target = uses[:, None] * cross[:most, rows]
        root = torch.linalg.cholesky(inner[:most, :most] * _shared(uses))
        last[:most, rows] = torch.cholesky_solve(target, root)
        gain += float((last[:most, rows] * target).sum())
    return gain, (first, last.T.reshape(-1, len(first), positions), *rest)


def _uses(sizes: Sequence[tuple[int, ...]], like: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Say for ranges of outputs how many sizes read each component there."""
    outs = [size[1] if len(size) > 1 else like.shape[1] for size in sizes]
    for start, stop in pairwise([0, *sorted(set(outs))]):
        ranks = [size[0] for size, out in zip(sizes, outs, strict=True) if out >= stop]
        count = max(size[0] for size in sizes)
        uses = [sum(rank > component for rank in ranks) for component in range(count)]
        yield slice(start, stop), like.new_tensor(uses)


def _shared(uses: Tensor) -> Tensor:
    """How many sizes have both of two components."""
    return torch.minimum(uses[:, None], uses[None, :])


def _regression(block: Tensor, metric: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """Moments of what a first layer (r, P) gives, (r*K, r*K), and with the outputs, (r*K, T)."""
    columns, positions = block.shape[1:]
    seen = (first @ metric.reshape(columns, -1)).reshape(-1, columns, positions)
    inner = torch.einsum("xpk,qp->xqk", seen, first).flatten(1)
    return (inner + inner.T) / 2, seen.flatten(1) @ block.flatten(1).T


def _first_layer(
    weighted: Tensor,
    metric: Tensor,
    factors: tuple[Tensor, ...],
    sizes: Sequence[tuple[int, ...]],
) -> Tensor:
    """Improve A for fixed B by preconditioned conjugate gradients, which never raise the error."""
    columns, positions = weighted.shape[1:]
    start, last, *rest = factors
    rank = len(start)
    for basis in rest:
        weighted = torch.einsum("tq,tpk->qpk", basis, weighted)
    overlap = start.new_zeros(rank * positions, rank * positions)
    target = torch.zeros_like(start)
    for rows, uses in _uses(sizes, last.transpose(0, 1)):
        flat = last[rows].flatten(1)
        overlap += flat.T @ flat * _shared(uses.repeat_interleave(positions))
        counted = last[rows] * uses[:, None]
        target += torch.einsum("trk,tpk->rp", counted, weighted[rows])
    pairs = overlap.reshape(rank, positions, rank, positions)
    wide = metric.reshape(columns, -1)

    def normal(matrix: Tensor) -> Tensor:
        seen = (matrix @ wide).reshape(rank, positions, columns, positions)
        return torch.einsum("qlrk,rksl->qs", pairs, seen)

    root = _preconditioner(pairs, metric.reshape(columns, positions, columns, positions))
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
