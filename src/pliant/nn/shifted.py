"""Convolutions of which every pair of channels keeps one weight: a shift and a product."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.codecs.packing import pack, packed_bytes
from pliant.cost import LayerCost
from pliant.errors import EditError
from pliant.nn.kept import Keeps

EPS = 1e-12  # under the spread of scores that are all alike
HEAT = 4  # bytes of a temperature
HALF = 4  # bits of a tap, of 9 or less; else a byte


class _Geometry(Keeps):
    """What both layers share: where the patches of a convolution lie."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.inputs, self.outputs = layer.inputs, layer.outputs
        self.kernel_size, self.stride = layer.kernel_size, layer.stride
        self.padding_mode, self.around = layer.padding_mode, layer.around

    def padded(self, x: Tensor) -> Tensor:
        """Return an input with what lies around it."""
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(x, self.around, mode=mode)

    def convolved(self, x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
        """Convolve an input; zeros around it need no copy of it."""
        left, right, top, bottom = self.around
        if self.padding_mode == "zeros" and left == right and top == bottom:
            return F.conv2d(x, kernel, bias, self.stride, (top, left))
        return F.conv2d(self.padded(x), kernel, bias, self.stride)

    def extra_repr(self) -> str:
        """Return the settings."""
        return f"{self.inputs}, {self.outputs}, {self.kernel_size}, stride={self.stride}"


class ShiftAttentionConv2d(_Geometry):
    """A convolution whose kernels attend to their taps, ever more sharply, until one is left.

    The kernel is S * W, with S = softmax(T A / std A) over the taps of each pair of channels and
    a temperature T that whoever trains it raises. In evaluation S is 1 where it is largest and 0
    elsewhere, as in the layer that ships. Source: G. B. Hacene, C. Lassance, V. Gripon,
    M. Courbariaux, Y. Bengio, ICPR 2020.

    Args:
        layer: the Conv2d to stand for, without groups or dilation, of an odd kernel; its weight
            and bias are taken over, as the very parameters they are.
        shared: the taps are the same for all outputs.
        temperature: T at the beginning.

    Raises:
        EditError: the layer is of another kind.
    """

    spec: ClassVar[Mapping[str, type]] = {"shared": bool, "temperature": float, "magnitude": bool}
    temperature: Tensor

    def __init__(self, layer: Any, *, shared: bool = False, temperature: float = 20.0) -> None:
        check_shiftable(layer)
        Keeps.__init__(self)
        self.inputs, self.outputs = layer.in_channels, layer.out_channels
        self.kernel_size, self.stride = layer.kernel_size, layer.stride
        self.padding_mode, self.around = layer.padding_mode, layer._reversed_padding_repeated_twice
        taps = math.prod(layer.kernel_size)
        self.weight, self.bias = layer.weight, layer.bias
        self.attention = nn.Parameter(torch.rand(1 if shared else self.outputs, self.inputs, taps))
        self.register_buffer("temperature", torch.tensor(float(temperature)))
        self.shared, self.magnitude = shared, False

    def shares(self) -> Tensor:
        """Return S, (outputs or 1, inputs, taps); it sums to 1 over the taps."""
        spread = self.attention.std(2, keepdim=True).clamp_min(EPS)
        return (self.temperature.to(spread) * self.attention / spread).softmax(2)

    def taps(self) -> Tensor:
        """Return the tap that is attended to most, (outputs or 1, inputs)."""
        return self.attention.argmax(2)

    def kernel(self) -> Tensor:
        """Return the kernel that it computes with, in its present mode."""
        count = self.attention.shape[2]
        chosen = self.shares() if self.training else one_hot(self.taps(), count, self.weight.dtype)
        return chosen.unflatten(2, self.kernel_size) * self.weight

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, H', W')."""
        kernel = self.kept(self.kernel, self.weight, self.attention)
        return self.convolved(x, kernel, self.bias)

    @classmethod
    def build(cls, layer: Any, spec: Mapping[str, Any]) -> ShiftAttentionConv2d:
        """Make it in the place of a convolution."""
        if not spec["temperature"] > 0:
            raise EditError(f"takes a temperature above 0, not {spec['temperature']}.")
        new = cls(layer, shared=spec["shared"], temperature=spec["temperature"])
        new.magnitude = spec["magnitude"]
        return new

    def fill(self, layer: Any) -> None:
        """Attend to the taps that are strong already, if that is asked for."""
        if self.magnitude:
            strong = layer.weight.abs().flatten(2)
            self.attention.copy_(strong.mean(0, keepdim=True) if self.shared else strong)

    @classmethod
    def predict(cls, before: LayerCost, spec: Mapping[str, Any]) -> LayerCost:
        """Return its cost: scores beside the weights, and the products of the convolution."""
        scores = math.prod(before.weight[1 if spec["shared"] else 0 :])
        size = before.bytes // before.params
        params = before.params + scores
        return replace(before, kind=cls.__name__, params=params, bytes=params * size + HEAT)


class ShiftConv2d(_Geometry):
    """A convolution with one weight for each pair of channels, and the tap at which it stands.

    That is a shift of the input and a product, k^2 times fewer than those of the convolution.
    Where all outputs share the taps of an input, it computes so: a shift of each channel, then a
    1 x 1 convolution. Else PyTorch has no kernel for it, and it computes by a convolution with
    zeros, whose kernel is kept between calls in evaluation: what it saves are weights in a file
    and arithmetic, not time.

    Args:
        layer: the attending layer to stand for.
    """

    spec: ClassVar[Mapping[str, type]] = {"shared": bool}
    index: Tensor

    def __init__(self, layer: ShiftAttentionConv2d) -> None:
        super().__init__(layer)
        self.shared, self.count = layer.shared, math.prod(layer.kernel_size)
        self.weight = nn.Parameter(torch.zeros_like(layer.weight[:, :, 0, 0]))
        self.bias = layer.bias
        shape = 1 if self.shared else self.outputs, self.inputs
        self.register_buffer("index", pack(torch.zeros(shape), self.bits))

    @property
    def bits(self) -> int:
        """Bits that name a tap."""
        return _bits(self.count)

    def taps(self) -> Tensor:
        """Return the tap of each pair of channels, (outputs or 1, inputs)."""
        rows, found = 1 if self.shared else self.outputs, self.index.long()
        if self.bits == HALF:  # by arithmetic that ONNX has too
            found = torch.stack([found % 16, found // 16], 1).flatten()[: rows * self.inputs]
        return found.view(rows, self.inputs)

    def kernel(self) -> Tensor:
        """Return the kernel of the convolution that computes the same, zeros and all."""
        chosen = one_hot(self.taps(), self.count, self.weight.dtype)
        return (chosen * self.weight[:, :, None]).unflatten(2, self.kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, H', W')."""
        if not self.shared:
            kernel = self.kept(self.kernel, self.weight, self.index)
            return self.convolved(x, kernel, self.bias)
        return F.conv2d(self.shifted(self.padded(x)), self.weight[:, :, None, None], self.bias)

    def shifted(self, x: Tensor) -> Tensor:
        """Return each channel of a padded input shifted by its tap, at the strides: no product."""
        sides = tuple(x.shape[2:])
        high, wide = (
            (size - kernel) // stride + 1
            for size, kernel, stride in zip(sides, self.kernel_size, self.stride, strict=True)
        )
        places = self.kept(lambda: self._places(sides, high, wide), self.index, key=sides)
        found = x.flatten(2).gather(2, places.expand(x.shape[0], -1, -1))
        return found.unflatten(2, (high, wide))

    def _places(self, sides: tuple[int, ...], high: int, wide: int) -> Tensor:
        """Say where in a padded channel each number of a shifted one stands, (inputs, numbers)."""
        rows, columns = (
            torch.arange(count, device=self.index.device) * stride
            for count, stride in zip((high, wide), self.stride, strict=True)
        )
        taps, across = self.taps()[0], self.kernel_size[1]
        start = taps // across * sides[1] + taps % across
        return (start[:, None, None] + rows[:, None] * sides[1] + columns).flatten(1)

    @property
    def numbers(self) -> int:
        """How many parameters it stands for besides its own: none."""
        return 0

    def macs(self, inputs: list[Tensor], outputs: list[Tensor]) -> int:
        """Count the products of one call: one for each pair of channels and position."""
        return outputs[0].numel() * self.inputs

    @classmethod
    def build(cls, layer: Any, spec: Mapping[str, Any]) -> ShiftConv2d:
        """Make it in the place of an attending layer."""
        if not isinstance(layer, ShiftAttentionConv2d) or layer.shared != spec["shared"]:
            raise EditError("must be a shift attention of the same sharing to become shifts.")
        return cls(layer)

    def fill(self, layer: ShiftAttentionConv2d) -> None:
        """Keep the taps that are attended to most, and their weights."""
        taps = layer.taps()
        self.index.copy_(pack(taps, self.bits))
        places = taps.expand(self.outputs, -1)[:, :, None]
        self.weight.copy_(layer.weight.flatten(2).gather(2, places)[:, :, 0])

    @classmethod
    def predict(cls, before: LayerCost, spec: Mapping[str, Any]) -> LayerCost:
        """Return its cost: a weight for each pair of channels, and the bits of the taps."""
        outputs, inputs, *kernel = before.weight
        taps = math.prod(kernel)
        rows = 1 if spec["shared"] else outputs
        biases = before.params - (outputs + rows) * inputs * taps
        size, params = (before.bytes - HEAT) // before.params, outputs * inputs + biases
        index = packed_bytes(rows * inputs, _bits(taps))
        return replace(
            before,
            kind=cls.__name__,
            params=params,
            macs=before.macs // taps,
            bytes=params * size + index,
            weight=(outputs, inputs),
        )


def one_hot(taps: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Return 1 at the taps and 0 elsewhere, (..., count)."""
    return (taps[..., None] == torch.arange(count, device=taps.device)).to(dtype)


def _bits(taps: int) -> int:
    return HALF if taps <= 16 else 2 * HALF


def check_shiftable(layer: Any) -> None:
    """Refuse what cannot become shifts, by a sentence that begins with the name of the layer."""
    plain = type(layer) is nn.Conv2d and layer.groups == 1 and layer.dilation == (1, 1)
    sizes = layer.kernel_size if plain else (1,)
    if not all(size % 2 for size in sizes) or math.prod(sizes) == 1 or math.prod(sizes) > 256:
        raise EditError(
            "must be a Conv2d of an odd kernel, larger than 1 x 1, without groups or dilation to "
            "become shifts."
        )
