"""Writes rounded layers as ONNX knows them: QuantizeLinear and DequantizeLinear around the layer.

A runtime that knows the pattern computes such a layer in integers; one that does not computes
the same in floating point. Rounded weights of less than 8 bits are written as 8-bit integers,
codes of 4 bits and less as such: in the blocks of MatMulNBits for linear layers, as integers of 4
bits for convolutions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pliant.nn import kinds
from pliant.nn.packed import Packing
from pliant.nn.product import Product
from pliant.nn.quantized import Quantized
from pliant.nn.several import Several

WIDE = 8  # bits of an integer in the graph
MOST = 2**31  # of a 32-bit bias
APART, LEVELS_APART = 0.05, 2.0  # of the largest output, and in levels of the coarsest input
NARROW = "nibbles"  # the name of buffers that become integers of 4 bits
BLOCKS = (16, 32, 64, 128, 256)  # depths that onnxruntime's MatMulNBits knows


@dataclass(frozen=True)
class Deployable:
    """What a network made for export needs.

    Args:
        apart: share of the largest output by which runtimes may differ: where activations are
            rounded, a number between two levels may fall to either side.
        narrow: whether integers of 4 bits are written, which opset 21 has.
    """

    apart: float
    narrow: bool


def deployable(network: nn.Module) -> Deployable:
    """Put layers that export as integers in the place of the packed ones.

    They are for tracing only: what they compute in PyTorch means nothing.

    Args:
        network: changed in place.
    """
    found = [m for m in network.modules() if isinstance(m, Quantized)]
    keepers = {layer: layer.keeper for layer in found}  # tied layers share what is written
    written = {keeper: _written(layer.packing, keeper) for layer, keeper in keepers.items()}
    for layer, keeper in keepers.items():
        kind = Rows if layer.kind in kinds.TABLE else Integers
        kinds.put(network, layer, kind(layer, *written[keeper]))
    for module in network.modules():
        if isinstance(module, Several):
            _unpack_in_graph(module)
    products = [m for m in network.modules() if isinstance(m, Product)]
    for product in products:
        kinds.put(network, product, Codes(product))
    bits = [b for layer in found for b in (layer.bits.input, layer.bits.output) if b]
    bits += [layer.bits for layer in products]
    apart = max(APART, LEVELS_APART / (2 ** min(bits) - 1)) if bits else 0.0
    narrow = any(isinstance(m, Codes) and m.narrow for m in network.modules())
    return Deployable(apart, narrow)


def narrowed(model: Any) -> None:
    """Write codes of 4 bits as such: a traced graph has bytes for them.

    Args:
        model: of onnx_ir, changed in place.
    """
    import onnx_ir

    for node in model.graph:
        if node.op_type != "DequantizeLinear" or not _ends_with(node.inputs[0], NARROW):
            continue
        levels, zero = node.inputs[0], node.inputs[2]
        # Other layers may share this very constant, and have bytes.
        own = onnx_ir.Value(name=f"{levels.name}_zero", shape=zero.shape)
        own.const_value = zero.const_value
        model.graph.register_initializer(own)
        node.replace_input_with(2, own)
        for value in (levels, own):
            _narrow(value)


def _ends_with(value: Any, name: str) -> bool:
    return value.is_initializer() and value.name.rpartition(".")[2] == name


def _narrow(value: Any) -> None:
    """Turn the bytes of a constant into integers of 4 bits."""
    import ml_dtypes
    import onnx_ir

    found = value.const_value.numpy().astype(ml_dtypes.uint4)
    value.const_value = onnx_ir.tensor(found, dtype=onnx_ir.DataType.UINT4, name=value.name)
    value.dtype = onnx_ir.DataType.UINT4


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
        sides = {"input": layer.bits.input, "output": layer.bits.output}
        self.ends = {s: _ends(bits, *layer.range(s)) for s, bits in sides.items() if bits}

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
        """Round, dequantize, apply, round; in single precision, as scales are."""
        x = self._rounded(input.float(), "input", self.layer.bits.input)
        bias = None if self.bias is None else self.bias.float()
        x = kinds.applied(self, x, self.weight.float(), bias, output_size)
        return self._rounded(x, "output", self.layer.bits.output).to(input.dtype)

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
        return _levelled(x, *self.layer.range(side), bits, self.ends[side])


def _levelled(
    x: Tensor, scale: Tensor, zero: Tensor, bits: int, ends: tuple[float, float]
) -> Tensor:
    if bits < WIDE:  # eight bits are clipped by their type
        x = x.clamp(*ends)
    place = zero.to(torch.uint8)
    level = _operator("QuantizeLinear", (x, scale, place), torch.uint8, x.shape)
    return _operator("DequantizeLinear", (level, scale, place), x.dtype, x.shape)


def _ends(bits: int, scale: Tensor, zero: Tensor) -> tuple[float, float]:
    """The least and the largest number that has a level."""
    unit, place = float(scale), float(zero)
    return -place * unit, (2**bits - 1 - place) * unit


class Codes(nn.Module):
    """A product of codes in the operators of ONNX.

    Args:
        layer: what it stands for.
    """

    def __init__(self, layer: Product) -> None:
        super().__init__()
        kinds.take_after(self, layer)
        self.layer, self.kind, self.bits = layer, layer.kind, layer.bits
        self.blocks = 0
        self.ends = _ends(self.bits, layer.input_scale, layer.input_zero)
        levels = layer.levels().to(torch.uint8)
        if self.bits == 4 and layer.kind in kinds.LINEAR:
            self._divide(levels, layer.scales.expand(len(levels)), int(layer.zero))
            return
        self.narrow = self.bits <= 4
        scales = layer.scales if len(layer.scales) > 1 else layer.scales[0]
        zeros = torch.full_like(scales, int(layer.zero), dtype=torch.uint8)
        self.register_buffer(NARROW if self.narrow else "levels", levels)
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", zeros)

    @property
    def weight(self) -> Tensor:
        """The weight in floating point."""
        levels: Any = getattr(self, NARROW if self.narrow else "levels")
        return _dequantized(levels, self.scales, self.zeros)  # type: ignore[arg-type]

    @property
    def bias(self) -> Tensor | None:
        """The bias, which is no integer."""
        return self.layer.bias

    def forward(self, input: Tensor) -> Tensor:
        """Round, and multiply."""
        layer = self.layer
        x = _levelled(input, layer.input_scale, layer.input_zero, self.bits, self.ends)
        if not self.blocks:
            return kinds.applied(self, x, self.weight, self.bias)
        shape = (*x.shape[:-1], layer.shape[0])
        given = (x, self.packed, self.block_scales, self.block_zeros)
        names = {"K": layer.depth, "N": layer.shape[0], "bits": 4, "block_size": self.blocks}
        found = _operator("com.microsoft::MatMulNBits", given, x.dtype, shape, **names)  # type: ignore[arg-type]
        return found if self.bias is None else found + self.bias

    def _divide(self, levels: Tensor, scales: Tensor, zero: int) -> None:
        """Lay codes into the blocks of MatMulNBits: of the depth at which they take least bytes."""
        rows, depth = levels.shape

        def count(block: int) -> int:
            blocks = -(-depth // block)
            return blocks * (block // 2 + 4) + -(-blocks // 2)

        self.narrow, self.blocks = False, min(BLOCKS, key=count)
        many = -(-depth // self.blocks)
        full = nn.functional.pad(levels, (0, many * self.blocks - depth))
        packed = (full[:, 0::2] | full[:, 1::2] << 4).view(rows, many, self.blocks // 2)
        self.register_buffer("packed", packed)
        self.register_buffer("block_scales", scales[:, None].expand(rows, many).flatten())
        zeros = torch.full((rows * -(-many // 2),), zero | zero << 4, dtype=torch.uint8)
        self.register_buffer("block_zeros", zeros)


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


def _dequantized(levels: Tensor, scales: Tensor, zeros: Tensor | None = None) -> Tensor:
    """Dequantize rows, each with a scale of its own or all with one."""
    if zeros is None:
        zeros = torch.zeros_like(scales, dtype=levels.dtype)
    given, axes = (levels, scales, zeros), {"axis": 0} if scales.dim() else {}
    return _operator("DequantizeLinear", given, scales.dtype, levels.shape, **axes)


def _operator(
    name: str, given: Sequence[Tensor], dtype: torch.dtype, shape: Sequence[int], **attributes: int
) -> Tensor:
    import torch.onnx.ops

    return torch.onnx.ops.symbolic(name, given, dict(attributes), dtype=dtype, shape=shape)
