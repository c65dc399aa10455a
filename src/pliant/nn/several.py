"""Layers with several weights stored as packed integers: recurrent ones, attention, experts.

They compute as the layers that they derive from do, with weights unpacked at every call. What
they read stays in floating point: their weights meet it deep inside kernels of PyTorch, or in
code that is not known.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from pliant.cost.macs import attention
from pliant.math.quantize import Grouping, best_scales, grouping
from pliant.nn.kinds import kind_of, take_after
from pliant.nn.packed import Bits, Packing, Values
from pliant.nn.quantized import Quantized

TABLE = 2**24  # numbers of the largest table that is unpacked at every call
OUT = "out_proj"  # of attention: a linear layer of its own, which is read and never called


def weights_of(layer: nn.Module) -> dict[str, Tensor]:
    """Return the matrices of a layer with several, by name; empty if it is of no such kind.

    A layer of any other class has those that lie on top of one another in parameters of three
    axes, one for each expert, for example: (experts, rows, columns). A table of a class that looks
    its rows up in a way of its own, as those of positions do, has its one matrix, unless that is
    too large to be unpacked at every call.
    """
    if type(layer) not in KINDS:
        return _fused(layer)
    found: dict[str, Tensor] = {n: p for n, p in layer.named_parameters() if p.dim() == 2}
    return found


def _fused(layer: nn.Module) -> dict[str, Tensor]:
    own = type(layer).__module__.startswith(("torch.", "pliant."))
    if own or isinstance(layer, Several) or parametrize.is_parametrized(layer):
        return {}
    tensors = {name: p for name, p in layer._parameters.items() if p is not None}
    held: dict[str, Tensor] = {name: p for name, p in tensors.items() if p.is_floating_point()}
    if looks_up(layer):
        return held if list(held) == ["weight"] and held["weight"].numel() <= TABLE else {}
    if kind_of(layer):
        return {}
    return {n: p for n, p in held.items() if p.dim() == 3 and min(p.shape) > 1}


def looks_up(layer: nn.Module) -> bool:
    """Say whether a layer is a table with a forward of its own, such as shifted positions."""
    return kind_of(layer) is nn.Embedding and type(layer).forward is not nn.Embedding.forward


def _rows(weight: Tensor) -> Tensor:
    """The rows of a matrix, or of all that lie on top of one another."""
    return weight.flatten(0, 1) if weight.dim() == 3 else weight


def bits_of(channels: int, bits: int, groups: int, *, indexed: bool) -> Bits:
    """Say how one of the matrices is written.

    Args:
        channels: rows of the matrix.
        bits: of a weight.
        groups: scales; 0 is one for every channel, and there are no more than channels.
        indexed: whether the group of each channel is stored, where there are several of several.
    """
    scales = min(groups or channels, channels)
    return Bits(bits, scales, indexed and 1 < scales < channels)


class Several:
    """What these layers share: buffers in the place of weights.

    A weight is asked for by its old name and comes unpacked.
    """

    packings: dict[str, Packing]
    like: Tensor

    def __getattr__(self, name: str) -> Any:
        """Unpack a weight; anything else is found as in any module."""
        packing = self.__dict__.get("packings", {}).get(name)
        if packing is None:
            return nn.Module.__getattr__(self, name)  # type: ignore[arg-type]
        return self.weight_of(name, packing)

    def weight_of(self, name: str, packing: Packing) -> Tensor:
        """Return one weight in its own shape."""
        return self.unpacked(packing)

    def unpacked(self, packing: Packing) -> Tensor:
        """Return one weight."""
        return packing.rows(self).to(self.like.dtype)  # type: ignore[arg-type]

    @property
    def numbers(self) -> int:
        """How many parameters the packed weights stand for."""
        return sum(packing.numbers for packing in self.packings.values())

    def macs(self, inputs: list[Tensor], outputs: list[Tensor]) -> int:
        """Count multiply-accumulates of one call, as for the layer it replaces."""
        if isinstance(self, nn.MultiheadAttention):
            return attention(self, inputs, outputs)
        steps = inputs[0].numel() // self.input_size
        return int(steps) * self.numbers


class _Recurrent(Several):
    """PyTorch's recurrent layers ask for a list of weights."""

    @property
    def _flat_weights(self) -> list[Tensor]:
        names: Any = self._flat_weights_names
        return [getattr(self, name) for name in names]

    def _update_flat_weights(self) -> None:
        """There is no list that could be stale."""

    def flatten_parameters(self) -> None:
        """Weights are unpacked at every call: there is no memory to arrange."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        return nn.Module._apply(self, fn, recurse)  # type: ignore[arg-type]


class QuantizedLSTM(_Recurrent, nn.LSTM):  # type: ignore[misc]
    """An LSTM with packed weights."""


class QuantizedGRU(_Recurrent, nn.GRU):  # type: ignore[misc]
    """A GRU with packed weights."""


class QuantizedRNN(_Recurrent, nn.RNN):  # type: ignore[misc]
    """An RNN with packed weights."""


class QuantizedLSTMCell(Several, nn.LSTMCell):
    """An LSTM cell with packed weights."""


class QuantizedGRUCell(Several, nn.GRUCell):
    """A GRU cell with packed weights."""


class QuantizedRNNCell(Several, nn.RNNCell):
    """An RNN cell with packed weights."""


class QuantizedMultiheadAttention(Several, nn.MultiheadAttention):
    """Attention with packed projections."""


class Fused(Several):
    """Matrices that lie on top of one another in one parameter, such as those of experts.

    While the layer runs they are unpacked once, however often it asks for them. What it
    multiplies is counted where it does so, since its code is not known.
    """

    counted = False
    """Whether there is a formula for its multiply-accumulates."""

    shapes: dict[str, tuple[int, ...]]

    def weight_of(self, name: str, packing: Packing) -> Tensor:
        """Return one weight in its own shape."""
        ready: dict[str, Tensor] = self.__dict__.get("ready", {})
        return ready[name] if name in ready else self.unpacked(packing).view(self.shapes[name])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute as the layer does from which this one was made."""
        vars(self)["ready"] = {n: self.weight_of(n, p) for n, p in self.packings.items()}
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]  # of the layer it is mixed with
        finally:
            del vars(self)["ready"]


