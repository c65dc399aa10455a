"""Samples of an architecture: noise that makes mixtures nearly one-hot, and paths that run alone.

The noise has Gumbel's distribution, so the largest noisy logit is a sample of the probabilities,
and the two largest are two distinct ones. It lies in buffers of the network: a run that resumes
goes on with the sample it had.
"""

from __future__ import annotations

import torch

from pliant.families.search.bilevel import Gates, mixed
from pliant.nn.operations import SKIP
from pliant.run import Run

TINY = 1e-20  # keeps logarithms of numbers drawn from 0..1 finite


def alone(run: Run) -> None:
    """Let every mixed operation run one candidate at a time."""
    for part in mixed(run.model).values():
        part.single = True


@torch.no_grad()
def draw(run: Run) -> None:
    """Draw a sample of every mixed operation, from the run's generator."""
    for part in mixed(run.model).values():
        flat = torch.rand(len(part.noise), generator=run.generator)
        part.noise.copy_(-(-(flat + TINY).log() + TINY).log())


def full(run: Run, *, skips_learn: bool = True) -> Gates:
    """Let the gates of all candidates learn.

    Args:
        run: whose mixed operations run alone.
        skips_learn: whether an operation learns where the sample is its skip connection.
    """
    found = {}
    for name, part in mixed(run.model).items():
        frozen = not skips_learn and part.names[part.place()] == SKIP
        found[name] = () if frozen else tuple(range(len(part.names)))
    return found


def pairs(run: Run) -> Gates:
    """Let the gates of two sampled candidates of every operation learn: the first of them runs."""
    return {
        name: tuple((part.logits + part.noise).topk(2).indices.tolist())
        for name, part in mixed(run.model).items()
    }
