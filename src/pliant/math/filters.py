"""Kernels filter by filter: their norms, and their alignment to one mean and one spread.

A filter is all the weights that make one output channel. In a Linear (O, I) and a convolution
(O, I/groups, ...) that is a row. In a transposed convolution (I, O/groups, ...) it is spread over
the first axis: those of its group.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SAFE = 1e-12  # added under the root of a norm, whose gradient at zero is then zero
RECTIFIED = 2 / (1 - 1 / math.pi)  # over the variance of a rectified standard normal


def by_filter(
    weight: Tensor, *, transposed: bool = False, groups: int = 1
) -> tuple[Tensor, tuple[int, ...]]:
    """Return a view of a kernel, and the axes over which each filter extends.

    Args:
        weight: (O, I/groups, ...), or (I, O/groups, ...) if transposed.
        transposed: whether the second axis is that of the outputs.
        groups: of the convolution.

    >>> by_filter(torch.zeros(6, 4, 3, 3))[1]
    (1, 2, 3)
    >>> by_filter(torch.zeros(6, 4, 3, 3), transposed=True, groups=2)[1]
    (1, 3, 4)
    """
    if not transposed:
        return weight, tuple(range(1, weight.dim()))
    view = weight.unflatten(0, (groups, -1))
    return view, (1, *range(3, view.dim()))


def filter_norms(weight: Tensor, *, transposed: bool = False, groups: int = 1) -> Tensor:
    """Return the Euclidean norm of every filter, at least in float32: a tensor (O,)."""
    view, axes = by_filter(weight, transposed=transposed, groups=groups)
    view = view.float() if view.dtype in (torch.float16, torch.bfloat16) else view
    return (view.square().sum(axes) + SAFE).sqrt().flatten()


def norm_gap(norms: Tensor) -> Tensor:
    """Return the sum over filters of (1 - norm)^2: their distance to the oblique manifold.

    Its gradient for one filter w is 2 (1 - 1/|w|) w: it shrinks long filters, lets short ones
    grow, and turns none.

    >>> float(norm_gap(filter_norms(torch.tensor([[3.0, 4.0], [0.6, 0.8]]))))
    16.0
    """
    return (norms - 1).square().sum()


def scale_filters(
    weight: Tensor, factors: Tensor, *, transposed: bool = False, groups: int = 1
) -> None:
    """Multiply every filter by its factor (O,), in place."""
    view, axes = by_filter(weight, transposed=transposed, groups=groups)
    view.mul_(factors.reshape([1 if axis in axes else n for axis, n in enumerate(view.shape)]))


def align(
    weight: Tensor,
    gain: Tensor,
    *,
    scale: float = RECTIFIED,
    eps: float = 1e-6,
    transposed: bool = False,
    groups: int = 1,
) -> Tensor:
    """Give every filter mean 0 and variance ``scale * gain^2 / n``, n being its weights.

    Each weight w becomes ``gain (w - mean) / sqrt(n / scale * variance + eps)``. The kernel's own
    scale and offset have no effect. Filters without a mean are blind to what their inputs have in
    common, so outputs have the *variance* of the inputs times ``scale * gain^2``: for a rectified
    normal input of variance 1 before the rectifier that is 1 if ``scale`` is ``RECTIFIED``.

    Args:
        weight: as ``by_filter`` takes it.
        gain: (O,), one number per filter.
        scale: ``RECTIFIED`` behind rectifiers, 1 behind nothing; 2 in the paper.
        eps: under the root; filters of equal weights become zero.
        transposed: see ``by_filter``.
        groups: see ``by_filter``.

    >>> row = align(torch.tensor([[1.0, 2.0, 6.0]]), torch.ones(1), scale=2.0)
    >>> round(float(row.sum()), 6), round(float(row.square().mean()), 4)  # 0 and 2/3
    (0.0, 0.6667)
    """
    view, axes = by_filter(weight, transposed=transposed, groups=groups)
    variance, mean = torch.var_mean(view, axes, correction=0, keepdim=True)
    n = math.prod(view.shape[axis] for axis in axes)
    factor = gain.reshape(mean.shape) / (n / scale * variance + eps).sqrt()
    return ((view - mean) * factor).reshape(weight.shape)
