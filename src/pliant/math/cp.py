"""Many tensors at once as sums of outer products (CP): built from factors, and fitted."""

from __future__ import annotations

import string
from collections.abc import Sequence

import torch
from torch import Tensor

ROUNDS = 60  # of alternating least squares


def dense(factors: Sequence[Tensor]) -> Tensor:
    """Return sum_r a^1_r o ... o a^M_r for every row.

    Args:
        factors: one for each mode, (rows, rank, size).

    Returns:
        (rows, size of mode 1, ..., size of mode M).
    """
    modes = string.ascii_lowercase[: len(factors)]
    terms = ",".join(f"HR{mode}" for mode in modes)
    return torch.einsum(f"{terms}->H{modes}", *factors)


def fit(tensors: Tensor, rank: int) -> list[Tensor]:
    """Return factors whose sums of outer products are near to each of some tensors.

    Matrices get the best there are, by their singular values; tensors of more modes those of
    alternating least squares from their leading directions.

    Args:
        tensors: (rows, sizes ...), of two modes or more.
        rank: R.

    Returns:
        One factor for each mode, (rows, rank, size), of float64.
    """
    whole = tensors.double()
    if whole.dim() == 3:
        return _matrices(whole, rank)
    factors = [_leading(whole.movedim(mode, 1).flatten(2), rank) for mode in range(1, whole.dim())]
    for _ in range(ROUNDS):
        for mode in range(len(factors)):
            factors[mode] = _solved(whole, factors, mode)
    return _evened(factors)


def _matrices(whole: Tensor, rank: int) -> list[Tensor]:
    left, values, right = torch.linalg.svd(whole, full_matrices=False)
    count = min(rank, values.shape[1])
    root = values[:, :count, None].sqrt()
    found = [left.mT[:, :count] * root, right[:, :count] * root]
    return [_padded(part, rank) for part in found]


def _padded(part: Tensor, rank: int) -> Tensor:
    """Add terms of zeros, for more terms than there are directions."""
    more = part.new_zeros(len(part), rank - part.shape[1], part.shape[2])
    return torch.cat([part, more], 1)


def _leading(unfolded: Tensor, rank: int) -> Tensor:
    """Directions that count most in one mode, and random ones where there are no more."""
    left = torch.linalg.svd(unfolded, full_matrices=False)[0].mT[:, :rank]
    random = torch.Generator().manual_seed(0)
    shape = (len(left), rank - left.shape[1], left.shape[2])
    more = torch.randn(shape, generator=random, dtype=left.dtype).to(left.device)
    return torch.cat([left, more], 1)


def _solved(whole: Tensor, factors: Sequence[Tensor], mode: int) -> Tensor:
    """The factor of one mode that is best for those of the others."""
    others = [f for at, f in enumerate(factors) if at != mode]
    modes = string.ascii_lowercase[: len(others)]
    terms = ",".join(f"HR{m}" for m in modes)
    product = torch.einsum(f"{terms}->HR{modes}", *others).flatten(2)
    unfolded = whole.movedim(mode + 1, 1).flatten(2)
    gram = product @ product.mT
    right = product @ unfolded.mT
    return torch.linalg.pinv(gram, hermitian=True) @ right


def _evened(factors: Sequence[Tensor]) -> list[Tensor]:
    """Give all factors of a term the same length."""
    lengths = [f.norm(dim=2, keepdim=True) for f in factors]
    mean = torch.stack(lengths).prod(0).pow(1 / len(factors))
    return [f / n.clamp_min(1e-30) * mean for f, n in zip(factors, lengths, strict=True)]
