"""One layer becomes plain layers that compute the same."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from pliant.cost import LayerCost
from pliant.edits.edit import Replaced, layer_of
from pliant.errors import EditError
from pliant.nn import kinds
from pliant.nn.attention import SplitAttention

_REVERSED = (*kinds.TABLE, *kinds.TRANSPOSED)
_OF_TABLES = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
NORMS = (WeightNorm, SpectralNorm)
"""Hooks that compute a weight before every call: PyTorch's older way to parametrize."""


@dataclass(frozen=True)
class Plain:
    """Puts a Linear, a convolution or attention of plain linear layers in the place of a layer.

    Args:
        layer: name of a ``Conv1D`` of Transformers, an ``nn.MultiheadAttention``, a layer of a
            class that derives from a Linear, a convolution or a table, or one whose weight is
            computed by a parametrization or a hook of PyTorch's. That it computes the same is
            for ``pliant.surgery.plain`` to prove.
        values: weight and bias of a layer that computes them anew at every call; None takes those
            that it has. They are tensors, not part of the plan.

    Raises:
        EditError: the layer is of another kind.
    """

    layer: str
    values: tuple[Tensor, Tensor | None] | None = field(default=None, compare=False, repr=False)

    @property
    def form(self) -> str:
        """What the layer becomes."""
        return "plain"

    def apply(self, model: nn.Module, *, weights: bool = True) -> Replaced:
        """Put the plain layers in."""
        module: Any = layer_of(model, self.layer)
        if type(module) is nn.MultiheadAttention:
            new: Any = SplitAttention(module, weights=weights)
        elif (kind := kinds.kind_of(module)) and (
            kind not in _REVERSED or type(module) is not kind or computed(module)
        ):
            new = self._single(module, weights=weights)
        else:
            raise EditError(f"{self.layer} is a {type(module).__name__}, which has no plain form.")
        before = {id(p) for p in module.parameters()}
        after = {id(p) for p in new.parameters()}
        removed = tuple(p for p in module.parameters() if id(p) not in after)
        added = tuple(p for p in new.parameters() if id(p) not in before)
        kinds.put(model, module, new)
        for handle, hook in list(new._forward_pre_hooks.items()):
            if isinstance(hook, NORMS):  # it would compute a weight that is no longer there
                del new._forward_pre_hooks[handle]
        turned = isinstance(new, nn.Linear) and not isinstance(module, nn.Linear)
        turned = turned and len(removed) == len(added) == 1
        return Replaced(removed, added, cuts=(torch.t,) if turned else ())

    def predict(self, before: LayerCost) -> LayerCost:
        """Return the cost, which stays, but for what a weight was computed from."""
        if self.values is None:
            return before
        params = sum(tensor.numel() for tensor in self.values if tensor is not None)
        return replace(before, params=params, bytes=params * before.itemsize)

    def _single(self, module: Any, *, weights: bool) -> nn.Module:
        own = self.values if self.values is not None and weights else None
        bias = getattr(module, "bias", None) if own is None else own[1]
        new = _empty(module, bias=bias is not None)
        if own is not None:
            new.weight.data = own[0].detach().clone(memory_format=torch.contiguous_format)
            new.weight.requires_grad_(any(p.requires_grad for p in module.parameters()))
            if bias is not None:
                new.bias.data = bias.detach().clone()
            return new.train(module.training)
        if weights:
            rows = kinds.to_rows(module, module.weight)
            if rows is module.weight or kinds.kind_of(module) in _REVERSED:
                new.weight = module.weight
            else:
                new.weight.data = rows.detach().clone(memory_format=torch.contiguous_format)
                new.weight.requires_grad_(module.weight.requires_grad)
            if bias is not None:
                new.bias = bias
        return new.train(module.training)


def _empty(module: Any, *, bias: bool) -> Any:
    """The plain layer of a layer's geometry, without numbers."""
    kind, weight = kinds.kind_of(module), module.weight
    where = {"device": weight.device, "dtype": weight.dtype}
    if kind in kinds.TABLE:
        own = {name: getattr(module, name) for name in _OF_TABLES}
        return nn.utils.skip_init(kind, *weight.shape, **own, **where)
    if kind not in (*kinds.CONV, *kinds.TRANSPOSED):
        outs, ins = kinds.to_rows(module, weight).shape
        return nn.utils.skip_init(nn.Linear, ins, outs, bias, **where)
    names = ["kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"]
    names += ["output_padding"] * (kind in kinds.TRANSPOSED)
    return nn.utils.skip_init(
        kind,
        module.in_channels,
        module.out_channels,
        bias=bias,
        **{name: getattr(module, name) for name in names},
        **where,
    )


def computed(module: nn.Module) -> bool:
    """Say whether a layer's weight comes from a parametrization or a norm's hook, of PyTorch's."""
    if kinds.kind_of(module) is None or isinstance(module, kinds.TABLE):
        return False
    parts: Any = getattr(module, "parametrizations", {})
    ways = [way for part in parts.values() for way in part]
    if ways:
        return not any(type(way).__module__.startswith("pliant.") for way in ways)
    hooks = module._forward_pre_hooks.values()
    return any(isinstance(hook, NORMS) and hook.name == "weight" for hook in hooks)


def hidden(module: nn.Module) -> bool:
    """Say whether a layer may be a plain one in another class: it owns little beside its weight."""
    known = kinds.kind_of(module)
    if known is None or type(module) in (*kinds.LINEAR, *kinds.CONV, *_REVERSED):
        return False
    if type(module).__module__.startswith("pliant."):
        return False
    owned = dict(module.named_parameters())
    parts = [*module.children(), *module.buffers()]
    return (
        isinstance(getattr(module, "weight", None), nn.Parameter)
        and not parts
        and all(parameter.is_floating_point() for parameter in owned.values())
    )
