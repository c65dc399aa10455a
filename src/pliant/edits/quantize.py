"""One layer keeps its weight as packed integers of a few bits."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from pliant.cost import LayerCost
from pliant.edits.edit import Replaced, layer_of
from pliant.errors import EditError
from pliant.math.quantize import best_scales, grouping
from pliant.nn import kinds, layers
from pliant.nn.packed import Bits, Values
from pliant.nn.product import Product
from pliant.nn.quantized import Quantized
from pliant.nn.several import Several

LEAST, MOST = 2, 8  # bits
FLIPPED = ("ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d", "Conv1D")  # outputs come second


@dataclass(frozen=True)
class Quantize:
    """Stores a layer's weight as integers with one scale for each group of output channels.

    Args:
        layer: name of a layer of a kind of `pliant.nn.kinds`: a convolution, transposed or not, a
            Linear, an Embedding, whose output channels are its rows.
        bits: of a weight, 2 to 8.
        groups: how many scales; one per layer, one for each channel, or between.
        indexed: whether the group of each channel is stored; else groups are runs of channels.
        inputs: bits of what the layer reads, 0 to leave it in floating point.
        outputs: bits of what it gives, 0 to leave it in floating point.
        source: name of a quantized layer, to which this one's weight was tied: its packed weight
            is shared. Empty for a weight of its own.
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
    source: str = ""
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
        """Put the packed layer in the place of the dense one, under all its names."""
        module = layer_of(model, self.layer)
        if isinstance(module, Quantized):
            raise EditError(f"{self.layer} is already quantized: quantize a layer once, and last.")
        if reason := unpackable(model, self.layer):
            raise EditError(f"{self.layer or 'The model'} cannot be quantized: {reason}.")
        self._check(kinds.to_rows(module, module.weight).shape[0])
        source = layer_of(model, self.source) if self.source else None
        if source is not None and not self._fits(source, module):
            raise EditError(
                f"{self.layer} shares the weight of {self.source}, which must be quantized before, "
                "in the same way."
            )
        values = (self.values or self._from(module)) if weights else None
        kinds.put(model, module, Quantized(module, self.written, values, source))
        gone = all(module.weight is not parameter for parameter in model.parameters())
        return Replaced((module.weight,)) if gone else Replaced()

    def predict(self, before: LayerCost) -> LayerCost:
        """Return the cost of the packed layer; it stands for as many parameters as before."""
        channels = _channels(before)
        self._check(channels, before.weight)
        numbers = math.prod(before.weight)
        bias = (before.params - numbers) * before.bytes // before.params
        own = self.written.bytes(channels, numbers)
        shared = self.written.shared(channels, numbers) if self.source else 0
        return LayerCost(
            kind=Quantized.__name__,
            params=before.params - (numbers if self.source else 0),
            macs=before.macs,
            bytes=own - shared + bias,
            weight=before.weight,
            input=before.input,
            output=before.output,
            calls=before.calls,
        )

    def _fits(self, source: Any, module: Any) -> bool:
        rows = kinds.to_rows(module, module.weight)
        mine = self.bits, self.groups, self.indexed, tuple(rows.shape)
        if not isinstance(source, Quantized):
            return False
        bits = source.bits
        return mine == (bits.weight, bits.scales, bits.indexed, source.packing.shape)

    def _from(self, module: Any) -> Values:
        if self.inputs or self.outputs:
            raise EditError(
                f"Ranges of activations need data, but {self.layer} came without values: quantize "
                "weights only, or use a method that calibrates."
            )
        rows = kinds.to_rows(module, module.weight)
        rule = "range" if self.indexed else "contiguous"
        index = grouping(rows, self.groups, rule)  # type: ignore[arg-type]
        return Values(module.weight, best_scales(rows, index, self.bits), index)

    def _check(self, channels: int, shape: tuple[int, ...] = (1, 1)) -> None:
        least = 2 if self.indexed else 1
        fit = (
            LEAST <= self.bits <= MOST
            and self.inputs in (0, *range(LEAST, MOST + 1))
            and self.outputs in (0, *range(LEAST, MOST + 1))
            and len(shape) > 1
            and least <= self.groups <= channels
        )
        if not fit:
            raise EditError(
                f"{self} does not fit a weight of {channels} channels: it takes 2 to 8 bits and "
                f"from {least} to {channels} groups."
            )


def _channels(cost: LayerCost) -> int:
    """Count output channels; a weight of groups lists those of one group only, if transposed."""
    own = cost.weight[cost.kind in FLIPPED]
    axis = len(cost.weight) - 2  # of positions, behind the channels of an output without samples
    grouped = cost.kind in FLIPPED and axis > 0 and len(cost.output) > axis
    return max(own, cost.output[-1 - axis]) if grouped else own


def unpackable(model: nn.Module, name: str) -> str | None:
    """Say why the weights of the layer of this name cannot be packed, or None if they can.

    Raises:
        AttributeError: the model has no such module.
    """
    module: Any = model.get_submodule(name)
    if not name:
        return "the model is this single layer: wrap it in nn.Sequential"
    if isinstance(module, Quantized | Several | Product):
        return "it is quantized already"
    if parametrize.is_parametrized(module):
        return "its weight is parametrized: remove the parametrization first"
    if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention):
        return "the MultiheadAttention around it reads this weight, and is packed as a whole"
    if kinds.kind_of(module) is None:
        return f"no packed form does with its weight what {type(module).__name__} does"
    if reason := layers.unowned(module):
        return reason
    if module.weight.is_complex():
        return "its weight is complex, and levels lie on a line"
    if getattr(module, "max_norm", None) is not None:
        return "its rows are scaled to max_norm while they are looked up"
    return None