@cache
def _fused_kind(kind: type[nn.Module]) -> type[Any]:
    return type(f"Quantized{kind.__name__}", (Fused, kind), {})


KINDS: Mapping[type[nn.Module], type[Any]] = {
    nn.LSTM: QuantizedLSTM,
    nn.GRU: QuantizedGRU,
    nn.RNN: QuantizedRNN,
    nn.LSTMCell: QuantizedLSTMCell,
    nn.GRUCell: QuantizedGRUCell,
    nn.RNNCell: QuantizedRNNCell,
    nn.MultiheadAttention: QuantizedMultiheadAttention,
}


_PRIVATE = ("_flat_weights_names", "_all_weights", "_qkv_same_embed_dim")


def quantized(
    layer: nn.Module,
    bits: int,
    groups: int,
    *,
    indexed: bool,
    rule: Grouping | None = None,
) -> nn.Module:
    """Make the packed layer of a plain one, with the same biases.

    Args:
        layer: of one of `KINDS`.
        bits: of a weight.
        groups: scales of each matrix; 0 is one for every channel.
        indexed: whether the group of each channel is stored.
        rule: which channels share a scale; None leaves zeros, for loading.
    """
    if type(layer) not in KINDS:
        return _fused_quantized(layer, bits, groups, indexed=indexed, rule=rule)
    kind = KINDS[type(layer)]
    new: Any = object.__new__(kind)
    nn.Module.__init__(new)
    kept = {name: vars(layer)[name] for name in _PRIVATE if name in vars(layer)}
    vars(new).update(kept, packings={}, _flat_weight_refs=[])
    take_after(new, layer)
    first = next(iter(weights_of(layer).values()))
    new.register_buffer("like", first.new_empty(0), persistent=False)
    for name, parameter in layer._parameters.items():
        if parameter is not None and parameter.dim() == 2:
            _pack(
                new, name, parameter, bits_of(len(parameter), bits, groups, indexed=indexed), rule
            )
        else:
            new.register_parameter(name, parameter)
    if isinstance(layer, nn.MultiheadAttention):
        out = layer.out_proj
        how = bits_of(len(out.weight), bits, groups, indexed=indexed)
        new.out_proj = Quantized(out, how, _values(out.weight, how, rule) if rule else None)
    return new.train(layer.training)


def _fused_quantized(
    layer: nn.Module, bits: int, groups: int, *, indexed: bool, rule: Grouping | None
) -> nn.Module:
    weights, new = weights_of(layer), copy.copy(layer)
    for held in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        vars(new)[held] = copy.copy(vars(layer)[held])
    kind: Any = type(layer)
    new.__class__ = _fused_kind(kind)
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    vars(new).update(packings={}, shapes=shapes)
    like = next(iter(weights.values())).new_empty(0)
    new.register_buffer("like", like, persistent=False)
    for name, weight in weights.items():
        del new._parameters[name]
        rows = _rows(weight)
        _pack(new, name, rows, bits_of(len(rows), bits, groups, indexed=indexed), rule)
    return new


def _pack(new: Any, name: str, weight: Tensor, bits: Bits, rule: Grouping | None) -> None:
    packing = Packing(tuple(weight.shape), bits, f"{name}_")
    packing.allocate(new, weight.device)
    new.packings[name] = packing
    if rule is not None:
        values = _values(weight, bits, rule)
        packing.fill(new, values.weight, values.scales, values.index)


def _values(weight: Tensor, bits: Bits, rule: Grouping) -> Values:
    index = grouping(weight, bits.scales, rule)
    return Values(weight.detach(), best_scales(weight, index, bits.weight), index)


def bytes_of(shapes: list[tuple[int, int]], bits: int, groups: int, *, indexed: bool) -> int:
    """Say what matrices take.

    Args:
        shapes: rows and numbers of each.
        bits: of a weight.
        groups: scales of each; 0 is one for every channel.
        indexed: whether the group of each channel is stored.
    """
    rows = [
        (bits_of(channels, bits, groups, indexed=indexed), channels, numbers)
        for channels, numbers in shapes
    ]
    return sum(how.bytes(channels, numbers) for how, channels, numbers in rows)


def shapes_of(layer: nn.Module) -> list[tuple[int, int]]:
    """Return rows and numbers of every matrix of a layer with several."""
    return [(len(_rows(weight)), weight.numel()) for weight in weights_of(layer).values()]
