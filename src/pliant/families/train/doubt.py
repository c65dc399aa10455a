"""How far samples believe in their labels, and which of them count for it."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from pliant.data.criterion import classes_second
from pliant.errors import DataError
from pliant.math.margins import LOW, WIDTH, MarginHistogram, bins_of
from pliant.observe.outputs import logits
from pliant.run import Run


def seen(run: Run, window: int, values: Tensor) -> MarginHistogram:
    """Return the histogram of a run with the margins of a batch in it.

    Args:
        run: whose state holds it.
        window: batches that it holds.
        values: margins of this batch.
    """
    counts = run.state["counts"].to(values.device)
    histogram = MarginHistogram(window, counts, run.state["batches"])
    histogram.update(values)
    run.state.update(counts=counts, batches=histogram.seen)
    return histogram


def estimated(histogram: MarginHistogram, past: float, sure: float, last: float) -> float:
    """Return the share of margins below a bound that rises from -1 to 0.

    Args:
        histogram: of the last batches.
        past: how far the bound has risen, 0 to 1.
        sure: mean |margin| from which on, at 0, the share stays what it was.
        last: what it was.
    """
    if past == 1 and histogram.confidence() >= sure:
        return last
    return float(histogram.cdf()[bins_of(torch.tensor(past - 1.0))])


def weights_of(each: Tensor, known: Tensor, threshold: int | None, softness: float) -> Tensor:
    """Return a weight for every sample by its margin; one of those with a label always counts.

    Args:
        each: margins (N, ...).
        known: which have a label; the others weigh 0.
        threshold: bin from which on samples count; None: all do.
        softness: 0 for weights of 0 or 1; else the width of the sigmoid between them.
    """
    if threshold is None:
        return known.double()
    if softness:
        weights = torch.sigmoid((each - (LOW + threshold * WIDTH)) / softness)
    else:
        weights = (bins_of(each) >= threshold).to(each)
    if not bool((weights[known] > 0).any()):
        weights = (each == each[known].max()).to(weights)
    return weights.where(known, 0)


def warn_unfilled(window: int, batches: int) -> None:
    """Warn that a histogram was never full."""
    warnings.warn(
        f"p_diff left nothing out: its histogram was to hold {window} batches, but "
        f"the training had {batches}: set window to fewer.",
        stacklevel=3,
    )


def scores_of(output: Any, labels: Any, losses: Tensor) -> tuple[Tensor, Tensor]:
    """Return scores (N, C, ...) and labels (N, ...).

    Raises:
        DataError: there is no class number for each loss, or only one class.
    """
    scores = logits(output)
    if isinstance(labels, Tensor) and not labels.is_floating_point():
        scores = classes_second(scores, labels)
        if (
            scores.dim() == labels.dim() + 1
            and scores.shape[1] > 1
            and losses.shape == labels.shape
        ):
            return scores, labels
    raise DataError(
        "p_diff compares the probability of a label with those of other classes: it needs scores "
        f"of two classes or more and one class number for each loss, not {tuple(scores.shape)}."
    )
