"""A batch norm keeps statistics for every size of an elastic network."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pliant.cost import LayerCost
from pliant.edits.edit import Replaced, layer_of
from pliant.errors import EditError

MEANS, VARIANCES = "means_by_size", "variances_by_size"
"""Buffers (sizes, channels) beside the statistics in use, which are those of the largest size."""


@dataclass(frozen=True)
class Settle:
    """Gives a batch norm a table of statistics, a row for every size; it computes as before.

    Args:
        layer: name of a batch norm with running statistics.
        sizes: how many.

    Raises:
        EditError: the layer is none, or has a table.
    """

    layer: str
    sizes: int

    @property
    def form(self) -> str:
        """What the layer becomes."""
        return "by size"

    def apply(self, model: nn.Module, *, weights: bool = True) -> Replaced:
        """Add the tables, filled with the present statistics."""
        norm = layer_of(model, self.layer)
        if not isinstance(norm, _BatchNorm) or not norm.track_running_stats or self.sizes < 1:
            raise EditError(
                f"{self.layer} is a {type(norm).__name__}: a table of at least one row goes with "
                "a batch norm that has running statistics."
            )
        if MEANS in norm._buffers:
            raise EditError(f"{self.layer} has a table of statistics already: make it once.")
        for name, values in ((MEANS, norm.running_mean), (VARIANCES, norm.running_var)):
            assert isinstance(values, torch.Tensor)
            norm.register_buffer(name, values.detach().repeat(self.sizes, 1))
        return Replaced()

    def predict(self, before: LayerCost) -> LayerCost:
        """Return the cost with the tables: more bytes, and no arithmetic."""
        channels = math.prod(before.weight)
        counter = torch.int64.itemsize
        each = (before.bytes - counter) // max(1, before.params + 2 * channels)
        return replace(before, bytes=before.bytes + 2 * self.sizes * channels * each)
