"""A loss for maps that looks at the positions which are hard."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pliant.data.classes import maps_loss, maps_view
from pliant.data.sources import IGNORED
from pliant.errors import MethodError


@dataclass(frozen=True)
class Bootstrapped:
    """The mean cross-entropy of an image's hard positions: a loss to pass as ``loss=``.

    Where more than ``count`` losses are above the threshold, all of these count, else the
    ``count`` largest. An image with fewer known positions counts all of them, one with none
    has the loss 0.

    Args:
        count: K, least number of positions; the paper's 4096 is for a million pixels.
        threshold: of the loss of a position.
        void: a label that is no class; -100, -1 and 255 are none if it is not given.

    Raises:
        MethodError: the count is below 1.

    >>> scores, labels = torch.tensor([[[[0.0, 5.0]], [[0.0, 0.0]]]]), torch.tensor([[[0, 0]]])
    >>> Bootstrapped(count=1)(scores, (None, labels)).round(decimals=3)  # ln 2: the other is easy
    tensor(0.6930)
    """

    count: int = 4096
    threshold: float = 0.3
    void: int | None = None

    def __post_init__(self) -> None:
        if self.count < 1:
            raise MethodError(f"A bootstrapped loss needs a count from 1 on, not {self.count}.")

    def __call__(self, output: Any, batch: Any, reduction: str = "mean") -> Tensor:
        """Return the mean over images, or with "none" one loss for each."""
        losses = maps_loss(output, batch, "none", void=self.void)
        _, labels = maps_view(output, batch, 1, self.void)
        rows = [
            self._hard(row[known != IGNORED]) for row, known in zip(losses, labels, strict=True)
        ]
        found = torch.stack(rows)
        return found if reduction == "none" else found.mean()

    def _hard(self, losses: Tensor) -> Tensor:
        if not losses.numel():
            return losses.sum()
        top = losses.sort(descending=True).values
        least = min(self.count, len(top))
        return top[: max(least, int((top > self.threshold).sum()))].mean()
