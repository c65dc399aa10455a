"""The smallest network that loses no more than may be lost, found by measured bisection."""

from __future__ import annotations

import functools
import inspect
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ParamSpec

import torch
from torch import nn

from pliant.api.job import Methods
from pliant.api.network import once
from pliant.budget import Budget
from pliant.compose import bounds, name_of, resolve, saved_by
from pliant.cost import bare
from pliant.data import Data
from pliant.data.sources import Batches
from pliant.data.splits import Split
from pliant.errors import AccuracyWarning, BudgetError, DataError
from pliant.method import Method
from pliant.plan.remember import remembering, trial
from pliant.result import Result, Verdict

LEAST = 0.02  # share of the dense network below which nothing is tried
PROBES = 7  # halvings of the range on a log scale: sizes are found to 3 %
ONE_SIDED = 1.2816 / 1.96  # of half an interval of 95 %: nine in ten networks lose less

Rows = list[dict[str, Any]]
P = ParamSpec("P")


def searching(call: Callable[P, Result]) -> Callable[P, Result]:
    """Let a compression with nothing but a drop search the smallest network within it."""

    @functools.wraps(call)
    def compress(*args: P.args, **kwargs: P.kwargs) -> Result:
        given = inspect.signature(call).bind(*args, **kwargs).arguments
        budget: Budget | str | None = given.pop("budget", None)
        wanted = Budget.parse(budget) if isinstance(budget, str) else budget
        if isinstance(wanted, Budget) and wanted.drop is not None and not wanted.given():
            built = resolve(given["method"])
            if saved_by(built) and not bounds(built, None):
                return smallest(**{**given, "method": built, "drop": wanted.drop})
        return call(*args, **kwargs)

    return compress


def smallest(
    model: nn.Module,
    data: Any,
    method: Methods,
    drop: float = 1.0,
    *,
    axis: str | None = None,
    probes: int = PROBES,
    **asked: Any,
) -> Result:
    """Return the smallest network that a method makes within a drop of the score.

    Sizes are tried by bisection on a log scale, each compressed and scored on the validation
    split; a size counts as within the drop where nine in ten such networks would lose less on the
    test split, by the paired interval of what was lost and the sizes of both splits. The smallest
    one is made once more and scored on the test split, which had no part in the choice. Without a
    test split half of the validation samples is kept for that. Where no size is so sure, the surest
    of those that lost no more than the drop is taken, with a warning and a word in the report.

    Args:
        model: any network; it stays as it is.
        data: as for `compress`, with labels to score.
        method: as for `compress`; it must save something that a budget bounds.
        drop: points of a percent of the score that may be lost.
        axis: what is made small: ``params``, ``macs``, ``bytes`` or ``latency`` (then a
            ``target`` is needed); the first that the method saves if None, time where there is a
            target.
        probes: how many sizes are tried.
        asked: everything else that `compress` takes: ``train``, ``target``, ``seed``, ...

    Returns:
        The result at the smallest size within the drop, `report.tried` with a row for every size.

    Raises:
        BudgetError: the method saves nothing, or every size that was tried lost more than the
            drop; the message names the nearest one.
        DataError: nothing is labelled.
    """
    built = resolve(method)
    where = axis_of(built, axis, timed=asked.get("target") is not None)
    drop = Budget(drop=drop).drop or 0.0
    seed = asked.get("seed", 0)
    decide, check = divided(Data.of(data, seed=seed).read_by(bare(model)), seed)
    probe = _Probe(model, decide, built, where, drop, asked, caution(decide, check))
    with remembering(), silent():
        found = bisect(probe, probes)
        best = probe.surest() if found is None else found
        if best is None:
            raise BudgetError(_nothing(probe, drop))
        last = once(model, check, built, budget(where, best, drop), **{**asked, "strict": False})
    report = replace(last.report, tried=probe.chosen(best, sure=found is not None))
    unsure = "" if found is not None else _unsure(report.tried, drop)
    if report.verdict is not None and report.verdict.holds is False:
        warnings.warn(slipped(report.verdict), AccuracyWarning, stacklevel=2)
    elif unsure:
        warnings.warn(unsure, AccuracyWarning, stacklevel=2)
    said = (*report.findings, *([unsure] if unsure else []))
    return replace(last, report=replace(report, findings=said))


