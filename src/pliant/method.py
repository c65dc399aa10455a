"""A method: frozen hyper-parameters and seven optional hooks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pliant.run import Run


@dataclass(frozen=True)
class Method:
    """A published way to make a network smaller.

    Fields are hyper-parameters; hooks do nothing unless overridden. A method keeps no state of
    its own: all that changes while compressing lives in the ``Run``.
    """

    def prepare(self, run: Run) -> None:
        """Before training: score, plan, insert masks, edit."""

    def loss(self, run: Run, loss: Tensor, output: Any, batch: Any) -> Tensor:
        """Change the loss where the outputs are needed (distillation)."""
        return loss

    def penalty(self, run: Run) -> Tensor | None:
        """Return a penalty on the weights; its gradient is added before the step."""
        return None

    def before_step(self, run: Run) -> None:
        """Gradients are complete: change them here."""

    def after_step(self, run: Run) -> None:
        """Weights have moved: project, shrink, re-mask, count."""

    def after_epoch(self, run: Run) -> None:
        """One pass over the data is over."""

    def finalize(self, run: Run) -> None:
        """Make it permanent; leave plain modules only."""


HOOKS = ("prepare", "loss", "penalty", "before_step", "after_step", "after_epoch", "finalize")
"""The names of the hooks, in the order in which a run calls them."""


def uses(method: object, hook: str) -> bool:
    """Say whether a method, or any part of a composed one, overrides a hook."""
    parts = getattr(method, "parts", None)
    if parts is not None:
        return any(uses(part, hook) for part in parts)
    return getattr(type(method), hook) is not getattr(Method, hook)
