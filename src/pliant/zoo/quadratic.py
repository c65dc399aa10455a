"""Networks of quadratic convolutions, and the same of plain ones.

Source: P. Mantini, S. K. Shah, ICPR 2020. Values of images lie in 0..1. They are large: a
quadratic layer has a matrix of the square of its patch for every output.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from pliant.nn.quadratic import QuadraticConv2d


class QuadraticAlexNet(nn.Sequential):
    """Four 3x3 convolutions and two linear layers for 3x32x32 images.

    Args:
        classes: number of logits.
        quadratic: whether the convolutions are quadratic, with ELU behind them in the place of
            ReLU.
    """

    def __init__(self, classes: int = 10, *, quadratic: bool = True) -> None:
        act = nn.ELU if quadratic else nn.ReLU
        layers: list[nn.Module] = []
        before = 3
        for width in (32, 64):
            for _ in range(2):
                layers += [_conv(before, width, quadratic=quadratic), act()]
                before = width
            layers += [nn.MaxPool2d(2), nn.Dropout(0.25)]
        dense = nn.Linear(64 * 8 * 8, 512), act(), nn.Dropout(0.5), nn.Linear(512, classes)
        super().__init__(*layers, nn.Flatten(), *dense)


class QuadraticBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, outputs, stride, quadratic=True)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv(outputs, outputs, quadratic=True)
        self.bn2 = nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        pointwise = (stride, stride)
        self.shortcut = (
            nn.Identity() if same else QuadraticConv2d(inputs, outputs, (1, 1), pointwise)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        out = self.bn2(self.conv2(F.elu(self.bn1(self.conv1(x)))))
        return F.elu(out + self.shortcut(x))


class QuadraticResNet(nn.Sequential):
    """ResNet-20 for 3x32x32 images, all of whose convolutions are quadratic.

    Args:
        classes: number of logits.
    """

    def __init__(self, classes: int = 10) -> None:
        blocks: list[nn.Module] = []
        before = 16
        for stage, width in enumerate((16, 32, 64)):
            for number in range(3):
                blocks.append(QuadraticBlock(before, width, 2 if stage and not number else 1))
                before = width
        stem = _conv(3, 16, quadratic=True), nn.BatchNorm2d(16), nn.ELU()
        end = nn.AvgPool2d(8), nn.Flatten(), nn.Linear(64, classes)
        super().__init__(*stem, *blocks, *end)
        nn.init.kaiming_normal_(end[-1].weight)


def _conv(inputs: int, outputs: int, stride: int = 1, *, quadratic: bool) -> nn.Module:
    if quadratic:
        return QuadraticConv2d(inputs, outputs, (3, 3), (stride, stride), (1, 1))
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1)
