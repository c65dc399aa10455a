"""Judges what a smaller network has lost, beside the same network without compression."""

from __future__ import annotations

import math

from pliant.drivers.score import Score
from pliant.result import Verdict

SURE = 1.96  # standard errors on either side of an interval of 95 %


def judge(before: Score | None, after: Score | None, bound: float) -> Verdict:
    """Compare two scores of the same samples, in points of a percent.

    Both networks answered the same questions, so the interval is that of the differences (the
    normal interval of McNemar's test, with one disagreement added to either side).

    Args:
        before: of the dense network, after all that the other one got besides compression.
        after: of the smaller one; None where nothing was scored.
        bound: points that may be lost.
    """
    if before is None or after is None or not math.isfinite(before.accuracy):
        return Verdict(bound)
    samples = len(before.hits)
    lost = 100 * (before.accuracy - after.accuracy)
    worse = int((before.hits & ~after.hits).sum()) + 1
    better = int((~before.hits & after.hits).sum()) + 1
    spread = worse + better - (worse - better) ** 2 / (samples + 2)
    error = 100 * SURE * math.sqrt(spread) / max(1, samples)
    note = _near_chance(before)
    return Verdict(
        bound=bound,
        lost=lost,
        low=lost - error,
        high=lost + error,
        samples=samples,
        holds=None if note else lost <= bound,  # who knows nothing has nothing to lose
        note=note,
    )


def _near_chance(before: Score) -> str:
    """Say so where the dense network itself hardly knows anything."""
    if before.classes < 2 or not len(before.hits):
        return ""
    chance = 1 / before.classes
    error = math.sqrt(chance * (1 - chance) / len(before.hits))
    if before.accuracy > chance + 3 * error and before.accuracy > 1.5 * chance:
        return ""
    return (
        f"The network before compression is right in {100 * before.accuracy:.1f} % of the samples, "
        f"hardly more than by chance ({100 * chance:.1f} %): is it trained, and are its inputs "
        "prepared as in its training?"
    )


def said(verdict: Verdict) -> str:
    """Say in a sentence that too much was lost, and what can be done."""
    return (
        f"The smaller network lost {verdict.lost:.1f} points ({verdict.low:.1f} to "
        f"{verdict.high:.1f}) where {verdict.bound:g} may be lost: allow it more, train longer or "
        "more gently, or allow the drop with Budget(drop=...)."
    )
