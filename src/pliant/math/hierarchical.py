"""Penalties that group the kernels of a convolution in two levels, and their flat relatives.

Of W (outputs, inputs, *kernel) the kernels W[o, i] are the inner groups. With ``feature`` the
outer groups are the input channels, with ``neuron`` the output filters.

Source: Mitsuno, Miyao and Kurita, "Hierarchical group sparse regularization for deep
convolutional neural networks", IJCNN 2020.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor

Kind = Literal[
    "group_lasso",
    "root_group_lasso",
    "squared_group_lasso",
    "exclusive",
    "root_exclusive",
    "squared_exclusive",
    "group_l12",
    "root_group_l12",
    "squared_group_l12",
]
Grouping = Literal["feature", "neuron"]

TINY = 1e-12  # below this a root is zero and has no slope: it would be infinite at zero


def hierarchical(weight: Tensor, kind: Kind, grouping: Grouping = "feature") -> Tensor:
    """Return the sum of a penalty over the outer groups of a kernel.

    Args:
        weight: (outputs, inputs, *kernel).
        kind: which penalty. ``group_lasso``, ``exclusive`` and ``group_l12`` know one level.
        grouping: whether input channels or output filters are the outer groups.

    >>> weight = torch.tensor([[[3.0, 4.0]], [[0.0, 0.0]]])
    >>> hierarchical(weight, "squared_group_lasso")
    tensor(25.)
    """
    kernels = weight.flatten(2) if weight.dim() > 2 else weight.unsqueeze(2)
    kernels = kernels.transpose(0, 1) if grouping == "feature" else kernels
    return PENALTIES[kind](kernels).sum()


def mixed(weights: Iterable[Tensor], kind: Kind, grouping: Grouping, mix: float) -> Tensor:
    """Return the penalty of some kernels mixed with their L1 norms: ``mix`` is its share."""
    total = torch.zeros(())
    for weight in weights:
        both = mix * hierarchical(weight, kind, grouping)
        total = total.to(weight.device) + both + (1 - mix) * weight.abs().sum()
    return total


def root(value: Tensor) -> Tensor:
    """Return the square root; next to zero it is zero, and so is its gradient."""
    return value.clamp_min(TINY).sqrt() * (value > TINY)


def _norms(kernels: Tensor) -> Tensor:
    return root(kernels.square().sum(2))


def _sums(kernels: Tensor) -> Tensor:
    return kernels.abs().sum(2)


PENALTIES: dict[str, Callable[[Tensor], Tensor]] = {
    "group_lasso": lambda k: root(k.square().sum((1, 2))),
    "root_group_lasso": lambda k: root(_norms(k).sum(1)),
    "squared_group_lasso": lambda k: _norms(k).sum(1).square(),
    "exclusive": lambda k: _sums(k).sum(1).square(),
    "root_exclusive": lambda k: root(_sums(k).square().sum(1)),
    "squared_exclusive": lambda k: _sums(k).square().sum(1).square(),
    "group_l12": lambda k: root(_sums(k).sum(1)),
    "root_group_l12": lambda k: root(root(_sums(k)).sum(1)),
    "squared_group_l12": lambda k: root(_sums(k)).sum(1).square(),
}
"""By name, from kernels (outer groups, inner groups, entries) to a number for each outer group."""
