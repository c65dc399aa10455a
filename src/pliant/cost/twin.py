"""Copies a network, whatever its layers left in themselves when they last ran."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from pliant.cost.call import tensors

N = TypeVar("N", bound=nn.Module)


def twin(model: N, known: Mapping[int, Any] | None = None) -> N:
    """Copy a network; what its layers computed and kept is copied without how it came about.

    `copy.deepcopy` refuses tensors that a gradient could flow through, such as the weight that
    `torch.nn.utils.weight_norm` writes into its layer at every call.

    Args:
        model: stays as it is.
        known: what stands for objects of the network in the copy, by their `id`.
    """
    kept = (tensor for module in model.modules() for tensor in tensors(vars(module)))
    memo = {id(each): each.detach().clone() for each in kept if not each.is_leaf}
    return copy.deepcopy(model, {**memo, **(known or {})})
