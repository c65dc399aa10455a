"""One layer becomes another, of a few that are known by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pliant.cost import LayerCost
from pliant.edits.edit import Replaced, layer_of
from pliant.errors import EditError
from pliant.nn import layers
from pliant.nn.filters import WEIGHTED, filter_count


@dataclass(frozen=True)
class Swap:
    """Puts a layer of a kind known by name in the place of another.

    Args:
        layer: the name of the layer to replace.
        form: ``identity`` in the place of a batch norm, or ``biased`` in that of a convolution or
            Linear without a bias: the same layer with a bias of zeros.

    Raises:
        EditError: the form is unknown or does not fit the layer.
    """

    layer: str
    form: str

    def apply(self, model: nn.Module, *, weights: bool = True) -> Replaced:
        """Put the new layer in the place of the old one."""
        module = layer_of(model, self.layer)
        if not self.layer:
            raise EditError("The model is this single layer: wrap it in nn.Sequential.")
        return self._known()[0](model, self.layer, module)

    def predict(self, before: LayerCost) -> LayerCost:
        """Return the cost of the new layer."""
        return self._known()[1](before)

    def _known(self) -> tuple[Put, Count]:
        if self.form not in SWAPS:
            raise EditError(
                f"Unknown form {self.form!r} for {self.layer}: one of {', '.join(SWAPS)}."
            )
        return SWAPS[self.form]


Put = Callable[[nn.Module, str, nn.Module], Replaced]
Count = Callable[[LayerCost], LayerCost]


def _put_identity(model: nn.Module, name: str, module: nn.Module) -> Replaced:
    if not isinstance(module, _BatchNorm):
        raise EditError(f"{name} must be a batch norm to become an identity, not {_kind(module)}.")
    layers.replace(model, name, nn.Identity().train(module.training))
    return Replaced(tuple(module.parameters()))


def _count_identity(before: LayerCost) -> LayerCost:
    return replace(before, kind="Identity", params=0, macs=0, bytes=0, weight=())


def _put_bias(model: nn.Module, name: str, module: nn.Module) -> Replaced:
    """The layer stays the same object; its weight keeps its momentum, the bias begins at none."""
    if not isinstance(module, WEIGHTED):
        raise EditError(
            f"{name} must be a convolution or Linear to be biased, not {_kind(module)}."
        )
    if module.bias is not None:
        raise EditError(f"{name} has a bias already.")
    weight = cast(nn.Parameter, module.weight)
    zeros = weight.new_zeros(filter_count(module))
    module.bias = bias = nn.Parameter(zeros, requires_grad=weight.requires_grad)

    def carried(momentum: Tensor) -> list[Tensor]:
        return [momentum, torch.zeros_like(bias)]

    return Replaced((weight,), (weight, bias), carried)


def _count_bias(before: LayerCost) -> LayerCost:
    outputs = before.output[-1 if before.kind == "Linear" else 0]
    size = before.bytes // max(1, before.params)
    return replace(before, params=before.params + outputs, bytes=before.bytes + size * outputs)


def _kind(module: nn.Module) -> str:
    return type(module).__name__


SWAPS: dict[str, tuple[Put, Count]] = {
    "identity": (_put_identity, _count_identity),
    "biased": (_put_bias, _count_bias),
}
"""The closed set of layers that a file may put in: how, and what they cost."""
