"""FASSD-Net: segments images of streets in real time, in three sizes.

Source: L. Rosas-Arias, G. Benitez-Garcia, J. Portillo-Portillo, G. Sanchez-Perez, K. Yanai, ICPR
2020. Without its two modules it is a plain decoder of the same encoder, to compare with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.errors import ModelError
from pliant.nn.asymmetric import DAPF, MDA, HarDBlock, unit

Variant = Literal["full", "l1", "l2"]

STRIDES: dict[str, tuple[int, int, int, int]] = {
    "full": (2, 1, 2, 1),
    "l1": (3, 1, 2, 1),
    "l2": (2, 2, 2, 1),
}
"""Of the four convolutions of the stem."""

BLOCKS = ((10, 4), (16, 4), (18, 8), (24, 8))  # growth and layers
WIDTHS = (64, 96, 160, 224)  # of the pointwise layers behind the blocks
DILATIONS = (2, 4, 8)  # of the refinements, from the finest map on
NARROW = 64  # channels of a step of the small decoder


class Encoder(nn.Module):
    """Gives maps of four scales, each half as large as the one before.

    Args:
        strides: of the four convolutions of the stem.
    """

    def __init__(self, strides: Sequence[int] = STRIDES["full"]) -> None:
        super().__init__()
        sides = ((3, 16), (16, 24), (24, 32), (32, 48))
        self.stem = nn.Sequential(
            *(unit(*side, 3, stride) for side, stride in zip(sides, strides, strict=True))
        )
        self.blocks, self.moves, channels = nn.ModuleList(), nn.ModuleList(), 48
        self.skips: list[int] = []  # channels that the blocks give
        for (growth, layers), width in zip(BLOCKS, WIDTHS, strict=True):
            block = HarDBlock(channels, growth, layers)
            self.blocks.append(block)
            self.skips.append(block.outputs)
            self.moves.append(unit(block.outputs, width, 1))
            channels = width

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map images (N, 3, H, W) to maps of 48, 78, 160 and 224 channels, the finest first."""
        x, found = self.stem(x), []
        for number, (block, move) in enumerate(zip(self.blocks, self.moves, strict=True)):
            x = block(x)
            if number < len(self.blocks) - 1:
                found.append(x)
                x = F.avg_pool2d(move(x), 2)
            else:
                x = move(x)
        return [*found, x]


class Step(nn.Module):
    """One step of the decoder: enlarge, join with the skip, narrow, refine.

    Args:
        inputs: channels of the coarse map.
        skip: channels of the fine one.
        block: growth and layers of the last block; none for a single convolution.
        dilation: of the refinement; 0 for none.
    """

    def __init__(
        self, inputs: int, skip: int, block: tuple[int, int] | None, dilation: int
    ) -> None:
        super().__init__()
        half = (inputs + skip) // 2
        self.narrow = unit(inputs + skip, half, 1)
        self.refine = MDA(half, dilation) if dilation else nn.Identity()
        self.last = HarDBlock(half, *block) if block else unit(half, NARROW, 3)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Map (N, inputs, h, w) and (N, skip, H, W) to (N, outputs, H, W)."""
        x = torch.cat([_resize(x, skip), skip], 1)
        found: Tensor = self.last(self.refine(self.narrow(x)))
        return found


class FASSDNet(nn.Module):
    """Gives a score for every class at every pixel.

    Args:
        classes: of pixels.
        variant: "full", or "l1" and "l2", which see coarser maps and are faster.
        dilations: of the pyramid at the end of the encoder; smaller ones for small images.
        pyramid: whether it has that pyramid.
        refined: whether the steps of the decoder refine their maps.

    Raises:
        ModelError: there is no such variant.

    >>> sum(p.numel() for p in FASSDNet(19).parameters())
    2845351
    """

    def __init__(
        self,
        classes: int = 19,
        variant: Variant = "full",
        *,
        dilations: Sequence[int] = (12, 24, 36),
        pyramid: bool = True,
        refined: bool = True,
    ) -> None:
        super().__init__()
        if variant not in STRIDES:
            raise ModelError(f"FASSD-Net comes as {', '.join(STRIDES)}, not as {variant!r}.")
        self.encoder = Encoder(STRIDES[variant])
        channels, small = WIDTHS[-1], variant == "l2"
        self.pyramid = DAPF(channels, dilations=dilations) if pyramid else nn.Identity()
        self.steps = nn.ModuleList()
        for at in (2, 1, 0):
            skip = self.encoder.skips[at]
            block = None if small else BLOCKS[at]
            self.steps.append(Step(channels, skip, block, DILATIONS[at] if refined else 0))
            channels = NARROW if small else skip
        self.head = nn.Conv2d(channels, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to scores (N, classes, H, W)."""
        *skips, inner = self.encoder(x)
        inner = self.pyramid(inner)
        for step, skip in zip(self.steps, reversed(skips), strict=True):
            inner = step(inner, skip)
        return _resize(self.head(inner), x)


def _resize(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=True)
