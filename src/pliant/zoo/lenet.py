"""LeNet-5 for 28x28 digits, plain and with the extra convolution that NRMF was shown on."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LeNet5(nn.Module):
    """Classify 1x28x28 images with two 5x5 convolutions and three linear layers.

    With rectifiers and max pooling, as the network is trained today, it has 61,706 parameters.

    `wide=True` is the example of the NRMF paper (Ran et al., ICPR 2020): an extra 3x3
    convolution from 128 to 256 channels is inserted after the second one, which therefore gives
    128 channels instead of 16. The paper names only the inserted kernel; the rest is LeNet-5 as
    it was. The extra kernel sees 5x5 maps and gives 3x3 maps: 294,912 of the 602,266 weights
    and biases and more than half of the arithmetic, yet an epoch over a few thousand digits
    still takes seconds on two cores.

    Source: LeCun et al., "Gradient-based learning applied to document recognition", 1998.
    """

    def __init__(self, classes: int = 10, *, wide: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 128 if wide else 16, 5)
        self.extra = nn.Conv2d(128, 256, 3) if wide else None
        self.fc1 = nn.Linear(256 * 3 * 3 if wide else 16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 1, 28, 28) to logits (N, classes)."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        if self.extra is not None:
            x = F.relu(self.extra(x))
        x = torch.flatten(x, 1)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        out: Tensor = self.fc3(x)
        return out
