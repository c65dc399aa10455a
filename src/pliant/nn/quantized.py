"""A layer that keeps its weight as packed integers and rounds what it reads: what is shipped."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.codecs.packing import pack, packed_bytes, unpack
from pliant.math.quantize import column, integers, levels
from pliant.nn.layers import Factorizable

_CONV: tuple[str, ...] = ("in_channels", "out_channels", "kernel_size", "stride", "padding")
_CONV += ("dilation", "groups", "padding_mode", "_reversed_padding_repeated_twice")
_LINEAR = ("in_features", "out_features")


@dataclass(frozen=True)
class Bits:
    """How the numbers of one layer are written.

    Args:
        weight: bits of a weight, 2 to 8.
        scales: how many scales its output channels share.
        indexed: whether the group of each channel is stored; else groups are runs of channels.
        input: bits of what the layer reads; 0 leaves it as it is.
        output: bits of what it gives; 0 leaves it as it is.
    """

    weight: int
    scales: int
    indexed: bool
    input: int = 0
    output: int = 0

    @property
    def index(self) -> int:
        """Bits that name the group of one channel; 0 where none is stored."""
        return math.ceil(math.log2(self.scales)) if self.indexed else 0

    def bytes(self, shape: tuple[int, ...]) -> int:
        """Say what a weight of this shape takes: integers, scales, groups; its bias left out."""
        ranges = (self.input > 0) + (self.output > 0)
        packed = packed_bytes(math.prod(shape), self.weight) + packed_bytes(shape[0], self.index)
        return packed + 4 * self.scales + 8 * ranges


@dataclass(frozen=True)
class Values:
    """The numbers of a quantized layer, before they are packed.

    Args:
        weight: in floating point; rounded by the scales.
        scales: one for each group.
        index: the group of each channel.
        bias: or None.
        input: scale and zero point of what the layer reads, or None.
        output: the same of what it gives.
    """

    weight: Tensor
    scales: Tensor
    index: Tensor
    bias: Tensor | None = None
    input: tuple[float, int] | None = None
    output: tuple[float, int] | None = None


class Quantized(nn.Module):
    """A convolution or Linear whose weight is stored as packed integers with scales.

    In every forward pass the weight is unpacked. Where ranges of activations are known, inputs
    and outputs are rounded to their levels; gradients pass straight through. ``weight`` is the
    weight in floating point.

    Args:
        layer: the layer it replaces; its bias stays the same parameter.
        bits: see `Bits`.
        values: None leaves zeros, for loading.
    """

    integers: Tensor
    scales: Tensor
    index: Tensor
    bias: Tensor | None

    def __init__(self, layer: Factorizable, bits: Bits, values: Values | None = None) -> None:
        super().__init__()
        self.kind, self.bits = type(layer), bits
        for name in _LINEAR if isinstance(layer, nn.Linear) else _CONV:
            setattr(self, name, getattr(layer, name))
        self.shape = tuple(layer.weight.shape)
        self.bias = layer.bias
        self._allocate(layer.weight.device)
        if values is not None:
            self._fill(values)
        self.train(layer.training)

    @property
    def weight(self) -> Tensor:
        """The weight as the forward pass sees it."""
        return self.levels() * column(self.channel_scales(), torch.empty(self.shape, device="meta"))

    def levels(self) -> Tensor:
        """Return the integers of the weight, in its shape, as floating-point numbers."""
        flat = unpack(self.integers, self.bits.weight, math.prod(self.shape))
        return flat.view(self.shape).to(self.scales.dtype) + levels(self.bits.weight)[0]

    def channel_scales(self) -> Tensor:
        """Return the scale of every output channel."""
        channels, groups = self.shape[0], self.bits.scales
        if self.bits.indexed:
            return self.scales[unpack(self.index, self.bits.index, channels).long()]
        return self.scales[torch.arange(channels, device=self.scales.device) * groups // channels]

    def forward(self, x: Tensor) -> Tensor:
        """Map the rounded input by the rounded weight."""
        if self.bits.input:
            x = self._rounded(x, "input", self.bits.input)
        x = applied(self, self.kind, x, self.weight.to(x.dtype), self.bias)
        return self._rounded(x, "output", self.bits.output) if self.bits.output else x

    def range(self, side: str) -> tuple[Tensor, Tensor]:
        """Return scale and zero point of the ``input`` or the ``output``."""
        return getattr(self, f"{side}_scale"), getattr(self, f"{side}_zero")

    @property
    def numbers(self) -> int:
        """How many parameters it stands for besides those it owns."""
        return math.prod(self.shape)

    def macs(self, inputs: list[Tensor], outputs: list[Tensor]) -> int:
        """Count multiply-accumulates of one call, as for the layer it replaces."""
        return outputs[0].numel() * math.prod(self.shape[1:])

    def extra_repr(self) -> str:
        """Name what it replaces and how its numbers are written."""
        return f"{self.kind.__name__}, {self.shape}, bias={self.bias is not None}, {self.bits}"

    def _rounded(self, x: Tensor, side: str, bits: int) -> Tensor:
        found = torch.fake_quantize_per_tensor_affine(x.float(), *self.range(side), 0, 2**bits - 1)
        return found.to(x.dtype)

    def _allocate(self, device: torch.device) -> None:
        bits, channels = self.bits, self.shape[0]

        def empty(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device))

        count = packed_bytes(math.prod(self.shape), bits.weight)
        empty("integers", (count,), torch.uint8)
        empty("scales", (bits.scales,), torch.float32)
        if bits.indexed:
            empty("index", (packed_bytes(channels, bits.index),), torch.uint8)
        for side in [side for side in ("input", "output") if getattr(bits, side)]:
            empty(f"{side}_scale", (), torch.float32)
            empty(f"{side}_zero", (), torch.int32)

    @torch.no_grad()
    def _fill(self, values: Values) -> None:
        bits = self.bits
        found = integers(values.weight, values.scales[values.index], bits.weight)
        self.integers.copy_(pack(found - levels(bits.weight)[0], bits.weight))
        self.scales.copy_(values.scales)
        if bits.indexed:
            self.index.copy_(pack(values.index, bits.index))
        if self.bias is not None and values.bias is not None:
            self.bias.copy_(values.bias)
        for side, found_range in (("input", values.input), ("output", values.output)):
            if found_range is not None:
                for buffer, value in zip(self.range(side), found_range, strict=True):
                    buffer.fill_(value)


def applied(layer: Any, kind: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply a layer's operation with another weight and bias.

    Args:
        layer: has the geometry of a convolution, or is linear.
        kind: the class whose operation it is.
        x: its input.
        weight: instead of its own.
        bias: instead of its own.
    """
    if kind is nn.Linear:
        return F.linear(x, weight, bias)
    found: Tensor = kind._conv_forward(layer, x, weight, bias)
    return found
