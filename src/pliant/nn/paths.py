"""Residual blocks divided into paths: each takes a share of the hidden channels.

The last product of a block sums over its hidden channels, so that the paths of all shares add up
to the block. Each path ends in a batch norm of its own, whose shift and mean begin as an equal
share of the block's: in evaluation that is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from pliant.errors import EditError
from pliant.nn.mobile import MBConv

COUNTER = 8  # bytes of the batch counter of a batch norm


class PaddedShortcut(nn.Module):
    """Every so many-th pixel, with channels of zeros before and behind.

    Args:
        stride: of the pixels.
        padding: channels on each side.
    """

    def __init__(self, stride: int, padding: int) -> None:
        super().__init__()
        self.stride, self.padding = stride, padding

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C + 2 padding, H / stride, W / stride)."""
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.padding, self.padding))


def hidden_norms(block: Any, paths: int = 1) -> int:
    """Count the batch norms of a block's hidden channels; 0 where it cannot be divided.

    Two has an inverted bottleneck that widens first and adds its input. One has a block of two
    convolutions, called conv1 and conv2, with batch norms bn1 and bn2 and a shortcut that is known:
    a module called ``downsample`` or ``shortcut``, or pixels padded by channels of zeros.

    Args:
        block: any module.
        paths: N; a block with fewer hidden channels cannot be divided.
    """
    if type(block) is MBConv:
        divisible = block.adds and len(block.layers) == 8 and _hidden(block) >= paths
        return 2 if divisible else 0
    names = {name for name, _ in block.named_children()}
    basic = {"conv1", "bn1", "conv2", "bn2"}
    rest = names - basic - {"downsample", "shortcut", "relu"}
    if not basic <= names or rest or not _plain(block):
        return 0
    known = "shortcut" in names or hasattr(block, "downsample") or hasattr(block, "padding")
    return 1 if known and _hidden(block) >= paths else 0


def _plain(block: Any) -> bool:
    """Say whether a block's layers are such as can be divided."""
    convs = type(block.conv1) is nn.Conv2d is type(block.conv2)
    norms = type(block.bn1) is nn.BatchNorm2d is type(block.bn2)
    return bool(
        convs and norms and block.conv1.groups == 1 == block.conv2.groups and block.bn1.affine
    )


def check_divisible(block: Any, paths: int, norms: int) -> None:
    """Refuse a block that is of another kind, or has fewer hidden channels than paths."""
    if hidden_norms(block) != norms:
        raise EditError("has a block of another kind than was said.")
    if _hidden(block) < paths:
        raise EditError(f"has a block of {_hidden(block)} hidden channels, too few for {paths}.")


def divided(block: Any, paths: int) -> tuple[list[nn.Module], nn.Module, nn.Module]:
    """Make the paths of a block from its shapes; return them, its shortcut and what follows.

    Args:
        block: of a kind that `hidden_norms` knows.
        paths: N.
    """
    made: list[nn.Module] = [_path(_layers(block), b - a) for a, b in _shares(block, paths)]
    if type(block) is MBConv:
        return made, nn.Identity(), nn.Identity()
    return made, _shortcut(block), nn.ReLU()


def fill_paths(block: Any, paths: Sequence[nn.Module]) -> None:
    """Give each path its share of what a block has learned."""
    layers = _layers(block)
    ends = [len(layers) - 2, len(layers) - 1]
    for path, share in zip(paths, _shares(block, len(paths)), strict=True):
        for at, (old, new) in enumerate(zip(layers, path.children(), strict=True)):
            for name, value in new.state_dict().items():
                value.copy_(_taken(old.state_dict()[name], name, share, len(paths), at in ends))


def _taken(own: Tensor, name: str, share: tuple[int, int], paths: int, last: bool) -> Tensor:
    """What a path takes of one tensor: its hidden channels, or its part of what is summed."""
    if own.dim() == 0:
        return own
    if not last:
        return own[slice(*share)]
    if own.dim() == 4:
        return own[:, slice(*share)]
    return own / paths if name in ("bias", "running_mean") else own


def reads(block: Any) -> int:
    """Count the channels that a block reads."""
    return int(_layers(block)[0].in_channels)


def _layers(block: Any) -> list[Any]:
    """The branch of a block, in order."""
    if type(block) is MBConv:
        return list(block.layers)
    return [block.conv1, block.bn1, nn.ReLU(), block.conv2, block.bn2]


def _shares(block: Any, paths: int) -> list[tuple[int, int]]:
    """Where the hidden channels of each path begin and end."""
    cuts = [_hidden(block) * number // paths for number in range(paths + 1)]
    return list(pairwise(cuts))


def _hidden(block: Any) -> int:
    return int(_layers(block)[0].out_channels)


def _path(layers: Sequence[Any], size: int) -> nn.Sequential:
    """The same layers with fewer hidden channels."""
    made: list[nn.Module] = []
    last = len(layers) - 2
    for at, layer in enumerate(layers):
        if isinstance(layer, nn.Conv2d):
            inputs, outputs = (layer.in_channels, size) if at == 0 else (size, size)
            outputs = layer.out_channels if at == last else outputs
            names = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
            geometry: Any = {name: getattr(layer, name) for name in names}
            groups, biased = (1 if layer.groups == 1 else size), layer.bias is not None
            made.append(nn.Conv2d(inputs, outputs, groups=groups, bias=biased, **geometry))
        elif isinstance(layer, nn.BatchNorm2d):
            width = layer.num_features if at > last else size
            made.append(nn.BatchNorm2d(width, layer.eps, layer.momentum))
        else:
            made.append(type(layer)())
    return nn.Sequential(*made)


def _shortcut(block: Any) -> nn.Module:
    for name in ("downsample", "shortcut"):
        if isinstance(found := getattr(block, name, None), nn.Module):
            return found
    if getattr(block, "padding", 0) or getattr(block, "stride", 1) != 1:
        return PaddedShortcut(block.stride, block.padding)
    return nn.Identity()
