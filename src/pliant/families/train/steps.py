"""Steps of a training on growing data: when they end, and what batch and rate they take."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Protocol

from torch import Tensor

from pliant.data import Epoch
from pliant.errors import MethodError
from pliant.run import Run


class Steps(Protocol):
    """What a method says about its steps; each sequence has one entry for each, or none."""

    @property
    def fractions(self) -> Sequence[float]:
        """Parts of the data."""

    @property
    def epochs(self) -> Sequence[float]:
        """How long they are."""

    @property
    def rule(self) -> str:
        """How batch and rate are found."""

    @property
    def batches(self) -> Sequence[int]:
        """Batches of the rule "given"."""

    @property
    def rates(self) -> Sequence[float]:
        """Factors of the learning rate of the same rule."""


def check_steps(plan: Steps) -> None:
    """Refuse steps that do not rise to all of the data, or of which too little is said.

    Raises:
        MethodError: they do not.
    """
    parts = plan.fractions
    rising, wrong = all(one < next for one, next in pairwise(parts)), ""
    if not parts or not rising or parts[-1] != 1:
        wrong = f"fractions that rise and end in 1, not {parts}"
    elif plan.epochs and len(plan.epochs) != len(parts):
        wrong = f"one number in epochs for each of {len(parts)} fractions, or none"
    elif plan.rule == "given" and not len(plan.batches) == len(plan.rates) == len(parts):
        wrong = "one number in batches and in rates for each fraction"
    if wrong:
        raise MethodError(f"progressive_stepwise needs {wrong}.")


def seen_in(run: Run) -> tuple[Epoch, int]:
    """Return the epoch that a run has just ended, and how many samples it went through."""
    assert run.epochs is not None and run.data is not None
    now = run.epochs[run.began[1] + run.epoch - 1]
    part = now.samples if isinstance(now.samples, Tensor) else None
    return now, run.data.rows() if part is None else len(part)


def step_of(shares: Sequence[float], epoch: Epoch) -> int:
    """Return the step of an epoch; the last epoch is always of the last step.

    Args:
        shares: of the training that each step takes, relative to one another.
        epoch: of the loop.
    """
    ends = list(accumulate(shares))
    past = (epoch.number + 1) / epoch.of * ends[-1]
    return next((i for i, end in enumerate(ends) if past <= end + 1e-9), len(ends) - 1)


def coupled(first: int, size: int, batch: int, *, most: int, noise: float) -> tuple[int, float]:
    """Return batch and factor of the rate of a step, for a given noise of the gradient.

    The noise is g = rate samples / batch, but for what momentum adds to it at every step.

    Args:
        first: samples of the first step.
        size: samples of this step.
        batch: of the first step.
        most: up to which the batch grows; the rate makes up for the rest.
        noise: of this step, in units of the first one's.
    """
    grown = max(batch, min(round(batch * size / first), most))
    return grown, noise * (grown / batch) * (first / size)
