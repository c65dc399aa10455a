"""Multiplies the learning rates of an optimizer for the length of a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer


class Pace:
    """Lets an optimizer step at a multiple of its learning rates, which no schedule ever sees.

    Args:
        optimizer: of any kind that has learning rates in its groups.
        factor: asked before every step.
    """

    def __init__(self, optimizer: Optimizer, factor: Callable[[], float]) -> None:
        self.optimizer, self.factor = optimizer, factor
        self._rates: list[tuple[dict[str, Any], Any, Any]] = []  # group, its rate, that of the step
        self._handles = [
            optimizer.register_step_pre_hook(lambda *_: self._multiply()),
            optimizer.register_step_post_hook(lambda *_: self._put_back()),
        ]

    @property
    def at_work(self) -> bool:
        """Whether the optimizer is within a step, and its rates are those of the step."""
        return bool(self._rates)

    def remove(self) -> None:
        """Leave the optimizer alone."""
        self._put_back()
        for handle in self._handles:
            handle.remove()

    def _multiply(self) -> None:
        self._put_back()  # what a step that failed has left
        factor = self.factor()
        for group in self.optimizer.param_groups if factor != 1 else ():
            self._rates.append((group, group["lr"], group["lr"] * factor))
            group["lr"] = self._rates[-1][2]

    def _put_back(self) -> None:
        for group, rate, quick in self._rates:
            if group["lr"] is quick:  # nobody has set another one
                group["lr"] = rate
        self._rates.clear()
