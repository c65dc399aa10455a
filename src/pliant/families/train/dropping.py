"""Where units are dropped while a network trains, and the hooks that drop them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from pliant.errors import ModelError
from pliant.nn.maxdropout import largest
from pliant.surgery.select import check_names, matches

RECTIFIERS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish)


def places(model: nn.Module, after: Sequence[str]) -> list[str]:
    """Name the modules behind which units are dropped: dropouts, or where none is, rectifiers.

    Args:
        model: the network.
        after: name patterns of other modules to take.

    Raises:
        MethodError: a name pattern fits no module.
        ModelError: there is neither a dropout nor a rectifier.
    """
    named = {name: module for name, module in model.named_modules() if name}
    if after:
        check_names(named, after)
        return [name for name in named if matches(name, after)]
    for kinds in ((_DropoutNd,), RECTIFIERS):
        if found := [name for name, module in named.items() if isinstance(module, kinds)]:
            return found
    raise ModelError(
        "maxdropout stands in the place of dropouts or behind rectifiers, but the model has "
        'no module of either kind: name others, maxdropout(after=("layer1", "layer2")).'
    )


class Masking:
    """A forward hook that drops units in training, and counts them since the last step.

    Args:
        drop: share of the range.
        mode: of `pliant.nn.maxdropout.largest`; "l2-random" draws a rate from 0..drop every time.
        scope: of the same.
        generator: of the rates.
    """

    def __init__(self, drop: float, mode: str, scope: str, generator: torch.Generator) -> None:
        self.drop, self.mode, self.scope, self.generator = drop, mode, scope, generator
        self.dropped, self.units = torch.zeros((), dtype=torch.int64), 0

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        """Drop, while the module trains."""
        if not module.training:
            return None
        rate = self.drop
        if self.mode == "l2-random":
            rate *= float(torch.rand((), generator=self.generator))
        mask = largest(output, rate, self.mode, self.scope)
        self.dropped, self.units = self.dropped + mask.sum(), self.units + mask.numel()
        return output.masked_fill(mask, 0.0)

    def remove(self) -> None:
        """Forget what was counted."""
        self.dropped, self.units = torch.zeros((), dtype=torch.int64), 0


class Resting:
    """A dropout that drops nothing, until it is asked to go on."""

    def __init__(self, layer: Any) -> None:
        self.layer, self.p = layer, layer.p
        layer.p = 0.0

    def remove(self) -> None:
        """Give the dropout its rate again."""
        self.layer.p = self.p
