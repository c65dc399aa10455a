"""VGG with batch normalization for 32x32 images.

Source: Simonyan & Zisserman, "Very deep convolutional networks", ICLR 2015, configurations D
and E, with the classifier that pruning papers use on CIFAR: 512, batch norm, classes. VGG-16 has
14,987,722 parameters and 313.46M multiply-accumulates; papers print 14.98M and 313.73M, since
their counter takes an addition for a multiply-accumulate too.
"""

import torch
from torch import Tensor, nn

_PLANS: dict[int, tuple[int, ...]] = {  # channels of the convolutions, 0 is 2x2 max pooling
    16: (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0),
    19: (64, 64, 0, 128, 128, 0, *[256] * 4, 0, *[512] * 4, 0, *[512] * 4, 0),
}


class VGG(nn.Module):
    """Classify 3x32x32 images by a plain stack of 3x3 convolutions.

    Args:
        depth: 16 or 19 layers.
        classes: number of logits.
        width: every channel count is multiplied by it; 0.5 has a quarter of the parameters.
    """

    def __init__(self, depth: int = 16, classes: int = 10, *, width: float = 1.0) -> None:
        super().__init__()
        plan = [max(1, round(channels * width)) if channels else 0 for channels in _PLANS[depth]]
        self.features = nn.Sequential(*_features(plan))
        last = plan[-2]
        self.classifier = nn.Sequential(
            nn.Linear(last, last), nn.BatchNorm1d(last), nn.ReLU(), nn.Linear(last, classes)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, 32, 32) to logits (N, classes)."""
        out: Tensor = self.classifier(torch.flatten(self.features(x), 1))
        return out


def _features(plan: list[int]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    inputs = 3
    for channels in plan:
        if not channels:
            layers.append(nn.MaxPool2d(2))
            continue
        conv = nn.Conv2d(inputs, channels, 3, padding=1, bias=False)  # batch norm has the bias
        layers += [conv, nn.BatchNorm2d(channels), nn.ReLU()]
        inputs = channels
    return layers
