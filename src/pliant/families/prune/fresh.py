"""Makes a network forget what it has learned, where a method trains what is left from scratch."""

from __future__ import annotations

import torch

from pliant.math.alone import forked
from pliant.run import Run


def redraw(run: Run) -> None:
    """Draw all weights anew, with randomness of the run's own, and forget what optimizers know."""
    with forked():
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=run.generator)))
        for module in run.model.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
    for optimizer in run.optimizers:
        optimizer.state.clear()
