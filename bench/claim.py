"""Claims: what a bench set out to show, and whether it did. Computed from cells, never written.

A claim holds, misses, or is not measured: where a cell is missing, where chance has one seed only,
and where the mean over seeds is within two standard errors of the target.
"""

import operator
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.stats import standard_error

HOLDS, MISSES, OPEN = "holds", "misses", "not measured"
STATES = (MISSES, OPEN, HOLDS)  # in the order in which they are listed
ERRORS = 2.0  # standard errors from the target within which nothing is shown

_HOLDS = {"<=": operator.le, ">=": operator.ge, ">": operator.gt, "<": operator.lt}


def claim(text: str, value: float | None, how: str, target: float, unit: str) -> dict[str, Any]:
    """Compare a value in which seeds play no part with its target: a count, bytes, milliseconds.

    Args:
        text: the claim in words.
        value: what was measured, None where a cell is missing or refused.
        how: one of <=, >=, <, >.
        target: what was wanted.
        unit: of both.
    """
    state = OPEN
    if value is not None:
        state = HOLDS if _HOLDS[how](value, target) else MISSES
    return _row(text, value, how, target, unit, state)


def judged(text: str, found: Sequence[float], how: str, target: float, unit: str) -> dict[str, Any]:
    """Compare what a training gave, a value per seed, with its target.

    Two rivals are compared by the differences of the seeds that they share
    (`bench.experiments.paired`).

    Args:
        text: the claim in words.
        found: a value per seed.
        how: one of <=, >=, <, >.
        target: what was wanted of their mean.
        unit: of all.
    """
    if not found:
        return claim(text, None, how, target, unit)
    value, error = statistics.fmean(found), standard_error(found)
    near = error is None or (error > 0 and abs(value - target) <= ERRORS * error)
    state = HOLDS if _HOLDS[how](round(value, 9), target) else MISSES
    row = _row(text, value, how, target, unit, OPEN if near else state)
    return row | {"error": None if error is None else round(error, 5), "seeds": len(found)}


def misses_first(results: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Collect the claims of all results: misses first, then what is not measured, none left out."""
    rows = [{"bench": r["bench"], **row} for r in results for row in r["claims"]]
    return sorted(rows, key=lambda row: STATES.index(row["state"]))


def counted(rows: Sequence[Mapping[str, Any]]) -> str:
    """Say how many claims hold, miss, and are not measured."""
    held, missed, unsure = (
        sum(row["state"] == state for row in rows) for state in (HOLDS, MISSES, OPEN)
    )
    return f"{held} of {len(rows)} claims hold, {missed} miss and {unsure} are not measured"


def shown(row: Mapping[str, Any]) -> str:
    """Write a claim's value, with the standard error of its mean."""
    if row["value"] is None:
        return "not measured"
    text = f"{row['value']:.5g}"
    if "seeds" in row:
        text += " (one seed)" if row["error"] is None else f" ± {row['error']:.2g}"
    return f"{text} {row['unit']}".strip()


def _row(
    text: str, value: float | None, how: str, target: float, unit: str, state: str
) -> dict[str, Any]:
    return {
        "claim": text,
        "target": f"{how} {target:.4g}",
        "value": None if value is None else round(value, 5),
        "unit": unit,
        "state": state,
        "holds": state == HOLDS,
    }
