"""Gates over channels and places, and a light residual: operations that begin as next to nothing.

Each maps (N, channels, H, W) to the same shape. A gate is a sigmoid whose argument begins as a
constant, so that all features are multiplied by one number just below 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pliant.cost import LayerCost
from pliant.errors import EditError

OPEN = 4.0  # where a single gate begins: its sigmoid is 0.982
WIDER = 5.0  # where each of two gates begins: the product of both is 0.987
LEAST = 4  # hidden features: fewer tell channels apart no more
SIDE = 7  # of the kernel that looks at places

_SQUEEZED: Mapping[str, type] = {"channels": int, "reduction": int}


class SqueezeExcite(nn.Module):
    """Multiplies every channel by a gate that is computed from the means of all.

    Source: Hu, Shen and Sun, "Squeeze-and-excitation networks", CVPR 2018.
    """

    spec: ClassVar[Mapping[str, type]] = _SQUEEZED

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        hidden = _hidden(channels, reduction)
        self.squeeze = nn.Linear(channels, hidden, bias=False)
        self.excite = _constant(nn.Linear(hidden, channels), OPEN)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels, H, W) to the same shape."""
        gate: Tensor = self.excite(self.squeeze(x.mean((2, 3))).relu()).sigmoid()
        return x * gate[:, :, None, None]

    @classmethod
    def build(cls, layer: Any, spec: Mapping[str, Any]) -> SqueezeExcite:
        """Make it."""
        return cls(spec["channels"], spec["reduction"])

    @classmethod
    def predict(cls, before: LayerCost, spec: Mapping[str, Any]) -> LayerCost:
        """Two small layers for each sample, one of them with a bias."""
        channels = _matching(before, spec)
        weights = 2 * channels * _hidden(channels, spec["reduction"])
        return _row(cls, before, weights + channels, weights)


class EfficientAttention(nn.Module):
    """Multiplies every channel by a gate that is computed from the means of its neighbours.

    Source: Wang et al., "ECA-Net: efficient channel attention", CVPR 2020.
    """

    spec: ClassVar[Mapping[str, type]] = {"channels": int}

    def __init__(self, channels: int) -> None:
        super().__init__()
        reach = _reach(channels)
        self.near = _constant(nn.Conv1d(1, 1, reach, padding=reach // 2), OPEN)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels, H, W) to the same shape."""
        gate: Tensor = self.near(x.mean((2, 3))[:, None]).sigmoid()
        return x * gate[:, 0, :, None, None]

    @classmethod
    def build(cls, layer: Any, spec: Mapping[str, Any]) -> EfficientAttention:
        """Make it."""
        _hidden(spec["channels"], 1)
        return cls(spec["channels"])

    @classmethod
    def predict(cls, before: LayerCost, spec: Mapping[str, Any]) -> LayerCost:
        """One short kernel along the channels."""
        channels = _matching(before, spec)
        return _row(cls, before, _reach(channels) + 1, _reach(channels) * channels)


class BlockAttention(nn.Module):
    """A gate over channels, from their means and maxima, and then one over places.

    Source: Woo et al., "CBAM: convolutional block attention module", ECCV 2018.
    """

    spec: ClassVar[Mapping[str, type]] = _SQUEEZED

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        hidden = _hidden(channels, reduction)
        self.squeeze = nn.Linear(channels, hidden, bias=False)
        self.excite = _constant(nn.Linear(hidden, channels), WIDER / 2)  # two are added
        self.place = _constant(nn.Conv2d(2, 1, SIDE, padding=SIDE // 2), WIDER)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels, H, W) to the same shape."""
        both = [self._excited(x.mean((2, 3))), self._excited(x.amax((2, 3)))]
        x = x * (both[0] + both[1]).sigmoid()[:, :, None, None]
        seen = torch.cat((x.mean(1, keepdim=True), x.amax(1, keepdim=True)), dim=1)
        gate: Tensor = self.place(seen).sigmoid()
        return x * gate

    def _excited(self, features: Tensor) -> Tensor:
        found: Tensor = self.excite(self.squeeze(features).relu())
        return found

    @classmethod
    def build(cls, layer: Any, spec: Mapping[str, Any]) -> BlockAttention:
        """Make it."""
        return cls(spec["channels"], spec["reduction"])

    @classmethod
    def predict(cls, before: LayerCost, spec: Mapping[str, Any]) -> LayerCost:
        """Two small layers that are called twice, and a kernel at every place."""
        channels, taps = _matching(before, spec), 2 * SIDE**2
        weights = 2 * channels * _hidden(channels, spec["reduction"])
        macs = 2 * weights + taps * math.prod(before.output[1:])
        return _row(cls, before, weights + channels + taps + 1, macs)


class DepthwiseResidual(nn.Module):
    """x plus a rectifier, a filter for each channel and a batch norm that begins with zeros."""

    spec: ClassVar[Mapping[str, type]] = {"channels": int}

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels, H, W) to the same shape."""
        branch: Tensor = self.norm(self.conv(x.relu()))
        return x + branch

    @classmethod
    def build(cls, layer: Any, spec: Mapping[str, Any]) -> DepthwiseResidual:
        """Make it."""
        _hidden(spec["channels"], 1)
        return cls(spec["channels"])

    @classmethod
    def predict(cls, before: LayerCost, spec: Mapping[str, Any]) -> LayerCost:
        """Nine weights for each channel, and a batch norm with its statistics."""
        channels = _matching(before, spec)
        row = _row(cls, before, 11 * channels, 9 * channels * math.prod(before.output[1:]))
        return replace(row, bytes=row.bytes + 2 * channels * before.itemsize + 8)


def _hidden(channels: int, reduction: int) -> int:
    if channels < 1 or reduction < 1:
        raise EditError(f"needs channels and a reduction from 1 on, not {channels}, {reduction}.")
    return max(LEAST, channels // reduction)


def _reach(channels: int) -> int:
    """The odd number next to half of the binary logarithm of the channels and a half."""
    reach = int(math.log2(channels) / 2 + 0.5)
    return reach if reach % 2 else reach + 1


def _constant(layer: Any, value: float) -> Any:
    nn.init.zeros_(layer.weight)
    nn.init.constant_(layer.bias, value)
    return layer


def _matching(before: LayerCost, spec: Mapping[str, Any]) -> int:
    channels = int(spec["channels"])
    if len(before.output) != 3 or before.output[0] != channels:
        raise EditError(f"gives {before.output}, where maps of {channels} channels were to come.")
    return channels


def _row(kind: type, before: LayerCost, params: int, macs: int) -> LayerCost:
    return replace(
        before,
        kind=kind.__name__,
        params=params,
        macs=macs * before.calls,
        bytes=params * before.itemsize,
        weight=(),
        input=before.output,
        parts=(),
    )
