"""What changes while a search goes on: the temperature of the shares."""

from __future__ import annotations

import torch

from pliant.families.search.bilevel import choices
from pliant.run import Run


def anneal(run: Run, start: float, end: float, *, after: float = 0.0) -> None:
    """Set the temperature of all layers with candidates: it falls exponentially, step by step.

    Args:
        run: whose step it is.
        start: until the share `after` of the training is over.
        end: when it is over; without training too.
        after: of the training.
    """
    done = run.step / run.steps if run.steps else 1.0
    share = max(0.0, done - after) / (1 - after)
    temper(run, start * (end / start) ** min(1.0, share))


@torch.no_grad()
def temper(run: Run, value: float) -> None:
    """Set the temperature of all layers with candidates."""
    for part in choices(run.model).values():
        part.temperature.fill_(value)
