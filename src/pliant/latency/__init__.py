"""Milliseconds: measured on a target, compared with their spread, and planned for."""

from pliant.latency.compare import Comparison, Timing, compare, measure
from pliant.latency.table import LatencyTable
from pliant.latency.target import Target, Where, as_target

__all__ = [
    "Comparison",
    "LatencyTable",
    "Target",
    "Timing",
    "Where",
    "as_target",
    "compare",
    "measure",
]
