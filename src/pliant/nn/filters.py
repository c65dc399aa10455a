"""What the filters of a layer are: how many, how large, how they lie in its kernel."""

from __future__ import annotations

from typing import Any, TypedDict

from torch import nn
from torch.nn.modules.conv import _ConvNd

WEIGHTED = (_ConvNd, nn.Linear)  # one kernel each, made of filters


class Layout(TypedDict):
    """How filters lie in a kernel, as `pliant.math.filters` asks for it."""

    transposed: bool
    groups: int


def filter_layout(layer: Any) -> Layout:
    """Say how the filters of a convolution or Linear lie in its kernel."""
    transposed, groups = getattr(layer, "transposed", False), getattr(layer, "groups", 1)
    return Layout(transposed=bool(transposed), groups=int(groups))


def filter_count(layer: Any) -> int:
    """Count the filters of a layer: its output channels."""
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)


def filter_size(layer: Any) -> int:
    """Count the weights of one filter."""
    return int(layer.weight.numel() // filter_count(layer))
