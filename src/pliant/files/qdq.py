"""Writes rounded layers as ONNX knows them: QuantizeLinear and DequantizeLinear around the layer.

A runtime that knows the pattern computes such a layer in integers; one that does not computes
the same in floating point. Weights of less than 8 bits are written as 8-bit integers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pliant.nn.layers import replace
from pliant.nn.quantized import Quantized, applied

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
    found = [(name, m) for name, m in network.named_modules() if isinstance(m, Quantized)]
    for name, layer in found:
        replace(network, name, Integers(layer))
    return any(layer.bits.input or layer.bits.output for _, layer in found)


class Integers(nn.Module):
    """A rounded layer in the operators of ONNX.

    Args:
        layer: what it stands for.
    """

    weight: Tensor
    scales: Tensor
    bias: Tensor
    bias_scales: Tensor

    def __init__(self, layer: Quantized) -> None:
        super().__init__()
        self.layer, self.kind = layer, layer.kind
        scales = layer.channel_scales()
        self.register_buffer("weight", layer.levels().to(torch.int8))
        self.register_buffer("scales", scales)
        self.whole = self._bias(layer, scales)
        self.ends = {side: _ends(layer, side) for side in ("input", "output")}

    def forward(self, x: Tensor) -> Tensor:
        """Round, dequantize, apply, round."""
        layer = self.layer
        x = self._rounded(x, "input", layer.bits.input)
        weight = _dequantized(self.weight, self.scales)
        bias: Tensor | None = layer.bias
        if self.whole:
            bias = _dequantized(self.bias, self.bias_scales)
        x = applied(layer, self.kind, x, weight, bias)
        return self._rounded(x, "output", layer.bits.output)

    def _bias(self, layer: Quantized, scales: Tensor) -> bool:
        """Write the bias in units of what it is added to, as integer kernels want it."""
        if layer.bias is None or not layer.bits.input:
            return False
        unit = scales.double() * layer.range("input")[0]
        found = (layer.bias.detach() / unit).round()
        if found.abs().max() >= MOST:
            return False
        self.register_buffer("bias", found.to(torch.int32))
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


def _dequantized(levels: Tensor, scales: Tensor) -> Tensor:
    given = (levels, scales, torch.zeros_like(scales, dtype=levels.dtype))
    return _operator("DequantizeLinear", given, scales.dtype, levels.shape, axis=0)


def _operator(
    name: str, given: Sequence[Tensor], dtype: torch.dtype, shape: Sequence[int], **attributes: int
) -> Tensor:
    import torch.onnx.ops

    return torch.onnx.ops.symbolic(name, given, dict(attributes), dtype=dtype, shape=shape)
