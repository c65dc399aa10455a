"""Batch norms of an elastic network: statistics for every size."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from pliant.cost import Example
from pliant.edits import Edit, Settle, layer_of
from pliant.edits.settle import MEANS, VARIANCES
from pliant.edits.sizes import count, put, weights_at
from pliant.surgery.batchnorm import recalibrate


def settle(model: nn.Module, edits: Sequence[Edit], batches: Sequence[Example]) -> None:
    """Re-estimate the batch norms at every size, and write their tables.

    The statistics in use are those of the largest size afterwards.
    """
    norms = [layer_of(model, edit.layer) for edit in edits if isinstance(edit, Settle)]
    whole = {name: p.data for name, p in model.named_parameters()}
    for size in reversed(range(count(edits))):
        parts = weights_at(model, edits, size)
        try:
            put(model, {name: part.detach() for name, part in parts.items()})
            recalibrate(model, batches)
        finally:
            put(model, {name: whole[name] for name in parts})
        for norm in norms:
            getattr(norm, MEANS)[size].copy_(norm.running_mean)
            getattr(norm, VARIANCES)[size].copy_(norm.running_var)
