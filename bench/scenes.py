"""Scenes to segment in which what a shape is lies far from it, and how well they are segmented."""

import torch
from torch import Tensor


def scenes(count: int, height: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw rectangles on the right whose class is the colour of a patch at the far left.

    Returns:
        images (count, 3, height, width) and classes (count, height, width): 0 is the ground.
    """
    draw = torch.Generator().manual_seed(seed)

    def drawn(below: int) -> int:
        return int(torch.randint(below, (), generator=draw))

    images = 0.1 * torch.randn(count, 3, height, width, generator=draw)
    masks, kind = torch.zeros(count, height, width, dtype=torch.long), torch.arange(count) % 3
    for number in range(count):
        top = drawn(height - 12)
        images[number, kind[number], top : top + 12, :12] += 2
        for _ in range(2):
            high, wide = 8 + drawn(12), 8 + drawn(12)
            y, x = drawn(height - high), width // 2 + drawn(width // 2 - wide)
            images[number, :, y : y + high, x : x + wide] += 1
            masks[number, y : y + high, x : x + wide] = 1 + kind[number]
    return images, masks


def mean_iou(found: Tensor, wanted: Tensor, classes: int) -> float:
    """Return the mean over classes of the pixels that both have over those that either has."""
    table = torch.bincount((wanted * classes + found).flatten(), minlength=classes**2)
    both = table.view(classes, classes).double()
    return float((both.diagonal() / (both.sum(0) + both.sum(1) - both.diagonal())).mean())
