"""Writes rounded layers as ONNX knows them: QuantizeLinear and DequantizeLinear around the layer.

A runtime that knows the pattern computes such a layer in integers; one that does not computes
the same in floating point. Weights of less than 8 bits are written as 8-bit integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pliant.nn import kinds
from pliant.nn.packed import Packing
from pliant.nn.quantized import Quantized
from pliant.nn.several import Several

WIDE = 8  # bits of an integer in the graph
MOST = 2**31  # of a 32-bit bias


def deployable(network: nn.Module) -> bool:
    """Put layers that export as integers in the place of the packed ones.

    They are for tracing only: what they compute in PyTorch means nothing.

    Args:
        network: changed in place.

    Returns:
        Whether there was one that rounds activations.
    """
    found = [m for m in network.modules() if isinstance(m, Quantized)]
    written: dict[nn.Module, tuple[Tensor, Tensor]] = {}  # tied layers share what is written
    for layer in found:
        rows = written.setdefault(layer.keeper, _written(layer.packing, layer.keeper))
        table = layer.kind in kinds.TABLE
        kinds.put(network, layer, Rows(layer, *rows) if table else Integers(layer, *rows))
    for module in network.modules():
        if isinstance(module, Several):
            _unpack_in_graph(module)
    return any(layer.bits.input or layer.bits.output for layer in found)


def _written(packing: Packing, keeper: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the integers of a weight as rows, and the scale of each."""
    return packing.levels(keeper).to(torch.int8), packing.channel_scales(keeper)


class Rows(nn.Module):
    """A rounded table: rows are looked up as integers.

    Args:
        layer: what it stands for.
        levels: integers, (rows, numbers).
        scales: of the rows.
    """

    def __init__(self, layer: Quantized, levels: Tensor, scales: Tensor) -> None:
        super().__init__()
        kinds.take_after(self, layer)
        self.register_buffer("levels", levels)
        self.register_buffer("scales", scales)
        self.type_of_weight = layer.like.dtype

    @property
    def weight(self) -> Tensor:
        """The whole table, for whoever reads it besides."""
        return _dequantized(self.levels, self.scales).to(self.type_of_weight)  # type: ignore[arg-type]

    def forward(self, input: Tensor) -> Tensor:
        """Look up, then scale."""
        levels, scales = self.levels[input], self.scales[input]  # type: ignore[index]
        found: Tensor = levels.to(scales.dtype) * scales[..., None]
        return found.to(self.type_of_weight)


class Integers(nn.Module):
    """A rounded layer in the operators of ONNX.

    Args:
        layer: what it stands for.
        levels: integers of its weight as rows.
        scales: of the rows.
    """

    levels: Tensor
    scales: Tensor
    whole_bias: Tensor
    bias_scales: Tensor

    def __init__(self, layer: Quantized, levels: Tensor, scales: Tensor) -> None:
        super().__init__()
        kinds.take_after(self, layer)
        self.layer, self.kind, self.bits = layer, layer.kind, layer.bits
        self.register_buffer("levels", levels)
        self.register_buffer("scales", scales)
        self.whole = self._bias(layer, scales)
        self.ends = {side: _ends(layer, side) for side in ("input", "output")}

    @property
    def weight(self) -> Tensor:
        """The weight in floating point."""
        rows = _dequantized(self.levels, self.scales)
        return kinds.from_rows(self, rows).to(self.layer.like.dtype)

    @property
    def bias(self) -> Tensor | None:
        """The bias in floating point."""
        if self.whole:
            return _dequantized(self.whole_bias, self.bias_scales)
        return self.layer.bias

    def forward(self, input: Tensor, output_size: Any = None) -> Tensor:
        """Round, dequantize, apply, round."""
        x = self._rounded(input, "input", self.layer.bits.input)
        x = kinds.applied(self, x, self.weight, self.bias, output_size)
        return self._rounded(x, "output", self.layer.bits.output)

    def _bias(self, layer: Quantized, scales: Tensor) -> bool:
        """Write the bias in units of what it is added to, as integer kernels want it."""
        if layer.bias is None or not layer.bits.input:
            return False
        unit = scales.double() * layer.range("input")[0]
        found = (layer.bias.detach() / unit).round()
        if found.abs().max() >= MOST:
            return False
        self.register_buffer("whole_bias", found.to(torch.int32))
        self.register_buffer("bias_scales", unit.float())
        return True

    def _rounded(self, x: Tensor, side: str, bits: int) -> Tensor:
        if not bits:
            return x
        scale, zero = self.layer.range(side)
        if bits < WIDE:  # eight bits are clipped by their type
            x = x.clamp(*self.ends[side])
        place = zero.to(torch.uint8)
        level = _operator("QuantizeLinear", (x, scale, place), torch.uint8, x.shape)
        return _operator("DequantizeLinear", (level, scale, place), x.dtype, x.shape)


def _ends(layer: Quantized, side: str) -> tuple[float, float]:
    """The least and the largest number that has a level."""
    bits = getattr(layer.bits, side)
    if not bits:
        return 0.0, 0.0
    scale, zero = (float(value) for value in layer.range(side))
    return -zero * scale, (2**bits - 1 - zero) * scale


def _unpack_in_graph(module: Any) -> None:
    """Let a layer with several weights dequantize them in operators of the graph."""
    for name, packing in module.packings.items():
        levels, scales = _written(packing, module)
        module.register_buffer(f"{name}_levels", levels)
        module.register_buffer(f"{name}_channels", scales)

    def unpacked(packing: Packing) -> Tensor:
        levels = getattr(module, f"{packing.prefix}levels")
        return _dequantized(levels, getattr(module, f"{packing.prefix}channels"))

    vars(module)["unpacked"] = unpacked


def _dequantized(levels: Tensor, scales: Tensor) -> Tensor:
    given = (levels, scales, torch.zeros_like(scales, dtype=levels.dtype))
    return _operator("DequantizeLinear", given, scales.dtype, levels.shape, axis=0)


def _operator(
    name: str, given: Sequence[Tensor], dtype: torch.dtype, shape: Sequence[int], **attributes: int
) -> Tensor:
    import torch.onnx.ops

    return torch.onnx.ops.symbolic(name, given, dict(attributes), dtype=dtype, shape=shape)
