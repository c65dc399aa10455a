"""What each verb returns: tensors or a network, and a report about them in plain data."""

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