def axis_of(method: Method, axis: str | None, *, timed: bool) -> str:
    """Say what of a network a search makes small.

    Raises:
        BudgetError: the method does not save it, or nothing at all.
    """
    saves, name = saved_by(method), name_of(method)
    if not saves:
        raise BudgetError(
            f"{name} saves nothing that a budget bounds, so no size can be searched: name a method "
            "that does (`pliant methods` lists them)."
        )
    wanted = axis or ("latency" if timed and "latency" in saves else saves[0])
    if wanted not in saves:
        raise BudgetError(f"{name} saves {', '.join(saves)}, not {wanted}: name one of them.")
    if wanted == "latency" and not timed:
        raise BudgetError(
            "Milliseconds need a target to measure on: name one, such as target='onnxruntime'."
        )
    return wanted


def budget(axis: str, share: float, drop: float | None = None) -> Budget:
    """Bound an axis to a share of the dense network."""
    value: Any = f"{100 * share:.4g}%" if axis == "latency" else float(share)
    return Budget(**{axis: value}, drop=drop)


@dataclass
class _Probe:
    """Compresses to a share, and says whether that lost too much."""

    model: nn.Module
    data: Data
    method: Method
    axis: str
    drop: float
    asked: dict[str, Any]
    caution: float = 1.0

    def __post_init__(self) -> None:
        self.rows: Rows = []
        self.near: list[tuple[float, float]] = []  # (what nine in ten lose at most, share)

    def __call__(self, share: float) -> bool:
        began, row = time.monotonic(), {"share": round(share, 5)}
        wanted = {**self.asked, "strict": False, "control": False, "folder": None, "resume": False}
        try:
            with trial():
                found = once(
                    self.model,
                    self.data,
                    self.method,
                    budget(self.axis, share, self.drop),
                    **wanted,
                )
        except BudgetError as error:
            self.rows.append({**row, "refused": str(error)})
            return False
        self.rows.append({**row, **measured(found), "seconds": time.monotonic() - began})
        check_scored(found)
        most = at_most(found.report.verdict, self.drop, self.caution)
        self.rows[-1]["within"] = most <= self.drop
        if found.report.met and self.rows[-1]["lost"] <= self.drop:
            self.near.append((most, share))
        return bool(self.rows[-1]["within"] and found.report.met)

    def surest(self) -> float | None:
        """Return the share that most surely is within the drop, of those that lost no more."""
        return min(self.near)[1] if self.near else None

    def chosen(self, best: float, *, sure: bool) -> tuple[dict[str, Any], ...]:
        """Return the rows, the one of the chosen share marked."""
        share = round(best, 5)
        why = f"the {'smallest' if sure else 'surest, not for sure,'} within {self.drop:g} points"
        return tuple(
            row | ({"chosen": True, "why": why} if row["share"] == share else {})
            for row in self.rows
        )


def measured(result: Result) -> dict[str, Any]:
    """Return what a result costs and lost, as one row of plain data."""
    after, verdict = result.report.after, result.report.verdict
    costs = {name: getattr(after, name) for name in ("params", "macs", "bytes", "latency_ms")}
    lost = {name: getattr(verdict, name, None) for name in ("lost", "low", "high", "samples")}
    scored = {"accuracy": after.accuracy, "loss": after.loss, **result.report.judged()}
    return {**costs, **scored, **lost}


def check_scored(found: Result) -> None:
    """Refuse to search by what is lost where that is not known.

    Raises:
        DataError: nothing was scored.
    """
    verdict = found.report.verdict
    if verdict is None or verdict.lost is None:
        note = f" {verdict.note}" if verdict and verdict.note else ""
        raise DataError(
            "What is lost can only be searched where there are labels to score: give a validation "
            f"or test split with labels.{note}"
        )


def caution(decide: Data, check: Data) -> float:
    """Return how much wider the interval of a loss is on samples that had no part in the choice.

    What is lost there has a spread of its own, the larger the fewer they are.
    """
    if not check.has("test") or not decide.has("val"):
        return 1.0
    seen, unseen = decide.size("val"), check.size("test")
    return math.sqrt(1 + seen / unseen) if seen and unseen else 1.0


def within(verdict: Verdict | None, drop: float, caution: float = 1.0) -> bool:
    """Say whether nine in ten networks with such answers lose no more than a drop."""
    return at_most(verdict, drop, caution) <= drop


