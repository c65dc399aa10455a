"""A convolution in two steps: filters for every channel alone, then a mixture of channels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pliant.cost import LayerCost
from pliant.errors import EditError

_CONVS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Separable(nn.Module):
    """A depthwise separable convolution: some filters for each channel, and a pointwise layer.

    Source: L. Sifre and S. Mallat, "Rigid-motion scattering for texture classification", 2014.

    Args:
        layer: the convolution to stand for, without groups; its geometry and its bias are taken
            over, the bias as the very parameter it is.
        multiplier: filters for each input channel.
    """

    spec: ClassVar[Mapping[str, type]] = {"multiplier": int}

    def __init__(self, layer: Any, multiplier: int) -> None:
        super().__init__()
        kind, inputs = type(layer), layer.in_channels
        self.depth = kind(
            *(inputs, inputs * multiplier, layer.kernel_size, layer.stride, layer.padding),
            *(layer.dilation, inputs, False, layer.padding_mode),
        )
        self.point = kind(inputs * multiplier, layer.out_channels, 1, bias=False)
        self.point.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, ...) to (N, outputs, ...) as the convolution does."""
        out: Tensor = self.point(self.depth(x))
        return out

    @classmethod
    def build(cls, layer: Any, spec: Mapping[str, Any]) -> Separable:
        """Make it for a convolution.

        Raises:
            EditError: the layer is none, or has no such separable form.
        """
        if type(layer) not in _CONVS or layer.groups != 1:
            raise EditError("must be a convolution without groups to become separable.")
        most, multiplier = math.prod(layer.kernel_size), spec["multiplier"]
        if not 1 <= multiplier <= most:
            raise EditError(
                f"takes 1 to {most} filters for each channel, since a kernel has {most} weights, "
                f"not {multiplier}."
            )
        return cls(layer, multiplier)

    def fill(self, layer: Any) -> None:
        """Come as near to the kernel as can be, channel by channel, by least squared error."""
        weight = layer.weight.transpose(0, 1).flatten(2).double()  # (inputs, outputs, taps)
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        rank = self.depth.out_channels // self.depth.in_channels
        taken = min(rank, values.shape[1])
        mix = weight.new_zeros(*weight.shape[:2], rank)
        taps = weight.new_zeros(len(weight), rank, weight.shape[2])
        root = values[:, :taken].sqrt()
        mix[:, :, :taken] = left[:, :, :taken] * root[:, None]
        taps[:, :taken] = right[:, :taken] * root[:, :, None]
        self.depth.weight.copy_(taps.reshape(self.depth.weight.shape))
        self.point.weight.copy_(mix.transpose(0, 1).reshape(self.point.weight.shape))

    @classmethod
    def predict(cls, before: LayerCost, spec: Mapping[str, Any]) -> LayerCost:
        """Return its cost; both of its layers work at the positions of the output."""
        outputs, inputs, *kernel = before.weight
        dense = math.prod(before.weight)
        weights = spec["multiplier"] * inputs * (math.prod(kernel) + outputs)
        params = before.params - dense + weights
        return replace(
            before,
            kind=cls.__name__,
            params=params,
            macs=before.macs * weights // dense,
            bytes=before.bytes * params // before.params,
            weight=(),
        )
