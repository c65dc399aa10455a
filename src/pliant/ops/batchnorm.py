"""What batch normalization needs after a model was changed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pliant.cost import Example, call
from pliant.ops.capture import samples


def recalibrate(model: nn.Module, batches: Iterable[Example]) -> int:
    """Re-estimate the running statistics of every batch norm from forward passes alone.

    Statistics are averaged over all batches with equal weight, then used in evaluation; weights
    and training flags stay as they are. A last batch of less than half the size is left out, and
    without any batch of two samples the statistics stay. The batches must be shuffled: statistics
    of a sample sorted by class are far worse than the stale ones.

    Returns:
        The number of batch norms that were recalibrated.
    """
    norms = [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    ]
    if not norms:
        return 0
    flags = {module: module.training for module in model.modules()}
    momenta = {norm: norm.momentum for norm in norms}
    try:
        model.eval()  # dropout stays off: only the norms see training mode
        most = 0
        with torch.no_grad():
            for batch in batches:
                size = samples(batch)
                if size < 2 or 2 * size < most:
                    continue
                if not most:
                    _begin(norms)
                call(model, batch)
                most = max(most, size)
    finally:
        for norm in norms:
            norm.momentum = momenta[norm]
        for module, flag in flags.items():
            module.training = flag
    return len(norms)


def _begin(norms: Iterable[_BatchNorm]) -> None:
    """Forget what was measured, and average from now on."""
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average
        norm.train()
