"""Several operations that were tried side by side become one of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pliant.cost import LayerCost, layer_costs
from pliant.edits.edit import Replaced, layer_of
from pliant.errors import EditError
from pliant.nn.layers import replace
from pliant.nn.mixed import MixedOp
from pliant.nn.mobile import block, is_block
from pliant.nn.operations import operation


@dataclass(frozen=True)
class Choose:
    """Puts one candidate of a mixed operation in its place, with the weights it has.

    Args:
        layer: name of a `MixedOp`.
        op: name of the candidate.

    Raises:
        EditError: the layer is no mixed operation, or has no such candidate.
    """

    layer: str
    op: str

    @property
    def form(self) -> str:
        """The name of the operation."""
        return self.op

    def apply(self, model: torch.nn.Module, *, weights: bool = True) -> Replaced:
        """Put the candidate in the place of the mixture; shapes and weights are its own."""
        mixed = layer_of(model, self.layer)
        if not isinstance(mixed, MixedOp):
            raise EditError(
                f"{self.layer} must be a mixed operation to choose from, but is a "
                f"{type(mixed).__name__}."
            )
        if self.op not in mixed.ops:
            raise EditError(
                f"{self.layer} has no candidate {self.op!r}: it has {', '.join(mixed.ops)}."
            )
        before = list(mixed.parameters())
        replace(model, self.layer, mixed.ops[self.op])
        left = {id(parameter) for parameter in model.parameters()}
        return Replaced(removed=tuple(p for p in before if id(p) not in left))

    def predict(self, before: LayerCost) -> LayerCost:
        """Return the cost of the candidate alone, found from the shapes at its two ends."""
        stride = 1 if before.input[1:] == before.output[1:] else 2
        with torch.device("meta"):
            op = torch.nn.Sequential(self._made(before, stride))
            rows = layer_costs(op, (torch.empty(1, *before.input),)).values()
        return LayerCost(
            kind=self.op,
            params=sum(row.params for row in rows),
            macs=sum(row.macs for row in rows) * before.calls,
            bytes=sum(row.bytes for row in rows),
            input=before.input,
            output=before.output,
            calls=before.calls,
        )

    def _made(self, before: LayerCost, stride: int) -> torch.nn.Module:
        """The candidate as its name says."""
        inputs, outputs = before.input[0], before.output[0]
        if is_block(self.op):
            return block(self.op, inputs, outputs, stride)
        return operation(self.op, inputs, stride, affine=False)
