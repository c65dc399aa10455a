"""Which layers have a channel rank, and the plain modules that a factorization puts in."""

from __future__ import annotations

import fnmatch
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pliant.errors import EditError, MethodError
from pliant.math import forms

Factorizable = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear
_CONVS: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {
    1: nn.Conv1d,
    2: nn.Conv2d,
    3: nn.Conv3d,
}
_WEIGHTED = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.MultiheadAttention, nn.RNNBase)

_Obstacle = Callable[[nn.Module, str, nn.Module, dict[int, list[str]]], str | None]

_GEOMETRY = (
    *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"),
    *("groups", "padding_mode", "in_features", "out_features"),
)

NAMES = {
    "tucker2": ("reduce", "core", "expand"),
    "input": ("reduce", "core"),
    "output": ("core", "expand"),
    "spatial": ("first", "rest"),
    "svd": ("reduce", "expand"),
}
"""Names of the children that replace a layer, by form."""


def factorizable(
    model: nn.Module, *, only: Sequence[str] = (), exclude: Sequence[str] = ()
) -> tuple[dict[str, Factorizable], dict[str, str]]:
    """Split the weighted layers into those that can be factorized and the rest, with reasons.

    Args:
        model: any module.
        only: shell patterns of layer names to consider; none means all.
        exclude: shell patterns of layer names to leave alone.

    Returns:
        The factorizable layers by name, and for every other weighted layer why it is not.

    Raises:
        MethodError: a pattern matches no layer.
    """
    return _split(model, only, exclude, _obstacle)


def readable(
    model: nn.Module, *, only: Sequence[str] = (), exclude: Sequence[str] = ()
) -> tuple[dict[str, Factorizable], dict[str, str]]:
    """Split the weighted layers into those whose weight may be read and replaced, and the rest.

    Like `factorizable`, but grouped layers and layers of a single channel are among them.
    """
    return _split(model, only, exclude, _unreadable)


def _split(
    model: nn.Module, only: Sequence[str], exclude: Sequence[str], obstacle: _Obstacle
) -> tuple[dict[str, Factorizable], dict[str, str]]:
    layers: dict[str, Factorizable] = {}
    reasons: dict[str, str] = {}
    shared = _shared_weights(model)
    names = [name for name, module in model.named_modules() if isinstance(module, _WEIGHTED)]
    for pattern in (*only, *exclude):
        if not fnmatch.filter(names, pattern):
            raise MethodError(
                f"The layer pattern {pattern!r} matches none of the model's layers: "
                f"they are {', '.join(names[:8])}{' and more' if len(names) > 8 else ''}."
            )
    for name, module in model.named_modules():
        if not isinstance(module, _WEIGHTED):
            continue
        if only and not _matches(name, only):
            reasons[name] = "not selected"
        elif _matches(name, exclude):
            reasons[name] = "excluded by name"
        elif reason := obstacle(model, name, module, shared):
            reasons[name] = reason
        else:
            layers[name] = module  # type: ignore[assignment]
    return layers, reasons


def obstacle(model: nn.Module, name: str) -> str | None:
    """Say why the layer of this very name cannot be factorized, or None if it can.

    Raises:
        AttributeError: the model has no such module.
    """
    return _obstacle(model, name, model.get_submodule(name), _shared_weights(model))


def unreadable(model: nn.Module, name: str) -> str | None:
    """Say why the weight of the layer of this name cannot be read and replaced, or None if it can.

    Raises:
        AttributeError: the model has no such module.
    """
    return _unreadable(model, name, model.get_submodule(name), _shared_weights(model))


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _shared_weights(model: nn.Module) -> dict[int, list[str]]:
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    return {key: names for key, names in owners.items() if len(names) > 1}


def _obstacle(
    model: nn.Module, name: str, module: nn.Module, shared: dict[int, list[str]]
) -> str | None:
    """Say why a layer cannot be factorized, or None if it can."""
    if reason := _unreadable(model, name, module, shared):
        return reason
    if getattr(module, "groups", 1) != 1:
        return "a grouped convolution has no cross-channel rank"
    weight: Tensor = module.weight  # type: ignore[assignment]
    if min(weight.shape[:2]) < 2:
        return "a single channel has no rank to lower"
    return None


