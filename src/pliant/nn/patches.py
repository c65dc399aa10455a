"""Layers that read the patches of a convolution, and make something else of them than its sums."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

Around = Literal["zeros", "reflect", "replicate", "circular"]


class Patches(nn.Module):
    """Knows where the patches of a convolution lie.

    Args:
        like: a convolution without groups that reads the same patches.
        outputs: channels that the layer gives.
        padding: zeros around, or "same", as it was asked for.
    """

    def __init__(self, like: nn.Conv2d, outputs: int, padding: tuple[int, int] | str) -> None:
        super().__init__()
        self.inputs, self.outputs, self.padding = like.in_channels, outputs, padding
        self.kernel_size, self.stride, self.dilation = like.kernel_size, like.stride, like.dilation
        self.padding_mode, self.around = like.padding_mode, like._reversed_padding_repeated_twice

    def padded(self, x: Tensor) -> Tensor:
        """Return an input with what lies around it."""
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(x, self.around, mode=mode)

    def patches(self, x: Tensor) -> Tensor:
        """Return the patches of a padded input as columns, (N, numbers of a patch, places)."""
        return F.unfold(x, self.kernel_size, self.dilation, 0, self.stride)

    def size(self, x: Tensor) -> tuple[int, int]:
        """Return the height and width of what is given for a padded input."""
        high, wide = (
            (x.shape[2 + axis] - self.dilation[axis] * (self.kernel_size[axis] - 1) - 1)
            // self.stride[axis]
            + 1
            for axis in (0, 1)
        )
        return high, wide
