"""The plain modules that a factorization puts in: two or three layers in a row."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.errors import EditError
from pliant.math import forms
from pliant.nn.kinds import TRANSPOSED, kernel, kind_of
from pliant.nn.layers import Factorizable, in_layout_of

_CONVS: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {
    1: nn.Conv1d,
    2: nn.Conv2d,
    3: nn.Conv3d,
}

_GEOMETRY = (
    *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"),
    *("groups", "padding_mode", "in_features", "out_features", "output_padding"),
    *("num_embeddings", "embedding_dim", "padding_idx"),
)

NAMES = {
    "tucker2": ("reduce", "core", "expand"),
    "input": ("reduce", "core"),
    "output": ("core", "expand"),
    "spatial": ("first", "rest"),
    "svd": ("reduce", "expand"),
}
"""Names of the children that replace a layer, by form."""


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
    row = TransposedRow if isinstance(module, TRANSPOSED) else nn.Sequential
    new = row(OrderedDict(zip(NAMES[form], parts, strict=True)))
    if kernels is not None:
        with torch.no_grad():
            for part, values in zip(parts, kernels, strict=True):
                place = kernel(part)
                place.copy_(values.reshape(place.shape))
            padding = getattr(module, "padding_idx", None)
            if padding is not None and not module.weight[padding].any():
                parts[0].weight[padding] = 0  # exactly, as it was
    for part in parts:
        part.weight.requires_grad_(module.weight.requires_grad)
        part.weight.data = in_layout_of(module.weight, part.weight.data)
    if getattr(module, "bias", None) is not None:
        parts[-1].bias = module.bias
    answer_for(new, module, parts[0].weight)
    return new.train(module.training)


def tied(head: nn.Linear, table: nn.Sequential) -> nn.Sequential:
    """Build the layers that replace a Linear whose weight was tied to that of a table.

    They hold the parameters of the factorized table and none of their own but the bias, so that
    both stay tied.

    Args:
        head: the dense layer.
        table: what took the place of the table, in the form ``svd``.
    """
    rows, columns = table
    expand: Any = nn.utils.skip_init(
        nn.Linear, head.out_features, 1, head.bias is not None, device="meta"
    )
    expand.in_features, expand.out_features = columns.in_features, head.out_features
    expand.weight, expand.bias = rows.weight, head.bias
    new = nn.Sequential(OrderedDict(reduce=Turned(columns), expand=expand))
    answer_for(new, head, expand.weight)
    return new.train(head.training)


class Turned(nn.Module):
    """Multiplies by the transposed weight of a Linear, which it shares.

    Args:
        source: has the weight (S, T).
    """

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.in_features, self.out_features = source.out_features, source.in_features
        self.weight = source.weight

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., S) to (..., T)."""
        return F.linear(input, self.weight.t())

    numbers = 0
    """How many parameters it stands for besides those that it has."""

    def macs(self, inputs: list[Tensor], outputs: list[Tensor]) -> int:
        """Count the multiply-accumulates of one call."""
        return outputs[0].numel() * self.in_features


class TransposedRow(nn.Sequential):
    """A row of factors of a transposed convolution, which may be told the size of its output."""

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Map (N, S, ...) to (N, T, ...), of the size asked for."""
        for part in self:
            taken: Any = part  # it may have been factorized, rounded or coded itself
            told = isinstance(taken, TransposedRow) or kind_of(taken) in TRANSPOSED
            if output_size is None or not told:
                input = part(input)
                continue
            axes = len(taken.kernel_size)
            geometry = zip(
                list(output_size)[-axes:],
                input.shape[-axes:],
                taken.kernel_size,
                taken.stride,
                strict=True,
            )
            input = part(input, [has if (k, s) == (1, 1) else size for size, has, k, s in geometry])
        return input


def answer_for(row: nn.Sequential, dense: nn.Module, weight: Tensor | None = None) -> None:
    """Let a model ask a row what it asks its dense layer: its geometry, and its type and device.

    Models of transformers pad by ``conv.stride`` and cast inputs to ``projection.weight.dtype``.

    Args:
        row: stands in the place of the layer.
        dense: the layer.
        weight: what the row answers by, the layer's own if None; it is no parameter of the row.
    """
    for name in _GEOMETRY:
        if hasattr(dense, name):
            setattr(row, name, getattr(dense, name))
    answer = getattr(dense, "weight", None) if weight is None else weight
    if isinstance(answer, Tensor):
        object.__setattr__(row, "weight", answer)


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
    """Give the row of factors around a replaced layer a ``weight`` attribute that still exists.

    The row answers ``.weight`` with the weight of its first layer. Once that layer is replaced, the
    attribute would point to a tensor that the network no longer uses.
    """
    row = model.get_submodule(name.rpartition(".")[0])
    if isinstance(row, nn.Sequential) and vars(row).pop("weight", None) is not None:
        for weight in [part.weight for part in row if hasattr(part, "weight")][:1]:
            object.__setattr__(row, "weight", weight)


def _parts(module: Factorizable, form: str, ranks: Sequence[int]) -> Iterator[Any]:
    if isinstance(module, nn.Linear):
        yield _linear(module, module.in_features, ranks[0], bias=False)
        yield _linear(module, ranks[0], module.out_features, bias=module.bias is not None)
        return
    if isinstance(module, nn.Embedding):
        where: Any = {"device": module.weight.device, "dtype": module.weight.dtype}
        rows = nn.utils.skip_init(nn.Embedding, module.num_embeddings, ranks[0], **where)
        rows.padding_idx = module.padding_idx
        yield rows
        yield _linear(module, ranks[0], module.embedding_dim, bias=False)
        return
    source, target, dims = module.in_channels, module.out_channels, len(module.kernel_size)
    every = range(dims)
    if form == "svd":
        # A strided pointwise convolution may drop positions first, a transposed one add them last.
        first, last = ((), every) if isinstance(module, TRANSPOSED) else (every, ())
        yield _conv(module, source, ranks[0], first, bias=False)
        yield _conv(module, ranks[0], target, last, bias=True)
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


def _linear(module: nn.Linear | nn.Embedding, source: int, target: int, *, bias: bool) -> nn.Module:
    return nn.utils.skip_init(
        nn.Linear, source, target, bias, device=module.weight.device, dtype=module.weight.dtype
    )


def _conv(module: Any, source: int, target: int, axes: Sequence[int], *, bias: bool) -> nn.Module:
    """A convolution with the dense layer's geometry on the given kernel axes, 1 on the others."""
    dims = len(module.kernel_size)

    def on(values: Sequence[int], other: int) -> tuple[int, ...]:
        return tuple(values[i] if i in axes else other for i in range(dims))

    padding = module.padding
    turned = isinstance(module, TRANSPOSED) and bool(axes)
    added = {"output_padding": on(module.output_padding, 0)} if turned else {}
    return nn.utils.skip_init(
        type(module) if turned else _CONVS[dims],
        source,
        target,
        on(module.kernel_size, 1),
        stride=on(module.stride, 1),
        padding=(padding if axes else 0) if isinstance(padding, str) else on(padding, 0),
        dilation=on(module.dilation, 1),
        bias=bias and module.bias is not None,
        padding_mode=module.padding_mode if axes else "zeros",
        **added,
        device=module.weight.device,
        dtype=module.weight.dtype,
    )
