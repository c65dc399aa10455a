"""Watches the first losses of a training, where a learning rate may destroy what a network knew."""

import math
import warnings
from collections.abc import Sequence
from typing import Any

from pliant.data import Train
from pliant.errors import AccuracyWarning, PliantError
from pliant.run import Run

STEPS = 20  # after the warmup: what is not lost by then goes by more than the learning rate
WINDOW = 5  # losses whose mean counts, since one batch says little
KNOWS = 0.5  # of the loss by chance: a network whose loss is above does not know much


def watched(train: Train, steps: int) -> int:
    """Return of how many steps the losses are watched."""
    return round(train.warmup * steps) + STEPS


def chance(run: Run, output: Any) -> float | None:
    """Return the loss of guessing, None where answers are no classes."""
    if run.task is None or run.task.name != "classification":
        return None
    try:
        classes = run.class_scores(output).shape[-1]
    except PliantError:
        return None
    return math.log(classes) if classes > 1 else None


def destroyed(losses: Sequence[float], guessing: float | None) -> float | None:
    """Return the loss to which a network has fallen that knew something; None if it has not.

    Args:
        losses: of the first steps, each before the weights move, so that the first is of the
            network as it came. One that is no number is the worst there is.
        guessing: the loss of guessing; where there is none, ten times the first loss counts.

    >>> destroyed([0.1, 0.2, 2.3, 2.4, 2.3, 2.2], math.log(10)) is not None
    True
    """
    if len(losses) < 3:
        return None
    first, now = losses[0], losses[1:][-WINDOW:]
    mean = sum(now) / len(now)
    if guessing is None:
        return mean if first > 0 and not mean <= 10 * first else None
    lost = first < KNOWS * guessing and not mean <= (first + guessing) / 2
    return mean if lost else None


def look(
    run: Run, losses: Sequence[float], guessing: float | None, rate: float, phase: str = "training"
) -> bool:
    """Warn, and note in the history, if this learning rate has destroyed what the network knew.

    Args:
        run: of the training.
        losses: of its first steps.
        guessing: the loss of guessing, None if it is not known.
        rate: the learning rate.
        phase: what the message calls the training.

    Returns:
        whether it was said, after which no more need be watched.
    """
    now = destroyed(losses, guessing)
    if now is None:
        return False
    said = (
        f"The learning rate ({rate:g}) is too high for what the network knew: within the first "
        f"{len(losses)} steps of the {phase} the loss rose from {losses[0]:.2g} to {now:.2g}; take "
        f"a tenth of it ({rate / 10:g}), or add a warmup or clip the gradient."
    )
    run.note(finding=said)
    warnings.warn(said, AccuracyWarning, stacklevel=3)
    return True
