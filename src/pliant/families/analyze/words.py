"""What a look at single positions has found, in figures and in a sentence."""

from __future__ import annotations

from typing import Any

from pliant.families.analyze.decisions import ORDERS, WAYS, Decisions, better
from pliant.families.analyze.evidence import area


def summed(found: Decisions, finest: dict[str, Any], positions: int) -> dict[str, Any]:
    """Return the figures of a finding.

    Args:
        found: where the decisions come from.
        finest: the row of the finest grid.
        positions: of the last map.
    """
    areas = {key: area(curve) for key, curve in found.curves.items()}
    means = {
        way if order == "evidence" else f"{way}_{order}": float(areas[way, order].mean())
        for way in WAYS
        for order in ORDERS
    }
    best = areas["deletion", "evidence"]
    return {
        **{name: finest[name] for name in ("agreement", "chance", "p")},
        "points": float(found.points.double().median()) / positions,
        **means,
        "p_random": better(best, areas["deletion", "random"]),
        "p_saliency": better(best, areas["deletion", "saliency"]),
        "exactness": found.exactness,
        "permuted": found.permuted,
        "decisions": found.classes,
        "evidence": found.evidence,
        "minimal_points": found.points,
    }


def said(values: dict[str, Any], finest: dict[str, Any], count: int) -> str:
    """Put the figures of so many decisions in a sentence."""
    ordered = "does not change" if values["permuted"] < 1e-5 else "changes"
    return (
        f"Operationalized: of {count} decisions {100 * finest['agreement']:.0f} % "
        f"({100 * finest['low']:.0f} to {100 * finest['high']:.0f}) stay with the "
        f"{finest['what']} and shuffled, {100 * finest['chance']:.0f} % would by chance; half of "
        f"them need {100 * values['points']:.3g} % of the positions or fewer, and the order of the "
        f"last map {ordered} scores."
    )
