"""A weight as packed integers with scales, in the buffers of a module."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pliant.codecs.packing import WIDEST, pack, packed_bytes, unpack
from pliant.math.quantize import column, levels
from pliant.math.quantize import integers as rounded_levels


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

    def bytes(self, channels: int, numbers: int) -> int:
        """Say what a weight takes: integers, scales, groups; its bias left out.

        Args:
            channels: rows of the weight.
            numbers: in all of it.
        """
        ranges = (self.input > 0) + (self.output > 0)
        return self.shared(channels, numbers) + 8 * ranges

    def shared(self, channels: int, numbers: int) -> int:
        """Say what of it layers share whose weights are tied: all but the ranges."""
        packed = packed_bytes(numbers, self.weight) + packed_bytes(channels, self.index)
        return packed + 4 * self.scales


@dataclass(frozen=True)
class Values:
    """The numbers of a quantized layer, before they are packed.

    Args:
        weight: in floating point, in the shape of the layer; rounded by the scales.
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


@dataclass(frozen=True)
class Packing:
    """Where a module keeps one weight: three buffers, their names begun alike.

    Args:
        shape: of the weight as rows: (channels, ...).
        bits: how it is written.
        prefix: of the buffers' names.
    """

    shape: tuple[int, ...]
    bits: Bits
    prefix: str = ""

    @property
    def numbers(self) -> int:
        """How many weights there are."""
        return math.prod(self.shape)

    def allocate(self, module: nn.Module, device: torch.device) -> None:
        """Register the buffers, full of zeros."""

        def empty(name: str, count: int, dtype: torch.dtype) -> None:
            module.register_buffer(
                self.prefix + name, torch.zeros(count, dtype=dtype, device=device)
            )

        empty("integers", packed_bytes(self.numbers, self.bits.weight), torch.uint8)
        empty("scales", self.bits.scales, torch.float32)
        if self.bits.indexed:
            empty("index", packed_bytes(self.shape[0], self.bits.index), torch.uint8)

    @torch.no_grad()
    def fill(self, module: nn.Module, rows: Tensor, scales: Tensor, index: Tensor) -> None:
        """Round and pack a weight.

        Args:
            module: has the buffers.
            rows: the weight, (channels, ...).
            scales: one for each group.
            index: the group of each channel.
        """
        found = rounded_levels(rows, scales[index], self.bits.weight)
        packed = pack(found - levels(self.bits.weight)[0], self.bits.weight)
        self._buffer(module, "integers").copy_(packed)
        self._buffer(module, "scales").copy_(scales)
        if self.bits.indexed:
            self._buffer(module, "index").copy_(pack(index, self.bits.index))

    def rows(self, module: nn.Module) -> Tensor:
        """Return the weight as rows."""
        found = self.levels(module)
        return found * column(self.channel_scales(module), found)

    def levels(self, module: nn.Module) -> Tensor:
        """Return the integers of the weight as rows, as floating-point numbers."""
        flat = unpack(self._buffer(module, "integers"), self.bits.weight, self.numbers)
        return flat.view(self.shape).float() + levels(self.bits.weight)[0]

    def some(self, module: nn.Module, chosen: Tensor) -> Tensor:
        """Return a few rows, without unpacking the others where each row has bytes of its own.

        Args:
            module: has the buffers.
            chosen: numbers of rows, of any shape.

        Returns:
            (..., numbers of a row).
        """
        length = math.prod(self.shape[1:])
        if length * self.bits.weight % WIDEST:
            return self.rows(module).flatten(1)[chosen]
        packed = self._buffer(module, "integers").view(self.shape[0], -1)[chosen.flatten()]
        flat = unpack(packed.flatten(), self.bits.weight, chosen.numel() * length)
        found = flat.view(-1, length).float() + levels(self.bits.weight)[0]
        scales = self.channel_scales(module)[chosen.flatten()]
        return (found * scales[:, None]).view(*chosen.shape, length)

    def channel_scales(self, module: nn.Module) -> Tensor:
        """Return the scale of every output channel."""
        channels, scales = self.shape[0], self._buffer(module, "scales")
        if self.bits.indexed:
            index = unpack(self._buffer(module, "index"), self.bits.index, channels)
            return scales[index.long()]
        runs = torch.arange(channels, device=scales.device) * self.bits.scales // channels
        return scales[runs]

    def _buffer(self, module: nn.Module, name: str) -> Tensor:
        found: Tensor = getattr(module, self.prefix + name)
        return found


def integers(model: nn.Module) -> dict[str, int]:
    """Name the buffers of a model that hold packed integers, with the bits of each number."""
    found: dict[str, int] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        own = [*getattr(module, "packings", {}).values(), getattr(module, "packing", None)]
        for packing in own:
            if isinstance(packing, Packing):
                path = f"{name}." if name else ""
                found[f"{path}{packing.prefix}integers"] = packing.bits.weight
    return found
