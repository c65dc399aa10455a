"""Claims: what a bench set out to show, and whether it did. Computed from cells, never written."""

import operator
from collections.abc import Iterable, Mapping
from typing import Any

_HOLDS = {"<=": operator.le, ">=": operator.ge, ">": operator.gt, "<": operator.lt}


def claim(text: str, value: float | None, how: str, target: float, unit: str) -> dict[str, Any]:
    """Compare a measured value with its target; a value that is missing does not hold.

    Args:
        text: the claim in words.
        value: what was measured, None where a cell is missing or refused.
        how: one of <=, >=, <, >.
        target: what was wanted.
        unit: of both.
    """
    rounded = None if value is None else round(value, 5)
    return {
        "claim": text,
        "target": f"{how} {target:.4g}",
        "value": rounded,
        "unit": unit,
        "holds": value is not None and bool(_HOLDS[how](value, target)),
    }


def misses_first(results: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Collect the claims of all results: those that do not hold first, none left out."""
    rows = [{"bench": r["bench"], **row} for r in results for row in r["claims"]]
    return sorted(rows, key=lambda row: bool(row["holds"]))


def shown(value: float | None, unit: str) -> str:
    """Write a claim's value."""
    return "not measured" if value is None else f"{value:.5g} {unit}".strip()
