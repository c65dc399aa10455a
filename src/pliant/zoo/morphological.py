"""The bottleneck network whose convolutions become additions and maxima, one after the other.

Source: E. Limonova, D. Alfonso, D. Nikolaev, V. V. Arlazarov, ICPR 2020; the form is the second of
He et al., "Identity mappings in deep residual networks", ECCV 2016.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pliant.edits import Swap


class Bottleneck(nn.Module):
    """Three convolutions, 1x1, 3x3 and 1x1, each behind a batch norm and a rectifier.

    Args:
        inputs: channels that it reads.
        middle: channels inside.
        outputs: channels that it gives.
        stride: of the first convolution, and of the shortcut's.
        bare: the first convolution reads the input as it is, which is behind a rectifier.
        project: the shortcut is a 1x1 convolution.
    """

    def __init__(
        self, inputs: int, middle: int, outputs: int, stride: int, *, bare: bool, project: bool
    ) -> None:
        super().__init__()
        first = nn.Conv2d(inputs, middle, 1, stride)
        self.reduce = nn.Sequential(first) if bare else _normed(inputs, first)
        self.middle = _normed(middle, nn.Conv2d(middle, middle, 3, padding=1))
        self.expand = _normed(middle, nn.Conv2d(middle, outputs, 1))
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride) if project else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        found: Tensor = self.expand(self.middle(self.reduce(x))) + self.shortcut(x)
        return found


class BMResNet(nn.Module):
    """Classifies images of 28x28 or 32x32 by 22 convolutions, all of them with a bias.

    Args:
        classes: number of logits.
        inputs: channels of the images.
        morphological: whether the convolutions are bipolar morphological ones.
    """

    def __init__(self, classes: int = 10, *, inputs: int = 3, morphological: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(inputs, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()
        )
        self.units = nn.Sequential()
        before = 16
        for stage, (middle, outputs) in enumerate(((16, 64), (64, 128), (128, 256))):
            for number in range(2):
                how = {"bare": len(self.units) == 0, "project": number == 0}
                stride = 2 if stage and not number else 1
                self.units.append(Bottleneck(before, middle, outputs, stride, **how))
                before = outputs
        self.end = nn.Sequential(nn.BatchNorm2d(before), nn.ReLU(), nn.AvgPool2d(7))
        self.linear = nn.Linear(before, classes)
        convolutions = [n for n, m in self.named_modules() if isinstance(m, nn.Conv2d)]
        for name in convolutions:
            nn.init.kaiming_normal_(self.get_parameter(f"{name}.weight"))
            if morphological:
                Swap(name, "morphological", {"shift": 0.1, "floor": 1e-6}).apply(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, inputs, H, W) to logits (N, classes)."""
        found: Tensor = self.linear(torch.flatten(self.end(self.units(self.stem(x))), 1))
        return found


def _normed(channels: int, conv: nn.Conv2d) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(), conv)
