"""Factors in order of importance: the first r of them are a good factorization of rank r."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from pliant.math.forms import decompose
from pliant.math.metric import WHOLE, Metric
from pliant.math.moments import dampen
from pliant.math.svd import norm_shares


def nested(
    weight: Tensor, form: str, ranks: Iterable[tuple[int, ...]], metric: Metric | None = None
) -> tuple[Tensor, ...]:
    """Factorize a kernel so that the cuts to several ranks are good factorizations, all of them.

    What is least is the damage summed over the sizes. The parts of output and svd are nested
    themselves, and so are those of all forms where inputs are white: there no size loses anything
    by sharing factors with the others. In the metric of correlated inputs they are not: a cut
    through the best factors of full rank loses several times as much.

    Args:
        weight: kernel (T, S, *kernel), or (T, S).
        form: of `pliant.math.forms`.
        ranks: at which the factors are to be cut, one per size; the largest is the one built.
        metric: what the layer reads and how much its outputs matter.
    """
    sizes, dense = list(ranks), weight.detach()
    top = tuple(map(max, zip(*sizes, strict=True)))
    if metric is None:
        return decompose(dense, form, top)
    if form in ("output", "svd") or metric.size > WHOLE:
        found = metric.decompose(dense, form, top)
        return found if len(found) > 2 else ordered(found, metric)
    return metric.decompose(dense, form, top, sizes=sizes)


def ordered(kernels: Sequence[Tensor], metric: Metric) -> tuple[Tensor, ...]:
    """Turn the components of two factors so that those worth most come first.

    The product is unchanged. With A (r, ...) reading patches of second moments C and B (T, r,
    ...), the singular values of G^(1/2) B (A C A^T)^(1/2) are what each component is worth, as if
    the positions of a patch were uncorrelated: the argument of PCA, to which cutting at random
    leads as well (nested dropout: Rippel, Gelbart and Adams, ICML 2014).
    """
    first, last = (kernel.detach().double() for kernel in kernels)
    reads, rank = first.flatten(1), len(first)
    seen = reads @ metric.seen.channels(metric.size // reads.shape[1]).double() @ reads.T
    root = torch.linalg.cholesky(dampen(seen, 1e-9))
    tall = metric.enter(last).transpose(0, 1).reshape(rank, -1).T  # a column per component
    turn, sigma, _ = torch.linalg.svd(root.T @ (tall.T @ tall) @ root)
    least = 1e-12 * sigma.max() + torch.finfo(sigma.dtype).tiny
    scale = sigma.clamp_min(least) ** 0.25  # the root of the product's singular values
    mixed_first = (turn * scale).T @ torch.linalg.solve_triangular(root, reads, upper=False)
    mixed_last = torch.einsum("tr...,rq->tq...", last, root @ (turn / scale))
    pair = norm_shares(mixed_first.reshape(first.shape), mixed_last)
    return tuple(new.to(old.dtype) for new, old in zip(pair, kernels, strict=True))
