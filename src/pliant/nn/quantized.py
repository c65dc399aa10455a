"""A layer that keeps its weight as packed integers and rounds what it reads: what is shipped."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pliant.nn import kinds
from pliant.nn.packed import Bits, Packing, Values


class Quantized(nn.Module):
    """A layer with one weight that is stored as packed integers with scales.

    In every forward pass the weight is unpacked, of a table only the rows that are looked up.
    Where ranges of activations are known, inputs and outputs are rounded to their levels;
    gradients pass straight through. ``weight`` is the weight in floating point; what else the
    replaced layer could be asked (``stride``, ``in_features``) it answers too.

    Args:
        layer: the layer it replaces, of a kind of `pliant.nn.kinds`; its bias stays the same
            parameter.
        bits: see `Bits`.
        values: None leaves zeros, for loading.
        source: another quantized layer, whose weight was tied to this one: it is shared.
    """

    integers: Tensor
    scales: Tensor
    index: Tensor
    like: Tensor
    bias: Tensor | None

    def __init__(
        self,
        layer: Any,
        bits: Bits,
        values: Values | None = None,
        source: Quantized | None = None,
    ) -> None:
        super().__init__()
        self.kind, self.bits = kinds.kind_of(layer), bits
        kinds.take_after(self, layer)
        self.source = source
        self.shape = tuple(layer.weight.shape)
        self.packing = Packing(tuple(kinds.to_rows(layer, layer.weight).shape), bits)
        self.register_parameter("bias", getattr(layer, "bias", None))
        self._allocate(layer.weight)
        if values is not None:
            self._fill(values)
        self.train(layer.training)

    @property
    def weight(self) -> Tensor:
        """The weight as the forward pass sees it."""
        return kinds.from_rows(self, self.packing.rows(self.keeper)).to(self.like.dtype)

    @property
    def keeper(self) -> nn.Module:
        """The module that holds the packed weight: another one where weights were tied."""
        return self if self.source is None else self.source

    def levels(self) -> Tensor:
        """Return the integers of the weight, in its shape, as floating-point numbers."""
        return kinds.from_rows(self, self.packing.levels(self.keeper))

    def channel_scales(self) -> Tensor:
        """Return the scale of every output channel."""
        return self.packing.channel_scales(self.keeper)

    def forward(self, input: Tensor, output_size: Any = None) -> Tensor:
        """Map the rounded input by the rounded weight; the arguments are named as PyTorch does."""
        if self.kind in kinds.TABLE:
            return self.packing.some(self.keeper, input).to(self.like.dtype)
        x = self._rounded(input, "input", self.bits.input) if self.bits.input else input
        weight = kinds.from_rows(self, self.packing.rows(self.keeper))
        x = kinds.applied(self, x, weight.to(x.dtype), self.bias, output_size)
        return self._rounded(x, "output", self.bits.output) if self.bits.output else x

    def range(self, side: str) -> tuple[Tensor, Tensor]:
        """Return scale and zero point of the ``input`` or the ``output``."""
        return getattr(self, f"{side}_scale"), getattr(self, f"{side}_zero")

    @property
    def numbers(self) -> int:
        """How many parameters it stands for besides those it owns."""
        return self.packing.numbers if self.source is None else 0

    def macs(self, inputs: list[Tensor], outputs: list[Tensor]) -> int:
        """Count multiply-accumulates of one call, as for the layer it replaces."""
        return kinds.macs(self, inputs, outputs)

    def extra_repr(self) -> str:
        """Name what it replaces and how its numbers are written."""
        kind = self.kind.__name__ if self.kind else ""
        return f"{kind}, {self.shape}, bias={self.bias is not None}, {self.bits}"

    def _rounded(self, x: Tensor, side: str, bits: int) -> Tensor:
        found = torch.fake_quantize_per_tensor_affine(x.float(), *self.range(side), 0, 2**bits - 1)
        return found.to(x.dtype)

    def _allocate(self, weight: Tensor) -> None:
        device = weight.device
        self.register_buffer("like", weight.new_empty(0), persistent=False)  # follows .to(dtype)
        if self.source is None:
            self.packing.allocate(self, device)
        for side in [side for side in ("input", "output") if getattr(self.bits, side)]:
            self.register_buffer(f"{side}_scale", torch.zeros((), device=device))
            zero = torch.zeros((), dtype=torch.int32, device=device)
            self.register_buffer(f"{side}_zero", zero)

    @torch.no_grad()
    def _fill(self, values: Values) -> None:
        if self.source is None:
            rows = kinds.to_rows(self, values.weight)
            self.packing.fill(self, rows, values.scales, values.index)
        if self.bias is not None and values.bias is not None:
            self.bias.copy_(values.bias)
        for side, found_range in (("input", values.input), ("output", values.output)):
            if found_range is not None:
                for buffer, value in zip(self.range(side), found_range, strict=True):
                    buffer.fill_(value)
