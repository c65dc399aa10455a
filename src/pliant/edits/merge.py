"""Two linear layers in a row become one."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from pliant.cost import LayerCost
from pliant.edits.edit import LAYER, Replaced, layer_of
from pliant.errors import EditError
from pliant.nn import factorized, layers


@dataclass(frozen=True)
class Merge:
    """Multiplies a pointwise layer into the layer whose output it reads.

    Args:
        layer: name of a convolution without groups, or a Linear. Kernel size, stride and padding
            stay: padding comes before both layers.
        reader: name of a pointwise convolution behind it, or of a Linear behind a Linear; an
            ``nn.Identity`` takes its place.
        outputs: how many channels the reader has at its output; the layer has them then.
        bias: whether one of the two has a bias; the layer has one then.

    Raises:
        EditError: the two do not fit each other, or are not what the edit says.
    """

    layer: str
    reader: str = field(metadata={LAYER: True})
    outputs: int
    bias: bool

    @classmethod
    def of(cls, model: nn.Module, layer: str, reader: str) -> Merge:
        """Return the edit for two layers of a model."""
        both = layer_of(model, layer), layer_of(model, reader)
        bias = any(module.bias is not None for module in both)
        return cls(layer, reader, len(both[1].weight), bias)

    @property
    def form(self) -> str:
        """``merged``."""
        return "merged"

    def apply(self, model: nn.Module, *, weights: bool = True) -> Replaced:
        """Change the layer, which stays the same object, and take its reader out."""
        first, second = layer_of(model, self.layer), layer_of(model, self.reader)
        self._check(model, first, second)
        old = (*first.parameters(), *second.parameters())
        learns = any(parameter.requires_grad for parameter in old)
        weight, bias = (_product if weights else _shapes)(first, second)
        first.weight = nn.Parameter(layers.in_layout_of(first.weight, weight), requires_grad=learns)
        first.bias = nn.Parameter(bias, requires_grad=learns) if self.bias else None
        setattr(first, "out_features" if _linear(first) else "out_channels", self.outputs)
        layers.replace(model, self.reader, nn.Identity().train(second.training))
        for name in (self.layer, self.reader):
            factorized.answer_anew(model, name)
        return Replaced(old, tuple(first.parameters()))

    def predict(self, before: LayerCost) -> LayerCost:
        """Return the cost of the layer with its new outputs; its reader costs nothing more."""
        rows, *rest = before.weight
        params = self.outputs * (math.prod(rest) + self.bias)
        output = list(before.output)
        output[-1 if before.kind == "Linear" else 0] = self.outputs
        return replace(
            before,
            params=params,
            macs=before.macs * self.outputs // rows,
            bytes=before.bytes * params // before.params,
            weight=(self.outputs, *rest),
            output=tuple(output),
        )

    def _check(self, model: nn.Module, first: Any, second: Any) -> None:
        names = (self.layer, self.reader)
        readable = not any(layers.unreadable(model, name) for name in names)
        if not readable or not fits(first, second):
            raise EditError(
                f"{self.reader} cannot be merged into {self.layer}: two convolutions are needed, "
                "of which the first has no groups and the second is pointwise, or two Linear."
            )
        if Merge.of(model, *names) != self:
            raise EditError(
                f"{self.reader} and {self.layer} have other outputs or biases than the edit says: "
                "was the model built as the one that was edited?"
            )


def fits(first: Any, second: Any) -> bool:
    """Say whether the second of two plain layers can be multiplied into the first."""
    if type(first) is not type(second) or first.weight.dtype != second.weight.dtype:
        return False
    if first.weight.shape[0] != second.weight.shape[1]:
        return False
    return _linear(first) or (first.groups == second.groups == 1 and _pointwise(second))


def _pointwise(conv: Any) -> bool:
    # Padding by name keeps the size, so a kernel of 1 has none.
    padded = not isinstance(conv.padding, str) and any(conv.padding)
    return {*conv.kernel_size, *conv.stride} == {1} and not padded


def _linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear)


@torch.no_grad()
def _product(first: Any, second: Any) -> tuple[Tensor, Tensor]:
    outer = second.weight.double().flatten(1)
    weight = outer @ first.weight.double().flatten(1)
    bias = outer.new_zeros(len(outer))
    if first.bias is not None:
        bias += outer @ first.bias.double()
    if second.bias is not None:
        bias += second.bias
    kind = first.weight.dtype
    return weight.reshape(-1, *first.weight.shape[1:]).to(kind), bias.to(kind)


def _shapes(first: Any, second: Any) -> tuple[Tensor, Tensor]:
    weight, outputs = first.weight.detach(), len(second.weight)
    return weight.new_zeros(outputs, *weight.shape[1:]), weight.new_zeros(outputs)
