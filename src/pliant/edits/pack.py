"""A layer with several weights keeps all of them as packed integers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pliant.cost import LayerCost
from pliant.edits.edit import Replaced, layer_of
from pliant.edits.quantize import LEAST, MOST
from pliant.errors import EditError
from pliant.math.quantize import Grouping
from pliant.nn import kinds, several


@dataclass(frozen=True)
class Pack:
    """Stores the matrices of an LSTM, GRU, RNN, MultiheadAttention or experts as integers.

    Experts are any layer with parameters of three axes, one matrix on top of the other.

    What such a layer reads stays in floating point.

    Args:
        layer: its name.
        bits: of a weight, 2 to 8.
        groups: scales of each matrix, no more than it has rows; 0 is one for every row.
        indexed: whether the group of each row is stored; else groups are runs of rows.
        shapes: rows and numbers of the first matrix, of the second, and so on.
        rule: which rows share a scale, where the weights are rounded; it follows from ``indexed``
            where it is None.

    Raises:
        EditError: the layer is none of these, its matrices are others, or the bits do not fit.
    """

    layer: str
    bits: int
    groups: int
    indexed: bool
    shapes: tuple[int, ...]
    rule: Grouping | None = field(default=None, compare=False, repr=False)

    @property
    def form(self) -> str:
        """``w8``."""
        return f"w{self.bits}"

    def apply(self, model: Any, *, weights: bool = True) -> Replaced:
        """Put the packed layer in the place of the dense one, under all its names."""
        module = layer_of(model, self.layer)
        if not self.layer or not several.weights_of(module):
            raise EditError(
                f"{self.layer or 'The model'} must be an LSTM, GRU, RNN, a cell of one, a "
                "MultiheadAttention, a table of a class of its own, or have parameters of three "
                "axes, to be packed, and not "
                f"{type(module).__name__}."
            )
        if list(self.shapes) != flat(several.shapes_of(module)) or not self._fits():
            raise EditError(f"{self} does not fit the matrices of {self.layer}.")
        rule = self.rule or ("range" if self.indexed else "contiguous")
        new = several.quantized(
            module, self.bits, self.groups, indexed=self.indexed, rule=rule if weights else None
        )
        removed = tuple(several.weights_of(module).values())
        kinds.put(model, module, new)
        return Replaced(removed)  # type: ignore[arg-type]

    def predict(self, before: LayerCost) -> LayerCost:
        """Return the cost of the packed layer; it stands for as many parameters as before."""
        pairs = list(zip(self.shapes[::2], self.shapes[1::2], strict=True))
        rest = before.params - sum(numbers for _, numbers in pairs)
        packed = several.bytes_of(pairs, self.bits, self.groups, indexed=self.indexed)
        return LayerCost(
            kind=f"Quantized{before.kind}",
            params=before.params,
            macs=before.macs,
            bytes=packed + rest * before.bytes // before.params,
            weight=before.weight,
            input=before.input,
            output=before.output,
            calls=before.calls,
        )

    def _fits(self) -> bool:
        return LEAST <= self.bits <= MOST and self.groups >= 0


def flat(shapes: list[tuple[int, int]]) -> list[int]:
    """Write rows and numbers in a row, as `Pack` has them."""
    return [number for pair in shapes for number in pair]
