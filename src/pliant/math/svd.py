"""Spectra of kernel unfoldings through the small Gram matrix, never an SVD of the wide one.

A kernel is (T, S, *kernel): T output channels, S input channels; a Linear weight is (T, S).
The eigenvectors of a Gram matrix are not unique, so nothing here returns a function of single
eigenvectors to be stored as a weight: `spectral_map` depends on the matrix alone.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pliant.errors import PliantError

CHEAP = 1024
"""Largest small side of a matrix whose Gram matrix is formed and decomposed in float64."""

LARGE, SMALL = (
    512,
    5,
)  # a matrix of which few directions are found by iteration: rows, and rows each
OVERSAMPLED, ITERATIONS = 16, 6  # columns more than are asked for; products with the matrix

_BLOCK = 64  # rows below which a Gram matrix is one product


def unfold(weight: Tensor, mode: int) -> Tensor:
    """Lay a kernel out as a matrix whose rows are its output (0) or input (1) channels.

    Returns (T, S*prod(kernel)) for mode 0 and (S, T*prod(kernel)) for mode 1.
    """
    _check_mode(mode)
    return weight.transpose(0, mode).reshape(weight.shape[mode], -1)


def fold(matrix: Tensor, shape: Sequence[int], mode: int) -> Tensor:
    """Undo `unfold`: make a kernel of the given shape from its unfolding."""
    _check_mode(mode)
    swapped = list(shape)
    swapped[0], swapped[mode] = swapped[mode], swapped[0]
    return matrix.reshape(swapped).transpose(0, mode).contiguous()


def spectrum(weight: Tensor, mode: int) -> Tensor:
    """Return the singular values of an unfolding, largest first.

    Returns min(rows, columns) values: float64 for a float64 weight, float32 otherwise.
    """
    with torch.no_grad():
        values = torch.linalg.eigvalsh(gram(weight, mode))
    return _roots(values).flip(0).to(plain_dtype(weight.dtype))


def gram(weight: Tensor, mode: int) -> Tensor:
    """Return M M^T or M^T M of the unfolding M, whichever is smaller.

    float64 where the small side is at most `CHEAP` and the device has float64, else float32.
    """
    return small_gram(unfold(weight, mode))


def small_gram(matrix: Tensor, cheap: int = CHEAP) -> Tensor:
    """Return M M^T for a wide matrix and M^T M for a tall one, in float64 up to `cheap` rows."""
    matrix = matrix.detach().to(precise_dtype(matrix, cheap))
    return self_product(matrix if is_wide(matrix) else matrix.T)


def spectral_map(weight: Tensor, mode: int, scale: Callable[[Tensor], Tensor]) -> Tensor:
    """Replace the singular values of an unfolding by `scale` of them.

    `scale` gets the singular values in ascending order and returns as many. With Q, sigma from
    the Gram matrix the result is Q diag(scale(sigma) / sigma) Q^T M, with zero where sigma is
    numerically zero: a function of the matrix only, hence unique, and the same on every process
    up to rounding if equal sigma are mapped equally. Shape and dtype are those of `weight`.
    """
    matrix = unfold(weight.detach(), mode)
    sigma, vectors = eigen(matrix)
    mapped = with_spectrum(matrix, sigma, vectors, scale(sigma))
    return fold(mapped, weight.shape, mode).to(weight.dtype)


def with_spectrum(matrix: Tensor, sigma: Tensor, vectors: Tensor, values: Tensor) -> Tensor:
    """Return the matrix with `values` in the place of its singular values.

    Zero stays where sigma is numerically zero: the result is a function of the matrix alone.

    Args:
        matrix: any shape.
        sigma: its singular values, ascending, as `eigen` gives them.
        vectors: the singular vectors of its small side.
        values: what to put in the place of sigma.
    """
    least = floor(sigma)
    gain = torch.where(sigma > least, values / sigma.clamp_min(least), 0.0)
    # The small projector is built precisely; only the wide product runs in the matrix's precision.
    projector = ((vectors * gain) @ vectors.T).to(plain_dtype(matrix.dtype))
    matrix = matrix.to(projector.dtype)
    return projector @ matrix if is_wide(matrix) else matrix @ projector


def polar(matrix: Tensor) -> Tensor:
    """Return the nearest matrix with orthonormal columns, or rows if it is wide (Procrustes).

    Where the matrix is singular the missing directions are completed at will, unlike in
    `with_spectrum`, which leaves them zero.
    """
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vh


def soft_spectrum(matrix: Tensor, threshold: float) -> Tensor:
    """Lower all singular values by a threshold: the proximal point of the nuclear norm."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return (u * (s - threshold).clamp_min(0)) @ vh


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the best rank-r factors, left (T, r) and right (r, S), sharing the norm equally.

    Every component's singular value is split as its square root on either side, so left and
    right have equal Frobenius norms and the components come in order of importance.

    Raises:
        PliantError: the rank is not between 1 and min(T, S).
    """
    if not 1 <= rank <= min(matrix.shape):
        raise PliantError(
            f"A rank between 1 and {min(matrix.shape)} was expected for a matrix of shape "
            f"{tuple(matrix.shape)}, not {rank}: choose one in that range."
        )
    wide = is_wide(matrix)
    _, vectors = eigen(matrix)
    top = vectors[:, -rank:].flip(1)
    precise = matrix.detach().to(top.dtype)
    other = top.T @ precise if wide else (precise @ top).T
    size = other.norm(dim=1).clamp_min(_tiny(other))
    near, far = top * size.sqrt(), other / size.sqrt()[:, None]
    left, right = (near, far) if wide else (far.T, near.T)
    return left.to(matrix.dtype), right.to(matrix.dtype)


def balance(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Rewrite a product left @ right so that both factors carry the root of each singular value.

    The product is unchanged; the shapes (m, r) and (r, n) are too, provided r <= min(m, n).
    """
    left_basis, left_core = torch.linalg.qr(left)
    right_basis, right_core = torch.linalg.qr(right.T)
    u, sigma, vt = torch.linalg.svd(left_core @ right_core.T)
    root = sigma.sqrt()
    return left_basis @ (u * root), (root[:, None] * vt) @ right_basis.T


