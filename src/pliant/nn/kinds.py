"""Kinds of layers with one weight: how it lies as rows of output channels, and how it is applied.

Every kind says the same things in its own way: where the output channels of its weight are, what
it computes with another weight, and how often it multiplies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from pliant.nn.layers import replace

LINEAR = (nn.Linear,)
CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
TABLE = (nn.Embedding,)
_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook"),
)
_TRANSPOSED: tuple[Callable[..., Tensor], ...] = (
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
)


def kind_of(layer: Any) -> type[nn.Module] | None:
    """Return the class whose operation a layer does: its own or one it derives from.

    That of Transformers' ``Conv1D``, a linear layer whose weight is transposed, is recognised by
    where it comes from. None where the layer is of no kind with one weight.
    """
    known = getattr(layer, "kind", None)  # of what stands in the place of another layer
    classes = (known,) if isinstance(known, type) else type(layer).__mro__
    every = (*LINEAR, *CONV, *TRANSPOSED, *TABLE)
    return next((kind for kind in classes if kind in every or _flipped(kind)), None)


def _flipped(kind: type) -> bool:
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


# ---------------------------------------------------------------- weights as rows


def to_rows(layer: Any, weight: Tensor) -> Tensor:
    """Return a weight with its output channels first: (channels, ...).

    Args:
        layer: says its kind and its groups.
        weight: of the layer, or of its shape.
    """
    kind = kind_of(layer)
    if kind in TRANSPOSED:
        return turned(weight, layer.groups)
    return weight.t() if kind is not None and _flipped(kind) else weight


def from_rows(layer: Any, rows: Tensor) -> Tensor:
    """Return the weight whose rows are these: the inverse of `to_rows`."""
    kind = kind_of(layer)
    if kind in TRANSPOSED:
        return turned(rows, layer.groups)
    return rows.t() if kind is not None and _flipped(kind) else rows


def turned(weight: Tensor, groups: int) -> Tensor:
    """Make (in, out of a group, ...) of (out, in of a group, ...), and the other way round.

    Args:
        weight: the first axis has the channels of all groups, side by side.
        groups: of the convolution.
    """
    apart = weight.reshape(groups, -1, *weight.shape[1:])
    return apart.transpose(1, 2).flatten(0, 1)


@contextmanager
def in_rows(layer: Any, tensor: Tensor) -> Iterator[Tensor]:
    """Give a tensor with its output channels first; what is written into it is written back.

    Args:
        layer: any; where its tensors have their output channels first, it is the tensor itself.
        tensor: its weight, or one of that shape; any other tensor of a number for every channel.
    """
    rows = to_rows(layer, tensor) if tensor.dim() > 1 else tensor
    yield rows
    if rows is not tensor:
        tensor.copy_(from_rows(layer, rows))


def kernel(layer: Any, tensor: Tensor | None = None) -> Tensor:
    """Return a weight as a kernel (T, S, ...): output channels, input channels, positions.

    A table maps the numbers of its rows, each an input that is 1 or 0, to their columns. The
    result is a view: what is written into it is written into the weight.

    Args:
        layer: a convolution, transposed or not, a Linear or an Embedding.
        tensor: of the shape of its weight; the weight if None.
    """
    weight: Tensor = layer.weight if tensor is None else tensor
    return weight.transpose(0, 1) if isinstance(layer, (*TRANSPOSED, *TABLE)) else weight


# ---------------------------------------------------------------- what layers compute


def applied(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None, size: Any = None) -> Tensor:
    """Apply a layer's operation with another weight and bias.

    Args:
        layer: has the geometry, and is or has a kind.
        x: its input; numbers of rows for a table.
        weight: instead of its own, in its own shape.
        bias: instead of its own.
        size: of the output of a transposed convolution, where its forward was given one.
    """
    kind: Any = kind_of(layer)
    if kind in LINEAR:
        return F.linear(x, weight, bias)
    if kind in TABLE:
        return F.embedding(x, weight, layer.padding_idx)
    if kind in TRANSPOSED:
        return _transposed(kind, layer, x, weight, bias, size)
    if _flipped(kind):
        return F.linear(x, weight.t(), bias)
    found: Tensor = kind._conv_forward(layer, x, weight, bias)
    return found


def _transposed(
    kind: Any, layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None, size: Any
) -> Tensor:
    axes = len(layer.kernel_size)
    geometry = layer.stride, layer.padding, layer.kernel_size, axes, layer.dilation
    added = kind._output_padding(layer, x, size, *geometry)
    apply = _TRANSPOSED[axes - 1]
    return apply(x, weight, bias, layer.stride, layer.padding, added, layer.groups, layer.dilation)


def channels_last(layer: Any) -> bool:
    """Say whether the channels of what a layer gives are its last axis; else its second."""
    return kind_of(layer) not in (*CONV, *TRANSPOSED)


def macs(layer: Any, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """Count multiply-accumulates of one call."""
    kind, shape = kind_of(layer), tuple(layer.shape)
    if kind in TABLE:
        return 0
    if kind in TRANSPOSED:
        return inputs[0].numel() * math.prod(shape[1:])
    source = shape[0] if kind is not None and _flipped(kind) else math.prod(shape[1:])
    return outputs[0].numel() * source


def take_after(new: nn.Module, layer: nn.Module) -> None:
    """Let a layer answer as the one it replaces: by its geometry and all else that it says plainly.

    Models of Transformers pad by ``conv.stride``, and cast what a layer reads to the type of its
    weight. Hooks that somebody put on the layer go on being called.
    """
    for name, value in vars(layer).items():
        own = name.startswith("_") and name != "_reversed_padding_repeated_twice"
        if not own and not hasattr(new, name):
            setattr(new, name, value)
    for name in _HOOKS:
        vars(new)[name] = vars(layer)[name]  # the same dict: its handles still take hooks out


def put(model: nn.Module, layer: nn.Module, new: nn.Module) -> None:
    """Put a layer in the place of another, under all the names that a model has for it."""
    names = [n for n, part in model.named_modules(remove_duplicate=False) if part is layer]
    for name in names:
        replace(model, name, new)
