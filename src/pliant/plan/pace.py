"""How a training divides into search and fine-tuning: what options that are None follow.

Methods name a usual share of the training, number of cuts or interval, which are made for trainings
of some hundred steps. Where a training has fewer, these give way, by one rule for all methods:

- the last cut leaves at least 100 steps for fine-tuning, or 60 % of the training if that is less;
- two cuts lie at least 10 steps apart, so that there may be fewer of them;
- what is done every few steps is done at least five times in a search.

An option that was written is obeyed, whatever the number of steps. That number is the planned one,
so a training that is resumed goes the same way.
"""

from __future__ import annotations

FINETUNE = 100  # steps behind the last cut
LEAST = 0.6  # share of a short training that is as good
APART = 10  # steps between two cuts
ACTIONS = 5  # in a search


def until(written: float | None, usual: float, steps: int) -> float:
    """Return the share of the training at which the last cut is made, or a search ends.

    Args:
        written: the option; None follows the steps.
        usual: the share in a training that is long enough.
        steps: of the whole training; 0 without training.

    >>> until(None, 0.8, 1000), until(None, 0.8, 200), until(None, 0.8, 50), until(0.7, 0.8, 50)
    (0.8, 0.5, 0.4, 0.7)
    """
    if written is not None:
        return written
    return min(usual, 1 - min(FINETUNE / steps, LEAST)) if steps else usual


def cuts(written: int | None, usual: int, steps: float) -> int:
    """Return how many cuts are made in so many steps, one of them at the end.

    >>> cuts(None, 10, 154), cuts(None, 10, 20), cuts(10, 10, 20)
    (10, 2, 10)
    """
    if written is not None:
        return written
    return max(1, min(usual, int(steps / APART + 1e-9)))


def every(written: int | None, usual: int, steps: int) -> int:
    """Return how many steps lie between two actions of a search of so many steps.

    >>> every(None, 20, 500), every(None, 20, 20), every(20, 20, 20)
    (20, 4, 20)
    """
    if written is not None:
        return written
    return max(1, min(usual, steps // ACTIONS))
