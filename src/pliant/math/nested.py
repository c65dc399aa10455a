"""Factors in order of importance: the first r of them are a good factorization of rank r."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from pliant.errors import EditError
from pliant.math.metric import Metric
from pliant.math.moments import channel_moments, dampen
from pliant.math.svd import norm_shares, plain_dtype


def cut(kernels: Sequence[Tensor], ranks: Sequence[int]) -> tuple[Tensor, ...]:
    """Take the first components of each kernel: views, through which gradients flow.

    Args:
        kernels: in the order of their layers, (r, S, ...) to (T, r, ...).
        ranks: how many components stay between each kernel and the next.

    Raises:
        EditError: ranks do not fit the kernels.

    >>> first, last = cut((torch.zeros(4, 3), torch.zeros(5, 4)), (2,))
    >>> tuple(first.shape), tuple(last.shape)
    ((2, 3), (5, 2))
    """
    inner = [len(kernel) for kernel in kernels[:-1]]
    fit = len(ranks) == len(inner) and all(
        1 <= rank <= most for rank, most in zip(ranks, inner, strict=True)
    )
    if not fit:
        raise EditError(
            f"Ranks from 1 to {tuple(inner)} were expected, not {tuple(ranks)}: cut to fewer "
            "components than there are."
        )
    ends = [kernels[0].shape[1], *ranks, len(kernels[-1])]
    return tuple(
        kernel[:rows, :columns]
        for kernel, (columns, rows) in zip(kernels, pairwise(ends), strict=True)
    )


def order(kernels: Sequence[Tensor], metric: Metric | None) -> tuple[Tensor, ...]:
    """Turn the components of two factors so that cutting to any rank loses least output.

    The product is unchanged. With A (r, ...) reading patches of second moments C and B (T, r,
    ...), the singular values of G^(1/2) B (A C A^T)^(1/2) are what each component is worth (the
    argument of PCA, to which nested dropout also leads: Rippel et al., ICML 2014, theorem 2).
    Three factors come from `pliant.math.forms.decompose` in their order, and stay as they are.
    """
    if len(kernels) != 2:
        return tuple(kernels)
    dtype = plain_dtype(kernels[0].dtype)
    first, last = (kernel.detach().to(dtype).double() for kernel in kernels)
    reads, says = first.flatten(1), last if metric is None else metric.enter(last)
    seen = reads @ reads.T
    if metric is not None:
        positions = len(metric.inputs) // reads.shape[1]
        seen = reads @ channel_moments(metric.inputs.double(), positions) @ reads.T
    root = torch.linalg.cholesky(dampen(seen, 1e-9))
    rank = len(first)
    tall = says.transpose(0, 1).reshape(rank, -1).T  # a column per component
    turn, sigma, _ = torch.linalg.svd(root.T @ (tall.T @ tall) @ root)
    least = 1e-12 * sigma.max() + torch.finfo(sigma.dtype).tiny
    scale = sigma.clamp_min(least) ** 0.25  # the root of the product's singular values
    mixed_first = (turn * scale).T @ torch.linalg.solve_triangular(root, reads, upper=False)
    mixed_last = torch.einsum("tr...,rq->tq...", last, root @ (turn / scale))
    pair = norm_shares(mixed_first.reshape(first.shape), mixed_last)
    return tuple(new.to(old.dtype) for new, old in zip(pair, kernels, strict=True))
