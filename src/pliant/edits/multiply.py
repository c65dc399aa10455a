"""One layer multiplies codes: unsigned integers of a few bits, its weight's and its input's."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from pliant.cost import LayerCost
from pliant.edits.edit import Replaced, layer_of
from pliant.edits.quantize import LEAST, MOST, unpackable
from pliant.errors import EditError
from pliant.math.gemm import panel_bytes
from pliant.math.gemm_loops import WIDTH
from pliant.nn import kinds
from pliant.nn.product import KINDS, Affine, Product

SUM = 2**31 - 1  # the largest whole number of 32 bits


@dataclass(frozen=True)
class Multiply:
    """Computes a layer as an exact product of unsigned integers.

    Args:
        layer: name of a Conv1d/2d/3d or Linear.
        bits: of a code, 2 to 8; accumulators have 16 bits but for 8.
        channels: whether every output channel has a scale; else the layer has one.
        groups: of the convolution.
        values: the numbers, which need a range of what the layer reads. They are tensors, not
            part of the plan: not compared and not written to JSON.

    Raises:
        EditError: the layer is none of these, is too deep for sums of 32 bits, or no values came.
    """

    layer: str
    bits: int
    channels: bool
    groups: int = 1
    values: Affine | None = field(default=None, compare=False, repr=False)

    @property
    def form(self) -> str:
        """``u4``: unsigned codes of 4 bits."""
        return f"u{self.bits}"

    def apply(self, model: Any, *, weights: bool = True) -> Replaced:
        """Put the layer of codes in the place of the dense one, under all its names."""
        module = layer_of(model, self.layer)
        if isinstance(module, Product):
            raise EditError(f"{self.layer} multiplies codes already: do so once, and last.")
        reason = unpackable(model, self.layer)
        if reason is None and kinds.kind_of(module) not in KINDS:
            reason = f"its class {type(module).__name__} is no product of two matrices"
        if reason:
            raise EditError(f"{self.layer or 'The model'} cannot multiply codes: {reason}.")
        self._check(tuple(module.weight.shape))
        if (groups := getattr(module, "groups", 1)) != self.groups:
            raise EditError(f"{self} does not fit a layer of {groups} groups.")
        if weights and self.values is None:
            raise EditError(
                f"Codes of what {self.layer} reads need a range of it, but no values came: use a "
                "method that calibrates."
            )
        values = self.values if weights else None
        new = Product(module, self.bits, channels=self.channels, values=values)
        kinds.put(model, module, new)
        gone = all(module.weight is not parameter for parameter in model.parameters())
        return Replaced((module.weight,)) if gone else Replaced()

    def predict(self, before: LayerCost) -> LayerCost:
        """Return the cost of the layer of codes; it stands for as many parameters as before."""
        self._check(before.weight)
        channels, depth = before.weight[0], math.prod(before.weight[1:])
        bias = (before.params - channels * depth) * before.bytes // before.params
        each = panel_bytes(channels // self.groups, depth, WIDTH, self.bits)
        scales = channels if self.channels else 1
        return LayerCost(
            kind=Product.__name__,
            params=before.params,
            macs=before.macs,
            bytes=self.groups * each + 4 * (scales + channels) + 12 + bias,
            weight=before.weight,
            input=before.input,
            output=before.output,
            calls=before.calls,
        )

    def _check(self, shape: tuple[int, ...]) -> None:
        if not LEAST <= self.bits <= MOST or len(shape) < 2:
            raise EditError(f"{self} does not fit a weight of shape {shape}: it takes 2 to 8 bits.")
        if math.prod(shape[1:]) * (2**self.bits - 1) ** 2 > SUM:
            raise EditError(
                f"{self.layer} adds {math.prod(shape[1:]):,} products, more than sums of 32 bits "
                f"hold at {self.bits} bits: take fewer bits, or leave it out."
            )
