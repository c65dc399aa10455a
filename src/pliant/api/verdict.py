"""Judges what a smaller network has lost, beside the same network without compression."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from pliant.drivers.score import Score
from pliant.result import Fidelity, Verdict

TINY = 1e-12
FAR = 0.5  # relative error of outputs from which on little of what was learned is left
SURE = 1.96  # standard errors on either side of an interval of 95 %


def judge(before: Score | None, after: Score | None, bound: float) -> Verdict:
    """Compare two scores of the same samples: shares in points of a percent, others in percent.

    Both networks answered the same questions, so the interval is that of the differences: for
    answers that are right or wrong the normal interval of McNemar's test, with one disagreement
    added to either side; for other metrics that of the jackknife, which leaves out one sample
    after the other.

    Args:
        before: of the dense network, after all that the other one got besides compression.
        after: of the smaller one; None where nothing was scored.
        bound: what may be lost.
    """
    if before is None or after is None or not math.isfinite(before.value):
        return Verdict(bound)
    share = before.metric is None or before.metric.unit == "share"
    found = Verdict(bound, metric=before.main, unit="points" if share else "%")
    if not share and before.value == 0:
        return replace(found, note=f"The {before.main} before is 0, so no share of it can be lost.")
    lost = _lost(before, torch.tensor(before.value), torch.tensor(after.value))
    if not math.isfinite(float(lost)):
        lost = torch.tensor(math.inf)  # what gives no number any more has lost it all
    binary = before.metric is None or before.rows.dtype == torch.bool
    samples, error = _paired(before, after) if binary else _jackknife(before, after)
    note = _near_chance(before)
    return replace(
        found,
        lost=float(lost),
        low=float(lost) - error if math.isfinite(error) else None,
        high=float(lost) + error if math.isfinite(error) else None,
        samples=samples,
        holds=None if note else float(lost) <= bound,  # who knows nothing has nothing to lose
        note=note,
    )


def alike(one: nn.Module, other: nn.Module) -> bool:
    """Say whether two networks hold the same numbers under the same names."""
    mine, its = one.state_dict(), other.state_dict()
    return mine.keys() == its.keys() and all(
        isinstance(value, Tensor) and torch.equal(value, its[name].to(value.device))
        for name, value in mine.items()
    )


def far(found: Fidelity | None) -> tuple[str, ...]:
    """Warn in a sentence where outputs are far from the dense network's; else nothing.

    Args:
        found: how near they are, None where that is not known.
    """
    if found is None or found.error <= FAR:
        return ()
    return (
        f"Outputs differ from the dense network's by {found.error:.0%}: little of what it had "
        "learned is left, so train the result, or compress less.",
    )


def _lost(before: Score, old: Tensor, new: Tensor) -> Tensor:
    """What was lost, in points or in percent of the old value."""
    lower = before.metric is not None and before.metric.better == "lower"
    gap = (new - old if lower else old - new).double()
    if before.metric is None or before.metric.unit == "share":
        return 100 * gap
    return 100 * gap / old.double().abs().clamp(min=TINY)


def _paired(before: Score, after: Score) -> tuple[int, float]:
    """How many answers there are, and 1.96 standard errors of the difference."""
    samples = len(before.hits)
    worse = int((before.hits & ~after.hits).sum()) + 1
    better = int((~before.hits & after.hits).sum()) + 1
    spread = worse + better - (worse - better) ** 2 / (samples + 2)
    return samples, 100 * SURE * math.sqrt(spread) / max(1, samples)


def _jackknife(before: Score, after: Score) -> tuple[int, float]:
    """The same for any metric whose rows can be left out one by one."""
    metric, count = before.metric, len(before.rows)
    if metric is None or count < 2 or before.rows.shape != after.rows.shape:
        return count, math.nan
    without = _lost(before, *(metric.without_one(score.rows) for score in (before, after)))
    spread = (without - without.mean()).square().sum() * (count - 1) / count
    return count, SURE * math.sqrt(float(spread))


def _near_chance(before: Score) -> str:
    """Say so where the dense network itself hardly knows anything."""
    if before.main == "R2" and before.value <= 0:
        return (
            f"The network before compression explains none of the variance of its targets (R2 "
            f"{before.value:.2g}): is it trained, and are its inputs prepared as in its training?"
        )
    if before.main != "accuracy" or before.classes < 2 or not len(before.hits):
        return ""
    chance = 1 / before.classes
    error = math.sqrt(chance * (1 - chance) / len(before.hits))
    above = min(1.5 * chance, chance + 0.1 * (1 - chance))
    if before.accuracy > chance + 3 * error and before.accuracy > above:
        return ""
    return (
        f"The network before compression is right in {100 * before.accuracy:.1f} % of the samples, "
        f"hardly more than by chance ({100 * chance:.1f} %): is it trained, and are its inputs "
        "prepared as in its training?"
    )


def said(verdict: Verdict) -> str:
    """Say in a sentence that too much was lost, and what can be done."""
    unit = " points" if verdict.unit == "points" else " %"
    which = "" if verdict.metric == "accuracy" else f" of its {verdict.metric}"
    known = verdict.low is not None and verdict.high is not None
    sure = f" ({verdict.low:.1f} to {verdict.high:.1f})" if known else ""
    return (
        f"The smaller network lost {verdict.lost:.1f}{unit}{which}{sure} where {verdict.bound:g} "
        "may be lost: allow it more, train longer or more gently, or allow the drop with "
        "Budget(drop=...)."
    )