def _unreadable(
    model: nn.Module, name: str, module: nn.Module, shared: dict[int, list[str]]
) -> str | None:
    """Say why a layer cannot be replaced by one made from its weight, or None if it can."""
    if not name:
        return "the model is this single layer: wrap it in nn.Sequential"
    if parametrize.is_parametrized(module):
        return "its weight is parametrized: remove the parametrization first"
    if type(module) not in (*_CONVS.values(), nn.Linear):
        return f"{type(module).__name__} has no factorized form here"
    if _weight_norm_hooked(module):
        return "its weight is computed by a forward-pre hook: remove it first"
    if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention):
        return "MultiheadAttention reads this weight directly"
    weight: Tensor = module.weight  # type: ignore[assignment]
    if id(weight) in shared:
        others = [other for other in shared[id(weight)] if other != f"{name}.weight"]
        return f"its weight is tied to {others[0]}"
    return None


def _weight_norm_hooked(module: nn.Module) -> bool:
    return not isinstance(getattr(module, "weight", None), nn.Parameter) and isinstance(
        module, (nn.Linear, nn.modules.conv._ConvNd)
    )


def factorized(
    module: Factorizable,
    form: str,
    ranks: Sequence[int],
    kernels: Sequence[Tensor] | None = None,
) -> nn.Sequential:
    """Build the layers that replace ``module``: plain convolutions or linears in a row.

    Stride, padding, dilation and bias of the dense layer go where the form needs them. The
    bias parameter is the dense layer's own object, so an optimizer's state for it survives.

    Args:
        module: the dense layer.
        form: one of ``pliant.math.forms.FORMS``.
        ranks: the ranks of the form.
        kernels: the weights of the new layers; left uninitialized if None.
    """
    parts = list(_parts(module, form, ranks))
    new = nn.Sequential(OrderedDict(zip(NAMES[form], parts, strict=True)))
    if kernels is not None:
        with torch.no_grad():
            for part, kernel in zip(parts, kernels, strict=True):
                part.weight.copy_(kernel.reshape(part.weight.shape))
    for part in parts:
        part.weight.requires_grad_(module.weight.requires_grad)
        part.weight.data = in_layout_of(module.weight, part.weight.data)
    if module.bias is not None:
        parts[-1].bias = module.bias
    _answer_for(new, module)
    return new.train(module.training)


def _answer_for(new: nn.Sequential, dense: Factorizable) -> None:
    """Let a model ask the row what it asks its dense layer: its geometry, and its type and device.

    Models of transformers pad by ``conv.stride`` and cast inputs to ``projection.weight.dtype``.
    The row's ``weight`` is its first child's own, and no parameter of the row.
    """
    for name in _GEOMETRY:
        if hasattr(dense, name):
            setattr(new, name, getattr(dense, name))
    object.__setattr__(new, "weight", new[0].weight)


def dense_shape(row: nn.Sequential) -> tuple[int, ...]:
    """Return the shape of the kernel (T, S, *kernel) that a row of factors stands for."""
    geometry: Any = row
    if hasattr(row, "out_features"):
        return geometry.out_features, geometry.in_features
    return geometry.out_channels, geometry.in_channels, *geometry.kernel_size


def dense(row: nn.Sequential, form: str) -> Factorizable:
    """Build the dense layer that a row of factors stands for: the same outputs, in one layer.

    Args:
        row: as `factorized` has built it.
        form: its form.
    """
    kernels: list[Any] = [part.weight for part in row]
    bias: Any = row[-1].bias
    weight = forms.compose([kernel.detach() for kernel in kernels], form)
    where = {"device": weight.device, "dtype": weight.dtype}
    geometry: Any = row
    layer: Any
    if len(dense_shape(row)) == 2:
        out, source = dense_shape(row)
        layer = nn.utils.skip_init(nn.Linear, source, out, bias is not None, **where)
    else:
        names = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
        layer = nn.utils.skip_init(
            _CONVS[weight.dim() - 2],
            geometry.in_channels,
            geometry.out_channels,
            bias=bias is not None,
            **{name: getattr(geometry, name) for name in names},
            **where,
        )
    layer.weight.data = weight
    if bias is not None:
        layer.bias.data = bias.detach().clone()
    return layer.train(row.training)


