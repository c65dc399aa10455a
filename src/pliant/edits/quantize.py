"""One layer keeps its weight as packed integers of a few bits."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from pliant.cost import LayerCost
from pliant.edits.edit import Replaced, layer_of
from pliant.errors import EditError
from pliant.math.quantize import best_scales, grouping
from pliant.nn import layers
from pliant.nn.quantized import Bits, Quantized, Values

LEAST, MOST = 2, 8  # bits


@dataclass(frozen=True)
class Quantize:
    """Stores a layer's weight as integers with one scale for each group of output channels.

    Args:
        layer: name of a Conv1d/2d/3d, grouped or not, or a Linear.
        bits: of a weight, 2 to 8.
        groups: how many scales; one per layer, one for each channel, or between.
        indexed: whether the group of each channel is stored; else groups are runs of channels.
        inputs: bits of what the layer reads, 0 to leave it in floating point.
        outputs: bits of what it gives, 0 to leave it in floating point.
        values: the numbers; computed from the weight alone if None, by least squared error. They
            are tensors, not part of the plan: not compared and not written to JSON.

    Raises:
        EditError: the layer cannot be read, the numbers do not fit it, or ranges of activations
            are wanted and no values came.
    """

    layer: str
    bits: int
    groups: int
    indexed: bool
    inputs: int = 0
    outputs: int = 0
    values: Values | None = field(default=None, compare=False, repr=False)

    @property
    def form(self) -> str:
        """``w4``, or ``w4a8`` where inputs are rounded too."""
        return f"w{self.bits}a{self.inputs}" if self.inputs else f"w{self.bits}"

    @property
    def written(self) -> Bits:
        """How the numbers of the layer are written."""
        return Bits(self.bits, self.groups, self.indexed, self.inputs, self.outputs)

    def apply(self, model: Any, *, weights: bool = True) -> Replaced:
        """Put the packed layer in the place of the dense one."""
        module = layer_of(model, self.layer)
        if isinstance(module, Quantized):
            raise EditError(f"{self.layer} is already quantized: quantize a layer once, and last.")
        if reason := layers.unreadable(model, self.layer):
            raise EditError(f"{self.layer or 'The model'} cannot be quantized: {reason}.")
        self._check(tuple(module.weight.shape))
        values = (self.values or self._from(module)) if weights else None
        layers.replace(model, self.layer, Quantized(module, self.written, values))
        return Replaced((module.weight,))

    def predict(self, before: LayerCost) -> LayerCost:
        """Return the cost of the packed layer; it stands for as many parameters as before."""
        self._check(before.weight)
        bias = before.params - math.prod(before.weight)
        return LayerCost(
            kind=Quantized.__name__,
            params=before.params,
            macs=before.macs,
            bytes=self.written.bytes(before.weight) + bias * before.bytes // before.params,
            weight=before.weight,
            input=before.input,
            output=before.output,
            calls=before.calls,
        )

    def _from(self, module: layers.Factorizable) -> Values:
        if self.inputs or self.outputs:
            raise EditError(
                f"Ranges of activations need data, but {self.layer} came without values: quantize "
                "weights only, or use a method that calibrates."
            )
        rule = "range" if self.indexed else "contiguous"
        index = grouping(module.weight, self.groups, rule)  # type: ignore[arg-type]
        return Values(module.weight, best_scales(module.weight, index, self.bits), index)

    def _check(self, shape: tuple[int, ...]) -> None:
        least = 2 if self.indexed else 1
        fit = (
            LEAST <= self.bits <= MOST
            and self.inputs in (0, *range(LEAST, MOST + 1))
            and self.outputs in (0, *range(LEAST, MOST + 1))
            and len(shape) > 1
            and least <= self.groups <= shape[0]
        )
        if not fit:
            raise EditError(
                f"{self} does not fit a weight of shape {shape}: it takes 2 to 8 bits and from "
                f"{least} to {shape[0] if shape else 0} groups."
            )