def eigen(matrix: Tensor, cheap: int = CHEAP) -> tuple[Tensor, Tensor]:
    """Return the singular values, ascending, and the singular vectors of the small side."""
    values, vectors = torch.linalg.eigh(small_gram(matrix, cheap))
    return _roots(values), vectors


def leading(matrix: Tensor, rank: int, cheap: int = CHEAP) -> Tensor:
    """Return `rank` orthonormal columns spanning the strongest left singular directions."""
    if is_wide(matrix) or rank > matrix.shape[1]:
        precise = matrix.detach().to(precise_dtype(matrix, cheap))
        return torch.linalg.eigh(self_product(precise))[1][:, -rank:].flip(1)
    _, vectors = eigen(matrix, cheap)
    return torch.linalg.qr(matrix.to(vectors.dtype) @ vectors[:, -rank:].flip(1))[0]


def strongest(matrix: Tensor, rank: int) -> Tensor:
    """Return the leading eigenvectors of a positive semi-definite matrix, strongest first.

    Few of a large one are found by subspace iteration from a fixed random start (Halko,
    Martinsson and Tropp, SIAM Review 2011), in about half of the time: what they hold differs from
    the best by about a thousandth of what is left out.

    Args:
        matrix: (T, T).
        rank: how many.

    Returns:
        (T, rank), orthonormal columns.
    """
    width = rank + rank // 2 + OVERSAMPLED
    if len(matrix) < LARGE or SMALL * rank > len(matrix):
        return torch.linalg.eigh(matrix)[1][:, -rank:].flip(1)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(len(matrix), width, generator=generator, dtype=torch.float64)
    basis = start.to(matrix)
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(matrix @ basis)[0]
    turn = torch.linalg.eigh(basis.T @ matrix @ basis)[1]
    return basis @ turn[:, -rank:].flip(1)


def floor(sigma: Tensor) -> Tensor:
    """Return the singular value below which nothing but rounding is left.

    Squaring a matrix loses half the digits: about 1e-7 of the largest value survives in a
    float64 Gram matrix (the rounding of float32 weights lies there too), 1e-3 in a float32 one.
    """
    relative = 1e-6 if sigma.dtype == torch.float64 else 1e-3
    return (sigma.max() * relative).clamp_min(_tiny(sigma))


def is_wide(matrix: Tensor) -> bool:
    """Say whether the rows are the small side of a matrix."""
    return matrix.shape[0] <= matrix.shape[1]


def plain_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float64 for float64 and float32 for everything shorter."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def precise_dtype(matrix: Tensor, cheap: int = CHEAP) -> torch.dtype:
    """Return the precision in which the Gram matrix of this matrix is worth computing."""
    precise = min(matrix.shape) <= cheap and matrix.device.type != "mps"
    return torch.float64 if precise else plain_dtype(matrix.dtype)


def norm_shares(*factors: Tensor) -> list[Tensor]:
    """Scale factors, whose product is left as it is, so that all have the same Frobenius norm."""
    norms = [float(factor.norm()) for factor in factors]
    if min(norms) == 0.0:
        return list(factors)
    share = math.exp(sum(math.log(norm) for norm in norms) / len(norms))
    return [factor * (share / norm) for factor, norm in zip(factors, norms, strict=True)]


def self_product(matrix: Tensor) -> Tensor:
    """M M^T; large ones by blocks, of which the mirrored ones are not computed twice."""
    half = len(matrix) // 2
    if half < _BLOCK:
        return matrix @ matrix.T
    upper, lower = matrix[:half], matrix[half:]
    cross = upper @ lower.T
    top = torch.cat([self_product(upper), cross], 1)
    return torch.cat([top, torch.cat([cross.T, self_product(lower)], 1)])


def _roots(eigenvalues: Tensor) -> Tensor:
    return eigenvalues.clamp_min(0).sqrt()


def _tiny(sigma: Tensor) -> float:
    return torch.finfo(sigma.dtype).tiny


def _check_mode(mode: int) -> None:
    if mode not in (0, 1):
        raise PliantError(
            f"A mode 0 (output channels) or 1 (input channels) was expected, not {mode}: "
            "pass one of the two."
        )
