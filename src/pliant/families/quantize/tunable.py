"""A layer that rounds in every forward pass, with weight, bias and scales to be trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pliant.math.quantize import column, learnable, levels
from pliant.nn import kinds
from pliant.nn.packed import Bits, Values


class Tunable(nn.Module):
    """Stands in the place of a layer while it is fitted, and answers as that layer does.

    A layer of 16 bits learns in 32, which small steps need: it turns what it reads into them and
    what it gives back. ``weight`` is the rounded weight, in the type of the layer's own.

    Args:
        layer: of a kind of `pliant.nn.kinds`; its weight and bias are trained in place, but for
            those of 16 bits.
        bits: how its numbers will be written.
        values: where scales, groups and ranges begin.

    Attributes:
        scales: logarithms of the scales: they stay positive, and a step changes large and small
            ones by the same share.
    """

    def __init__(self, layer: Any, bits: Bits, values: Values) -> None:
        super().__init__()
        kinds.take_after(self, layer)
        self.kind, self.given = kinds.kind_of(layer), layer.weight.dtype
        self.layer = layer.requires_grad_(True).float()
        self.bits, self.index = bits, values.index
        self.zero = {"input": 0, "output": 0}
        self.scales = nn.ParameterDict({"weight": values.scales.log()})
        for side, found in (("input", values.input), ("output", values.output)):
            if found is not None:
                self.zero[side] = found[1]
                self.scales[side] = torch.tensor(found[0], device=layer.weight.device).log()

    @property
    def weight(self) -> Tensor:
        """The rounded weight, for whoever reads it besides."""
        return self._weight().to(self.given)

    @property
    def bias(self) -> Tensor | None:
        """The bias."""
        found: Tensor | None = getattr(self.layer, "bias", None)
        return None if found is None else found.to(self.given)

    def forward(self, input: Tensor, output_size: Any = None) -> Tensor:
        """Map the rounded input by the rounded weight."""
        x = self._activation(input.float(), "input", self.bits.input)
        bias = getattr(self.layer, "bias", None)
        x = kinds.applied(self.layer, x, self._weight(), bias, output_size)
        return self._activation(x, "output", self.bits.output).to(input.dtype)

    def level(self) -> float:
        """Return the distance between two levels of the weight, the mean over its groups."""
        return float(self.scales["weight"].detach().exp().mean())

    @torch.no_grad()
    def centre(self) -> None:
        """Move every weight half the way to its level: the same answers, and room for small steps.

        Steps by straight-through gradients gather weights where rounding turns over, so that the
        next ones would flip a third of them at once. Right at their levels they would give scales
        no gradient.
        """
        self.layer.weight.lerp_(self._weight(), 0.5)

    def values(self) -> Values:
        """Return the numbers as they are now."""
        ranges = {
            side: (self.scales[side].exp().item(), self.zero[side]) if side in self.scales else None
            for side in ("input", "output")
        }
        bias = getattr(self.layer, "bias", None)
        weight, scales = self.layer.weight.detach(), self.scales["weight"].detach().exp()
        return Values(weight, scales, self.index, None if bias is None else bias.detach(), **ranges)

    def _weight(self) -> Tensor:
        rows = kinds.to_rows(self.layer, self.layer.weight)
        scale = column(self.scales["weight"].exp()[self.index], rows)
        count = rows.numel() // self.bits.scales
        rows = learnable(rows, scale, *levels(self.bits.weight), count)
        return kinds.from_rows(self.layer, rows)

    def _activation(self, x: Tensor, side: str, bits: int) -> Tensor:
        if not bits:
            return x
        low = -self.zero[side]
        return learnable(x, self.scales[side].exp(), low, low + 2**bits - 1, x.shape[1:].numel())


def tunable(model: nn.Module, plans: Mapping[str, tuple[Bits, Values]]) -> None:
    """Put tunable layers in the place of the named ones, and freeze everything else."""
    model.requires_grad_(False)
    for name, (bits, values) in plans.items():
        layer = model.get_submodule(name)
        kinds.put(model, layer, Tunable(layer, bits, values))


def tunables(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Go through the tunable layers of a model."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, Tunable))
