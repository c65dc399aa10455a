"""Factors in order of importance: the first r of them are a good factorization of rank r."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from pliant.errors import EditError
from pliant.math.forms import compose, decompose
from pliant.math.metric import Metric
from pliant.math.moments import channel_moments, dampen
from pliant.math.svd import norm_shares


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
    return _first(kernels, ranks)


def nested(
    weight: Tensor, form: str, ranks: Iterable[tuple[int, ...]], metric: Metric | None = None
) -> tuple[Tensor, ...]:
    """Factorize a kernel so that the cut to each of several ranks is a good factorization.

    The factors are built from the smallest rank up: the best of that rank, then the best of what
    it leaves, and so on. The smallest size loses least of all; output and svd lose nothing
    anywhere, since there the components of a factorization are nested themselves. With the
    metric of inputs that are correlated the other forms are not: a cut through their best
    factors of full rank loses several times as much. The parts of Tucker-2 share no core at
    first: what joins them is zero, and for training to find.

    Args:
        weight: kernel (T, S, *kernel), or (T, S).
        form: of `pliant.math.forms`.
        ranks: at which the factors are to be cut; the largest is the one that is built.
        metric: what the layer reads and how much its outputs matter.
    """
    rising = sorted(set(ranks))
    if form in ("output", "svd"):
        return _factors(weight, form, rising[-1], metric)
    parts, rest = [], weight.detach()
    for less, more in pairwise([(0,) * len(rising[0]), *rising]):
        grown = tuple(high - low for high, low in zip(more, less, strict=True))
        # A side that does not grow lends a component, and takes it back with its core.
        found = _factors(rest, form, tuple(max(1, rank) for rank in grown), metric)
        parts.append(_first(found, grown))
        rest = rest - compose(found, form) if all(grown) else rest
    first, *cores, last = zip(*parts, strict=True)
    return torch.cat(first), *map(_diagonal, cores), torch.cat(last, 1)


def _first(kernels: Sequence[Tensor], ranks: Sequence[int]) -> tuple[Tensor, ...]:
    """Take the first components of each kernel, also none."""
    ends = [kernels[0].shape[1], *ranks, len(kernels[-1])]
    return tuple(
        kernel[:rows, :columns]
        for kernel, (columns, rows) in zip(kernels, pairwise(ends), strict=True)
    )


def _diagonal(cores: Sequence[Tensor]) -> Tensor:
    """Put cores (q, r, ...) on the diagonal of one that is zero elsewhere."""
    sizes = [sum(core.shape[axis] for core in cores) for axis in (0, 1)]
    joined = cores[0].new_zeros(*sizes, *cores[0].shape[2:])
    row = column = 0
    for core in cores:
        joined[row : row + len(core), column : column + core.shape[1]] = core
        row, column = row + len(core), column + core.shape[1]
    return joined


def _factors(
    weight: Tensor, form: str, ranks: tuple[int, ...], metric: Metric | None
) -> tuple[Tensor, ...]:
    dense = weight.detach()
    if metric is None:
        return decompose(dense, form, ranks)
    found = metric.decompose(dense, form, ranks)
    return found if len(found) > 2 else ordered(found, metric)


def ordered(kernels: Sequence[Tensor], metric: Metric) -> tuple[Tensor, ...]:
    """Turn the components of two factors so that those worth most come first.

    The product is unchanged. With A (r, ...) reading patches of second moments C and B (T, r,
    ...), the singular values of G^(1/2) B (A C A^T)^(1/2) are what each component is worth, as if
    the positions of a patch were uncorrelated: the argument of PCA, to which cutting at random
    leads as well (nested dropout: Rippel, Gelbart and Adams, ICML 2014).
    """
    first, last = (kernel.detach().double() for kernel in kernels)
    reads, rank = first.flatten(1), len(first)
    positions = len(metric.inputs) // reads.shape[1]
    seen = reads @ channel_moments(metric.inputs.double(), positions) @ reads.T
    root = torch.linalg.cholesky(dampen(seen, 1e-9))
    tall = metric.enter(last).transpose(0, 1).reshape(rank, -1).T  # a column per component
    turn, sigma, _ = torch.linalg.svd(root.T @ (tall.T @ tall) @ root)
    least = 1e-12 * sigma.max() + torch.finfo(sigma.dtype).tiny
    scale = sigma.clamp_min(least) ** 0.25  # the root of the product's singular values
    mixed_first = (turn * scale).T @ torch.linalg.solve_triangular(root, reads, upper=False)
    mixed_last = torch.einsum("tr...,rq->tq...", last, root @ (turn / scale))
    pair = norm_shares(mixed_first.reshape(first.shape), mixed_last)
    return tuple(new.to(old.dtype) for new, old in zip(pair, kernels, strict=True))
