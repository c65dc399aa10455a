"""Methods made of methods: one after the other, or in the same loop."""

from pliant.compose.composed import Chain, Together, bounds, chain, check_axes, resolve, together
from pliant.compose.stage import Stage, name_of, saved_by

__all__ = [
    "Chain",
    "Stage",
    "Together",
    "bounds",
    "chain",
    "check_axes",
    "name_of",
    "resolve",
    "saved_by",
    "together",
]
