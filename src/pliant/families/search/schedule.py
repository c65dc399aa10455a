"""What changes while a search goes on: temperatures, rates, what is helped or held back."""

from __future__ import annotations

import math

import torch

from pliant.families.search.bilevel import choices, mixed
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


def rising(run: Run, rate: float, *, after: float) -> float:
    """Return a rate that rises along half a cosine, from 0 to what is given.

    Args:
        run: whose step it is.
        rate: at the end of the training.
        after: share of the training that is over when it begins to rise.
    """
    done = run.step / run.steps if run.steps else 0.0
    share = max(0.0, done - after) / (1 - after)
    return max(rate * (1 + math.cos(math.pi * (1 + 0.5 * share))), 1e-12)


@torch.no_grad()
def fade(run: Run, favoured: str, prior: float, anneal: float, skip_dropout: float) -> None:
    """Set what helps one operation and holds skip connections back, for the next step.

    Args:
        run: whose step it is; without training there is neither.
        favoured: the operation that is helped.
        prior: what is added to its logits at first.
        anneal: share of the training after which nothing is added.
        skip_dropout: of the outputs of skip connections at first; falls to 0.
    """
    done = run.step / run.steps if run.steps else 1.0
    prior = prior * max(0.0, 1 - done / anneal) if anneal else 0.0
    for part in mixed(run.model).values():
        part.drop.fill_(skip_dropout * (1 - done))
        for place, name in enumerate(part.ops):
            part.prior[place] = prior if name == favoured else 0.0
