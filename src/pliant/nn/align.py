"""Lets a layer compute with aligned filters, until they are folded into a plain weight."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from pliant.math.filters import align
from pliant.nn.filters import filter_count, filter_layout


class Align(nn.Module):
    """Turns a kernel into aligned filters: a parametrization with a gain for each of them."""

    def __init__(self, layer: Any, *, scale: float, eps: float, gain: float, learn: bool) -> None:
        super().__init__()
        self.scale, self.eps = scale, eps
        self.layout = filter_layout(layer)
        gains = layer.weight.new_full((filter_count(layer),), gain)
        self.gain = nn.Parameter(gains, requires_grad=learn)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the aligned kernel."""
        return align(weight, self.gain, scale=self.scale, eps=self.eps, **self.layout)


class Aligned:
    """A layer that computes with aligned filters; ``remove`` folds them into a plain weight."""

    def __init__(self, layer: Any, align: Align) -> None:
        self.layer, self.align = layer, align
        parametrize.register_parametrization(layer, "weight", align)

    @property
    def raw(self) -> nn.Parameter:
        """The kernel that is trained."""
        found: nn.Parameter = self.layer.parametrizations.weight.original
        return found

    def remove(self) -> None:
        """Fold: the weight is then what the layer has computed with."""
        if not parametrize.is_parametrized(self.layer, "weight"):
            return
        parametrize.remove_parametrizations(self.layer, "weight", leave_parametrized=True)
        # The weight comes back as the last parameter; put it before the bias, where it was.
        self.layer.register_parameter("bias", self.layer._parameters.pop("bias"))
