"""Wrong labels of a known rate, to try methods that can do with them."""

from typing import Literal

import torch
from torch import Tensor


def noisy_labels(
    labels: Tensor,
    rate: float,
    classes: int,
    kind: Literal["symmetric", "pair"] = "symmetric",
    *,
    seed: int = 0,
) -> Tensor:
    """Return labels of which some are wrong.

    Args:
        labels: whole numbers below ``classes``, of any shape.
        rate: probability of a wrong label, in 0..1.
        classes: how many there are, at least 2.
        kind: "symmetric" draws one of the other classes, all alike; "pair" takes the next one.
        seed: of the choice.

    >>> noisy_labels(torch.tensor([0, 1, 2]), 1.0, 3, "pair")
    tensor([1, 2, 0])
    """
    random = torch.Generator().manual_seed(seed)
    wrong = torch.rand(labels.shape, generator=random) < rate
    step = torch.randint(1, classes, labels.shape, generator=random)
    step = torch.ones_like(step) if kind == "pair" else step
    return torch.where(wrong.to(labels.device), (labels + step.to(labels)) % classes, labels)
