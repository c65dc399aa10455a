"""What a run writes down: of the network, and of the training loop that calls it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pliant.edits import Edit


@dataclass
class Journal:
    """What the report tells of a compression; all stages and parts of a method write into one.

    Args:
        edits: what has been done to the model, in order.
        log: the history that the report draws.
        reasons: for every layer left alone, why.
        missed: what stages of a chain missed of budgets of their own.
        unended: what was still to be done in the training when it was over.
        origin: digest of the weights that the run began with.
    """

    edits: list[Edit] = field(default_factory=list)
    log: list[dict[str, Any]] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    missed: list[str] = field(default_factory=list)
    unended: list[str] = field(default_factory=list)
    origin: str = ""


@dataclass
class Called:
    """What the training loop has called so far, to find out what it forgot.

    Args:
        begun: whether it trains at all.
        heard: whether it asked for the loss since the last step.
        followed: how many edits were followed by a step.
    """

    begun: bool = False
    heard: bool = False
    followed: int = 0
