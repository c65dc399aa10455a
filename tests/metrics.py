"""The metric of a layer that reads smooth images."""

import torch
from torch import nn

from pliant.math.metric import Metric
from pliant.observe.moments import patches


def smooth(out: int, channels: int) -> Metric:
    """What 3x3 kernels see where neighbours are alike and channels correlated."""
    noise = torch.Generator().manual_seed(0)
    mix = torch.randn(channels, channels, generator=noise)
    images = torch.einsum("st,ntxy->nsxy", mix, torch.randn(256, channels, 12, 12, generator=noise))
    rows = patches(nn.Conv2d(channels, out, 3), nn.functional.avg_pool2d(images, 3, 1))
    return Metric(rows.T @ rows / len(rows), torch.eye(out))
