"""Makes a network forget what it has learned."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import Optimizer

from pliant.math.alone import forked


def redraw(
    model: nn.Module, generator: torch.Generator, optimizers: Iterable[Optimizer] = ()
) -> None:
    """Draw all weights anew as their layers do, and forget what optimizers know.

    Args:
        model: changed in place.
        generator: whose next number seeds the weights; the global random state stays as it is.
        optimizers: of the model.
    """
    with forked(seed=int(torch.randint(2**31, (1,), generator=generator))):
        for module in model.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
    for optimizer in optimizers:
        optimizer.state.clear()
