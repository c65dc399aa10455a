"""Layers under weight norm, which says in other coordinates what a weight is.

It may be a parametrization or, as older networks have it, a hook that computes the weight before
every call. A norm that bounds a weight, such as the spectral one, is another matter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.weight_norm import WeightNorm

from pliant.nn import kinds


def normed(module: nn.Module) -> bool:
    """Say whether weight norm computes the weight of a linear layer or a convolution."""
    if kinds.kind_of(module) in (None, *kinds.TABLE):
        return False
    if not parametrize.is_parametrized(module):
        return bool(_hooks(module))
    lists: Any = module.parametrizations
    return list(lists) == ["weight"] and [type(p) for p in lists.weight] == [_WeightNorm]


def weight(module: Any) -> Tensor:
    """Return the weight that the next call will use."""
    hooks = _hooks(module)
    found: Tensor = next(iter(hooks.values())).compute_weight(module) if hooks else module.weight
    return found


def without_norm(module: nn.Module) -> None:
    """Take the hooks of weight norm away, of a layer that has a weight of its own by now."""
    for key in _hooks(module):
        del module._forward_pre_hooks[key]


def copyable(model: nn.Module) -> None:
    """Compute the weights of hooks anew without a gradient, with which nothing can be copied."""
    with torch.no_grad():
        for module in model.modules():
            for hook in _hooks(module).values():
                setattr(module, hook.name, hook.compute_weight(module))


def _hooks(module: nn.Module) -> dict[int, Any]:
    hooks = module._forward_pre_hooks
    return {key: hook for key, hook in hooks.items() if isinstance(hook, WeightNorm)}
