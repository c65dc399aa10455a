"""DRAN: enlarges images by residual blocks whose skip connections every image weighs for itself.

Source: K. Park, J. W. Soh, N. I. Cho, ICPR 2020. Values of images lie in 0..1.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from pliant.errors import ModelError
from pliant.nn.dynamic import DynamicResidualTrunk, ResidualCoefficients


class DRAN(nn.Module):
    """Enlarges images two, three or four times.

    Args:
        scale: 2, 3 or 4.
        outputs: channels of the images that it gives.
        blocks: M.
        width: C, channels inside.
        inputs: channels of the images that it reads.

    Raises:
        ModelError: another scale.

    >>> sum(p.numel() for p in DRAN(2).parameters())
    1477205
    """

    def __init__(
        self,
        scale: Literal[2, 3, 4] = 2,
        outputs: int = 3,
        *,
        blocks: int = 16,
        width: int = 64,
        inputs: int = 3,
    ) -> None:
        super().__init__()
        if scale not in (2, 3, 4):
            raise ModelError(f"DRAN enlarges 2, 3 or 4 times, not {scale} times.")
        self.shallow = _conv(inputs, width)
        self.trunk = DynamicResidualTrunk(
            [_block(width) for _ in range(blocks)], ResidualCoefficients(inputs, blocks)
        )
        self.end = _conv(width, width)
        self.up = nn.Sequential()
        for factor in (2, 2) if scale == 4 else (scale,):
            self.up.append(_conv(width, width * factor**2))
            self.up.append(nn.PixelShuffle(factor))
        self.last = _conv(width, outputs)

    def forward(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """Map images (N, inputs, H, W) to (N, outputs, scale H, scale W).

        Args:
            x: the images; both sides of 4 pixels or more.
            weights: coefficients of the skip connections, such as those of a larger image of which
                these are tiles; computed from the images if None.
        """
        features = self.shallow(x)
        weights = self.trunk.coefficients(x) if weights is None else weights
        inner = features + self.end(self.trunk.mixed(features, weights))
        found: Tensor = self.last(self.up(inner))
        return found


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def _block(width: int) -> nn.Sequential:
    """Two convolutions, each with a rectifier before it whose slopes are learned."""
    return nn.Sequential(
        *(nn.PReLU(width, init=0.0), _conv(width, width)),
        *(nn.PReLU(width, init=0.0), _conv(width, width)),
    )