def at_most(verdict: Verdict | None, drop: float, caution: float = 1.0) -> float:
    """Return what nine in ten networks with such answers lose at most.

    Where so few samples were scored that even equal answers would not show that a drop is kept,
    what was lost on them decides.

    Args:
        verdict: on the samples that decide.
        drop: what may be lost.
        caution: factor of the interval: see `caution`; at 1 the loss over all such samples counts.
    """
    if verdict is None or verdict.lost is None:
        return math.inf
    surely = verdict.lost
    if verdict.high is not None:
        surely += caution * ONE_SIDED * (verdict.high - verdict.lost)
    paired = verdict.metric == "accuracy"
    blind = paired and caution * 128.16 * math.sqrt(2) / max(1, verdict.samples) > drop
    return verdict.lost if blind else surely


def bisect(
    fits: Callable[[float], bool], probes: int, least: float = LEAST, most: float = 1.0
) -> float | None:
    """Find the smallest share that fits, by halving the logarithm of the range; None if none.

    >>> bisect(lambda share: share > 0.3, 8) < 0.31
    True
    """
    low, high, best = math.log(least), math.log(most), None
    for _ in range(probes):
        middle = (low + high) / 2
        if fits(math.exp(middle)):
            best = high = middle
        else:
            low = middle
    return None if best is None else math.exp(best)


def divided(data: Data, seed: int) -> tuple[Data, Data]:
    """Return the data to decide with, and the data to check the decision on.

    Raises:
        DataError: there is neither a validation nor a test split.
    """
    if data.has("val") and data.has("test"):
        return replace(data, test=None), data
    only: Split = "test" if data.has("test") else "val"
    if not data.has(only):
        raise DataError(
            "A drop is searched on samples that do not train: give a validation or test split."
        )
    first, second = _halves(data, only, seed)
    return replace(data, val=first, test=None), replace(data, val=first, test=second)


def _halves(data: Data, split: Split, seed: int) -> tuple[Any, Any]:
    """Divide a split by a seeded permutation; batches of a loader cannot be, and serve twice."""
    source = data.source(split)
    if isinstance(source, Batches) or len(source) < 2:
        return getattr(data, split), getattr(data, split)
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))
    half = len(source) // 2
    return source.take(order[:half].sort().values), source.take(order[half:].sort().values)


compress = searching(once)


@contextmanager
def silent() -> Iterator[None]:
    """Keep the warnings of tries to themselves: their losses stand in the table."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AccuracyWarning)
        yield


def _nothing(probe: _Probe, drop: float) -> str:
    """Say which size came nearest to the drop, and what would help."""
    scored = [row for row in probe.rows if row.get("lost") is not None]
    if not scored:
        return f"No size could be made: {probe.rows[-1]['refused']}"
    near = min(scored, key=lambda row: row["lost"])
    return (
        f"No size that was tried is within {drop:g}; the nearest, with "
        f"{100 * near['share']:.0f} % of the {probe.axis}, lost {_lost(near)}: allow more, "
        "train (train=Train(epochs=...)), or give more validation samples."
    )


def _unsure(rows: Sequence[dict[str, Any]], drop: float) -> str:
    """Say that what was chosen is within the drop by what was measured, and not for sure."""
    near = next(row for row in rows if row.get("chosen"))
    return (
        f"No size that was tried is within {drop:g} for sure; this one is the surest, and lost "
        f"{_lost(near)} where it was chosen: allow more, train, or give more validation "
        "samples."
    )


def _lost(row: dict[str, Any]) -> str:
    """Write what was lost, with its interval."""
    sure = "" if row["low"] is None else f" ({row['low']:.2f} to {row['high']:.2f})"
    return f"{row['lost']:.2f} on {row['samples']} samples{sure}"


def slipped(verdict: Verdict) -> str:
    """Say that what was chosen on one split lost too much on the other."""
    known = verdict.low is not None and verdict.high is not None
    sure = f" ({verdict.low:.2f} to {verdict.high:.2f})" if known else ""
    return (
        f"The network was within the drop where it was chosen, but on the untouched samples it "
        f"lost {verdict.lost:.2f}{sure} where {verdict.bound:g} may be lost: choose on more "
        "validation samples."
    )
