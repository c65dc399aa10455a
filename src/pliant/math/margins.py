"""How surely a label is the most probable one, and a histogram of that over recent batches."""

from __future__ import annotations

import torch
from torch import Tensor

BINS, LOW, HIGH = 220, -1.1, 1.1  # of the histogram: bins of 0.01 and one more at the end
WIDTH = (HIGH - LOW) / BINS
ROUNDING = 1e-4  # of a bin, so that a margin at its lower end is within it


def margins(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the probability of the label minus that of the most probable other class.

    Args:
        scores: logits (N, C, ...) of at least two classes.
        labels: whole numbers below C, (N, ...).

    Returns:
        (N, ...), in -1..1; no gradient.
    """
    shares = scores.detach().float().softmax(1)
    own = labels[:, None]
    others = shares.scatter(1, own, -1.0).amax(1)
    return shares.gather(1, own)[:, 0] - others


def bins_of(values: Tensor) -> Tensor:
    """Return the number of the bin of each margin, 0 to `BINS`."""
    return ((values - LOW) / WIDTH + ROUNDING).floor().long().clamp(0, BINS)


class MarginHistogram:
    """Counts the margins of the last batches, bin by bin.

    Source: W. Hu, Q. Zhao, Y. Huang, F. Zhang, "P-DIFF", ICPR 2020.

    Args:
        window: how many batches count.
        counts: of an earlier one, (window, BINS + 1); a row for each batch.
        seen: batches that went into it.
    """

    def __init__(self, window: int = 100, counts: Tensor | None = None, seen: int = 0) -> None:
        self.window, self.seen = window, seen
        empty = torch.zeros(window, BINS + 1, dtype=torch.int32)
        self.counts = empty if counts is None else counts

    def update(self, values: Tensor) -> None:
        """Add the margins of a batch; the oldest batch leaves."""
        found = torch.bincount(bins_of(values.flatten()), minlength=BINS + 1)
        self.counts[self.seen % self.window] = found.to(self.counts)
        self.seen += 1

    @property
    def full(self) -> bool:
        """Whether as many batches have been seen as count."""
        return self.seen >= self.window

    def cdf(self) -> Tensor:
        """Return the share of margins up to each bin, (BINS + 1,), float64; the last is 1."""
        found = self.counts.sum(0).double().cumsum(0)
        return found / found[-1].clamp_min(1)

    def threshold(self, share: float) -> int:
        """Return the first bin up to which more than a share of the margins lie.

        What lies below it is the share, but for one bin; BINS + 1 if it is all.
        """
        return int((self.cdf() <= share).sum())

    def confidence(self) -> float:
        """Return the mean of |margin|, with every margin in the middle of its bin."""
        middles = LOW + WIDTH * (torch.arange(BINS + 1).to(self.counts.device) + 0.5)
        found = self.counts.sum(0)
        return float((found * middles.abs()).sum() / found.sum().clamp_min(1))
