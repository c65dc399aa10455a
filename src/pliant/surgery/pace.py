"""Multiplies the learning rates of an optimizer for the length of a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer


class Pace:
    """Lets an optimizer step at a multiple of its learning rates, which no schedule ever sees.

    Args:
        optimizer: of any kind that has a learning rate in its groups.
        factor: asked before every step.
    """

    def __init__(self, optimizer: Optimizer, factor: Callable[[], float]) -> None:
        self.optimizer, self.factor = optimizer, factor
        self._rates: list[Any] = []
        self._handles = [
            optimizer.register_step_pre_hook(self._raise),
            optimizer.register_step_post_hook(self._lower),
        ]

    def remove(self) -> None:
        """Leave the optimizer alone."""
        for handle in self._handles:
            handle.remove()

    def _raise(self, *_: Any) -> None:
        factor, groups = self.factor(), self.optimizer.param_groups
        self._rates = [group["lr"] for group in groups] if factor != 1 else []
        for group, rate in zip(groups, self._rates, strict=False):
            group["lr"] = rate * factor

    def _lower(self, *_: Any) -> None:
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=False):
            group["lr"] = rate
        self._rates = []
