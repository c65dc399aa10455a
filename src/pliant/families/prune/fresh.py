"""Makes a network forget what it has learned, where a method trains what is left from scratch."""

from __future__ import annotations

from pliant.run import Run
from pliant.surgery.redraw import redraw as drawn_anew


def redraw(run: Run) -> None:
    """Draw all weights anew, with randomness of the run's own, and forget what optimizers know."""
    drawn_anew(run.model, run.generator, run.optimizers)
