"""Multiply-accumulates of a layer or an operator, from what it read and gave in a forward pass."""

import math
from collections.abc import Callable
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

Formula = Callable[[Any, list[Tensor], list[Tensor]], int]


class Packed(Protocol):
    """A layer that keeps its weight in buffers, as packed integers: it counts itself."""

    @property
    def numbers(self) -> int:
        """How many parameters it stands for, besides those it owns as parameters."""

    def macs(self, inputs: list[Tensor], outputs: list[Tensor]) -> int:
        """Count the multiply-accumulates of one call."""


def is_packed(layer: Any) -> TypeGuard[Packed]:
    """Say whether a layer is packed, by its class: a module looks long for what it has not."""
    return hasattr(type(layer), "numbers") and hasattr(type(layer), "macs")


def _conv(layer: Any, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    return outputs[0].numel() * (layer.in_channels // layer.groups) * math.prod(layer.kernel_size)


def _conv_transpose(layer: Any, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    return inputs[0].numel() * (layer.out_channels // layer.groups) * math.prod(layer.kernel_size)


def _linear(layer: Any, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    return outputs[0].numel() * layer.in_features


def _bilinear(layer: Any, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    return outputs[0].numel() * layer.in1_features * (layer.in2_features + 1)


def attention(layer: Any, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """Four projections, then query times key and weights times value."""
    query, key, value = inputs[:3]
    batch = 1 if query.dim() == 2 else query.shape[0 if layer.batch_first else 1]
    projected = 2 * query.numel() + key.numel() + value.numel()
    seen = key.numel() // layer.kdim // batch + (layer.bias_k is not None) + layer.add_zero_attn
    return projected * layer.embed_dim + 2 * query.numel() * seen


def _recurrent(layer: Any, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    steps = inputs[0].numel() // layer.input_size  # time steps x batch, or batch for a cell
    return steps * sum(p.numel() for n, p in layer.named_parameters() if n.startswith("weight"))


def _own_count(layer: Any, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    return int(layer.macs(inputs, outputs))


def _zero(layer: Any, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    return 0


_FORMULAS: tuple[tuple[tuple[type[nn.Module], ...], Formula], ...] = (
    ((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _conv_transpose),
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d), _conv),
    ((nn.Linear,), _linear),
    ((nn.Bilinear,), _bilinear),
    ((nn.MultiheadAttention,), attention),
    ((nn.RNNBase, nn.RNNCellBase), _recurrent),
    (
        (
            *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
            *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
            *(nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.PReLU, nn.Embedding, nn.EmbeddingBag),
        ),
        _zero,
    ),
)


def formula_of(layer: nn.Module) -> Formula | None:
    """Return what counts the multiply-accumulates of a layer, None where that is not known."""
    if is_packed(layer):
        return _own_count if getattr(layer, "counted", True) else None
    return next((formula for kinds, formula in _FORMULAS if isinstance(layer, kinds)), None)


OWN = ("aten", "prims", "prim", "profiler")
"""The operators that PyTorch's own dispatcher brings: all products among them are known."""

_ATEN = torch.ops.aten


def _attention_of(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> int:
    """Queries (..., L, E) times keys (..., S, E), and weights times values (..., S, V)."""
    return query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _sum_of_products(total: Tensor, first: Tensor, second: Tensor, **options: Any) -> int:
    return first.numel() * second.shape[-1]


_PRODUCTS: dict[Any, Callable[..., int]] = {  # what the registry of flops lacks
    _ATEN.mv: lambda matrix, vector: matrix.numel(),
    _ATEN.addmv: lambda total, matrix, vector, **options: matrix.numel(),
    _ATEN.dot: lambda one, other: one.numel(),
    _ATEN.vdot: lambda one, other: one.numel(),
    _ATEN.addbmm: _sum_of_products,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _attention_of,
}


def products(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> int:
    """Count the multiply-accumulates of one call of an operator; 0 if it makes none."""
    packet = operator._overloadpacket
    if packet in _PRODUCTS:
        return _PRODUCTS[packet](*args, **kwargs)
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=output)) // 2
    return 0
