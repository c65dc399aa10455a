"""The t-product of third-order tensors, its singular value decomposition, norm and rank.

A tensor (n1, n2, n3) is a matrix (n1, n2) of tubes along the last axis. In the Fourier domain of
that axis the t-product is a product of frontal slices (Kilmer and Martin 2011). The slices of a
real tensor come in conjugate pairs, so only the first n3 // 2 + 1 are computed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pliant.errors import PliantError

TOLERANCE = 1e-9  # of a tubal rank, relative to the largest singular value


def to_slices(x: Tensor) -> Tensor:
    """Return the frontal slices in the Fourier domain: (n3 // 2 + 1, n1, n2), complex.

    Raises:
        PliantError: the tensor is not of third order.
    """
    if x.dim() != 3:
        raise PliantError(
            f"A tensor (n1, n2, n3) was expected, not one of shape {tuple(x.shape)}: reshape it."
        )
    return torch.fft.rfft(x, dim=2).movedim(2, 0)


def from_slices(slices: Tensor, n3: int) -> Tensor:
    """Undo `to_slices`, for tensors of n3 frontal slices."""
    return torch.fft.irfft(slices.movedim(0, 2), n=n3, dim=2)


def tprod(a: Tensor, b: Tensor) -> Tensor:
    """Multiply (n1, n2, n3) by (n2, n4, n3): matrices whose entries are circulant tubes."""
    return from_slices(to_slices(a) @ to_slices(b), a.shape[2])


def ttranspose(x: Tensor) -> Tensor:
    """Transpose every frontal slice and reverse the order of all but the first."""
    return from_slices(to_slices(x).mH, x.shape[2])


def tsvd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decompose x = u * s * v^T in the t-product, thin: u (n1, m, n3), s (m, m, n3), v (n2, m, n3).

    u and v are orthogonal, s has non-zero tubes on its diagonal only; m = min(n1, n2).
    """
    u, s, vh = torch.linalg.svd(to_slices(x), full_matrices=False)
    diagonal = torch.diag_embed(s).to(u.dtype)
    return tuple(from_slices(part, x.shape[2]) for part in (u, diagonal, vh.mH))  # type: ignore[return-value]


def singular_values(x: Tensor) -> Tensor:
    """Return the singular values of the computed slices, largest first: (n3 // 2 + 1, m)."""
    return torch.linalg.svdvals(to_slices(x))


def mean_over_slices(values: Tensor, n3: int) -> Tensor:
    """Sum rows of the computed slices over all n3 slices, each pair counted twice, over n3."""
    twice = torch.full((len(values), 1), 2.0, dtype=values.dtype, device=values.device)
    twice[0] = 1.0
    if n3 % 2 == 0:
        twice[-1] = 1.0
    return (twice * values).sum() / n3


def tnn(x: Tensor) -> float:
    """Return the tubal nuclear norm: the mean over slices of their nuclear norms."""
    return float(mean_over_slices(singular_values(x), x.shape[2]))


def tubal_rank(x: Tensor, tolerance: float = TOLERANCE) -> int:
    """Count the non-zero singular tubes, those above a share of the largest singular value."""
    sigma = singular_values(x)
    return int((sigma.amax(0) > tolerance * sigma.max()).sum()) if sigma.max() > 0 else 0


def spectral_map(x: Tensor, scale: Callable[[Tensor], Tensor]) -> Tensor:
    """Replace the singular values (n3 // 2 + 1, m) of all slices by `scale` of these; they fall.

    Goes through the small Gram matrices, several times faster than through singular vectors of
    both sides; what is below 1e-8 of the largest singular value counts as zero.
    """
    slices = to_slices(x)
    wide = x.shape[0] <= x.shape[1]
    squares, vectors = torch.linalg.eigh(slices @ slices.mH if wide else slices.mH @ slices)
    s, vectors = squares.flip(1).clamp_min(0).sqrt(), vectors.flip(2)
    tiny = torch.finfo(s.dtype).eps ** 0.5 * s.max()
    gain = torch.where(s > tiny, scale(s) / s.clamp_min(torch.finfo(s.dtype).tiny), 0)
    projector = (vectors * gain[:, None, :]) @ vectors.mH
    return from_slices(projector @ slices if wide else slices @ projector, x.shape[2])


def prox_spectral(x: Tensor, threshold: float, weights: Tensor | float = 1.0) -> Tensor:
    """Minimise threshold * (weighted TNN of y) + |y - x|^2 / 2 over y.

    The threshold is not divided by n3: the mean in the norm and Parseval's n3 cancel.

    Args:
        x: (n1, n2, n3).
        threshold: 0 or more.
        weights: of the singular values, (n3 // 2 + 1, m), not falling along a row.
    """
    return spectral_map(x, lambda s: (s - threshold * weights).clamp_min(0))
