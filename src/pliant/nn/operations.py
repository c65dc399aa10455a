"""The operations that an edge of a cell can hold, by name.

Source: Liu et al., "DARTS: Differentiable architecture search", ICLR 2019. An operation maps
(N, C, H, W) to (N, C, H / stride, W / stride), rounded up; with weights it begins with a ReLU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.errors import ModelError

NONE, SKIP = "none", "skip_connect"

Factory = Callable[[int, int, bool], nn.Module]


class Zero(nn.Module):
    """No connection: zeros of the shape that another operation would give."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to zeros (N, C, H / stride, W / stride)."""
        return x[:, :, :: self.stride, :: self.stride] * 0.0


class FactorizedReduction(nn.Module):
    """Halves the sides: two 1x1 convolutions on grids one pixel apart, each with half the channels.

    Args:
        inputs: channels in.
        outputs: channels out, an even number.
        affine: whether the batch norm scales and shifts.
    """

    def __init__(self, inputs: int, outputs: int, *, affine: bool) -> None:
        super().__init__()
        if outputs % 2:
            raise ModelError(
                f"A factorized reduction needs an even number of channels, not {outputs}."
            )
        self.even = nn.Conv2d(inputs, outputs // 2, 1, stride=2, bias=False)
        self.odd = nn.Conv2d(inputs, outputs // 2, 1, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(outputs, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, H / 2, W / 2); odd sides are padded by zeros."""
        x = F.relu(x)
        shifted = F.pad(x[:, :, 1:, 1:], (0, 1, 0, 1))
        out: Tensor = self.norm(torch.cat((self.even(x), self.odd(shifted)), dim=1))
        return out


def mix_channels(inputs: int, outputs: int, *, affine: bool) -> nn.Sequential:
    """Make ReLU, 1x1 convolution and batch norm: what fits an input to a cell's channels."""
    return nn.Sequential(
        nn.ReLU(), nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs, affine=affine)
    )


def _pool(kind: str, channels: int, stride: int) -> nn.Sequential:
    pools: dict[str, nn.Module] = {
        "max": nn.MaxPool2d(3, stride, padding=1),
        "avg": nn.AvgPool2d(3, stride, padding=1, count_include_pad=False),
    }
    return nn.Sequential(pools[kind], nn.BatchNorm2d(channels, affine=False))


def _skip(channels: int, stride: int, affine: bool) -> nn.Module:
    if stride == 1:
        return nn.Identity()
    return FactorizedReduction(channels, channels, affine=affine)


def _separable(
    channels: int, side: int, stride: int, affine: bool, *, dilation: int = 1
) -> list[nn.Module]:
    """ReLU, a filter per channel, a 1x1 convolution over channels, batch norm."""
    reach = dilation * (side // 2)
    return [
        nn.ReLU(),
        nn.Conv2d(
            *(channels, channels, side, stride, reach, dilation), groups=channels, bias=False
        ),
        nn.Conv2d(channels, channels, 1, bias=False),
        nn.BatchNorm2d(channels, affine=affine),
    ]


def _sep(side: int) -> Factory:
    return lambda channels, stride, affine: nn.Sequential(
        *_separable(channels, side, stride, affine), *_separable(channels, side, 1, affine)
    )


def _dil(side: int) -> Factory:
    return lambda channels, stride, affine: nn.Sequential(
        *_separable(channels, side, stride, affine, dilation=2)
    )


OPERATIONS: dict[str, Factory] = {
    NONE: lambda channels, stride, affine: Zero(stride),
    "max_pool_3x3": lambda channels, stride, affine: _pool("max", channels, stride),
    "avg_pool_3x3": lambda channels, stride, affine: _pool("avg", channels, stride),
    SKIP: _skip,
    "sep_conv_3x3": _sep(3),
    "sep_conv_5x5": _sep(5),
    "dil_conv_3x3": _dil(3),
    "dil_conv_5x5": _dil(5),
}
"""Makes an operation from channels, stride and whether its batch norms scale and shift."""


def operation(name: str, channels: int, stride: int, *, affine: bool) -> nn.Module:
    """Make an operation by its name.

    Raises:
        ModelError: there is none of this name.
    """
    if name not in OPERATIONS:
        raise ModelError(
            f"There is no operation {name!r} for a cell: choose from {', '.join(OPERATIONS)}."
        )
    return OPERATIONS[name](channels, stride, affine)
