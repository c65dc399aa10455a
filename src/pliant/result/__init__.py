"""What each verb returns: plain data, and the tensors it is about."""

from pliant.result.compressed import Fidelity, LayerRow, Report, Result, Side, Verdict
from pliant.result.found import Curves, Finding, Heat, Solution, Views

__all__ = [
    "Curves",
    "Fidelity",
    "Finding",
    "Heat",
    "LayerRow",
    "Report",
    "Result",
    "Side",
    "Solution",
    "Verdict",
    "Views",
]