def answer_anew(model: nn.Module, name: str) -> None:
    """Let the row of factors around a changed layer answer by a weight that it still has."""
    row = model.get_submodule(name.rpartition(".")[0])
    if isinstance(row, nn.Sequential) and vars(row).pop("weight", None) is not None:
        for weight in [part.weight for part in row if hasattr(part, "weight")][:1]:
            object.__setattr__(row, "weight", weight)


def in_layout_of(dense: Tensor, kernel: Tensor) -> Tensor:
    """Keep 2-d kernels in channels_last, where the dense one is: that is faster on many CPUs."""
    if dense.dim() == 4 and not dense.is_contiguous():
        return kernel.contiguous(memory_format=torch.channels_last)
    return kernel


def _parts(module: Factorizable, form: str, ranks: Sequence[int]) -> Iterator[Any]:
    if isinstance(module, nn.Linear):
        yield _linear(module, module.in_features, ranks[0], bias=False)
        yield _linear(module, ranks[0], module.out_features, bias=module.bias is not None)
        return
    source, target, dims = module.in_channels, module.out_channels, len(module.kernel_size)
    every = range(dims)
    if form == "svd":
        # A strided pointwise convolution may drop positions first: fewer to reduce.
        yield _conv(module, source, ranks[0], every, bias=False)
        yield _conv(module, ranks[0], target, (), bias=True)
    elif form == "tucker2":
        yield _conv(module, source, ranks[0], (), bias=False)
        yield _conv(module, ranks[0], ranks[1], every, bias=False)
        yield _conv(module, ranks[1], target, (), bias=True)
    elif form == "input":
        yield _conv(module, source, ranks[0], (), bias=False)
        yield _conv(module, ranks[0], target, every, bias=True)
    elif form == "output":
        yield _conv(module, source, ranks[0], every, bias=False)
        yield _conv(module, ranks[0], target, (), bias=True)
    elif form == "spatial":
        yield _conv(module, source, ranks[0], (0,), bias=False)
        yield _conv(module, ranks[0], target, range(1, dims), bias=True)
    else:
        raise EditError(f"Unknown form {form!r}: expected one of {', '.join(NAMES)}.")


def _linear(module: nn.Linear, source: int, target: int, *, bias: bool) -> nn.Module:
    return nn.utils.skip_init(
        nn.Linear, source, target, bias, device=module.weight.device, dtype=module.weight.dtype
    )


def _conv(module: Any, source: int, target: int, axes: Sequence[int], *, bias: bool) -> nn.Module:
    """A convolution with the dense layer's geometry on the given kernel axes, 1 on the others."""
    dims = len(module.kernel_size)

    def on(values: Sequence[int], other: int) -> tuple[int, ...]:
        return tuple(values[i] if i in axes else other for i in range(dims))

    padding = module.padding
    return nn.utils.skip_init(
        type(module),
        source,
        target,
        on(module.kernel_size, 1),
        stride=on(module.stride, 1),
        padding=(padding if axes else 0) if isinstance(padding, str) else on(padding, 0),
        dilation=on(module.dilation, 1),
        bias=bias and module.bias is not None,
        padding_mode=module.padding_mode if axes else "zeros",
        device=module.weight.device,
        dtype=module.weight.dtype,
    )


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place of the submodule called ``name``.

    The transformer blocks around it leave their fused inference path, which would read the
    weight of a layer that is no longer there; the plain path computes the same.
    """
    *path, child = name.split(".")
    setattr(model.get_submodule(".".join(path)), child, module)
    for depth in range(len(path) + 1):
        around = model.get_submodule(".".join(path[:depth]))
        if isinstance(around, nn.TransformerEncoderLayer):
            around.activation_relu_or_gelu = 0  # PyTorch's own sign for "cannot be fused"
        if isinstance(around, nn.TransformerEncoder):
            around.use_nested_tensor = False
