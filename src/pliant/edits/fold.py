"""A batch norm disappears into the layer before it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pliant.cost import LayerCost
from pliant.edits.edit import LAYER, Replaced, layer_of
from pliant.errors import EditError
from pliant.math.quantize import column
from pliant.nn import layers


@dataclass(frozen=True)
class Fold:
    """Multiplies a batch norm, as it is in evaluation, into the layer whose output it reads.

    Args:
        layer: name of the batch norm; an ``nn.Identity`` takes its place.
        into: name of the convolution or Linear before it; it gets a bias if it has none.

    Raises:
        EditError: the two do not fit each other, or there are no running statistics.
    """

    layer: str
    into: str = field(metadata={LAYER: True})

    @property
    def form(self) -> str:
        """``folded``."""
        return "folded"

    def apply(self, model: Any, *, weights: bool = True) -> Replaced:
        """Change weight and bias of the layer, and take the batch norm out."""
        norm, target = layer_of(model, self.layer), layer_of(model, self.into)
        self._check(model, norm, target)
        added: tuple[nn.Parameter, ...] = ()
        if target.bias is None:
            zeros = target.weight.detach().new_zeros(norm.num_features)
            target.bias = nn.Parameter(zeros, requires_grad=target.weight.requires_grad)
            added = (target.bias,)
        if weights:
            _multiply(norm, target)
        layers.replace(model, self.layer, nn.Identity().train(norm.training))
        return Replaced(tuple(norm.parameters()), added)

    def predict(self, before: LayerCost) -> LayerCost:
        """Return the cost of nothing: the bias counts for the layer that gets it."""
        return LayerCost("Identity", 0, 0, 0, (), before.input, before.output, before.calls)

    def _check(self, model: nn.Module, norm: Any, target: Any) -> None:
        fits = (
            isinstance(norm, _BatchNorm)
            and norm.running_mean is not None
            and layers.unreadable(model, self.into) is None
            and len(target.weight) == norm.num_features
        )
        if not fits:
            raise EditError(
                f"{self.layer} cannot be folded into {self.into}: a batch norm with running "
                "statistics and a layer with as many output channels are needed."
            )


@torch.no_grad()
def _multiply(norm: _BatchNorm, target: Any) -> None:
    assert norm.running_mean is not None and norm.running_var is not None
    gain = (norm.running_var.double() + norm.eps).rsqrt()
    shift = -norm.running_mean.double() * gain
    if norm.affine:
        gain, shift = gain * norm.weight, shift * norm.weight + norm.bias
    bias: Tensor = target.bias
    bias.copy_(bias * gain + shift)
    target.weight.copy_(target.weight * column(gain, target.weight))
