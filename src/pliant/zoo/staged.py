"""Residual networks whose stages have depths of their own, for 32x32 images.

Source: Jordao et al., "Stage-wise neural architecture search", ICPR 2020: convolutions have
biases, and a strided block has a pointwise projection without batch norm. The sum of a block goes
through a module of its own, so that it can be seen before it is rectified.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.errors import ModelError


class StagedBlock(nn.Module):
    """Two 3x3 convolutions, and a shortcut that is projected where shapes change."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        branch = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        out: Tensor = self.relu(branch + self.shortcut(x))
        return out


class StagedResNet(nn.Module):
    """Classifies images by stages of residual blocks; all stages but the first halve the sides.

    Args:
        depths: blocks of each stage.
        widths: channels of each stage.
        classes: number of logits.
        inputs: channels of the images.

    Raises:
        ModelError: depths and widths are not alike, or none.
    """

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 2),
        widths: Sequence[int] = (16, 32, 64),
        classes: int = 10,
        inputs: int = 3,
    ) -> None:
        super().__init__()
        if len(depths) != len(widths) or not depths or min(*depths, *widths) < 1:
            raise ModelError(
                f"A staged network needs a depth and a width from 1 on for each of its stages, "
                f"not {tuple(depths)} and {tuple(widths)}."
            )
        self.stem = nn.Sequential(
            nn.Conv2d(inputs, widths[0], 3, padding=1), nn.BatchNorm2d(widths[0]), nn.ReLU()
        )
        self.stages = nn.ModuleList()
        before = widths[0]
        for number, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            first = StagedBlock(before, width, 2 if number else 1)
            rest = (StagedBlock(width, width, 1) for _ in range(depth - 1))
            self.stages.append(nn.Sequential(first, *rest))
            before = width
        self.linear = nn.Linear(before, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, inputs, H, W) to logits (N, classes)."""
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        out: Tensor = self.linear(torch.mean(x, (2, 3)))
        return out
