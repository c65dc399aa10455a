"""Channels come to one side of one layer: the inverse of pruning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pliant.cost import LayerCost
from pliant.edits.build import drawing
from pliant.edits.edit import OPTIONAL, Replaced, layer_of
from pliant.edits.prune import Cut, renewed, resized
from pliant.edits.sides import KERNELS, sides
from pliant.errors import EditError
from pliant.nn import kinds
from pliant.nn.layers import shared_weights

NEW = -1  # in the place of an old channel: none, the channel begins afresh

_MADE = ("weight", "bias", "running_mean", "running_var")
_NEUTRAL = {"weight": 1.0, "running_var": 1.0}  # of a new channel of a norm; 0 for the others


@dataclass(frozen=True)
class Widen:
    """Gives one side of a layer more channels, each a copy of an old one or new.

    One edit alone rarely leaves a network that runs: all layers that the channels pass must be
    widened. ``pliant.surgery.widen`` finds them, and proves that the network computes the same.
    It does, since what reads copies divides its weights among them, and what reads new channels
    begins with zeros.

    On the sides ``out`` and ``channels`` copies are exact; a new filter is drawn as He et al.
    (2015) do, with a bias of 0, and a new channel of a norm is neutral. In an optimizer's state an
    old channel keeps its numbers, at the first place where it stands, and all others begin with
    zeros: so copies part from each other as soon as there is momentum. In Adam the first steps of
    what is new are up to three times as long, since its count of steps is that of the layer.

    Source: Chen, Goodfellow and Shlens, "Net2Net: accelerating learning via knowledge transfer",
    ICLR 2016. *Departs from the paper*: copies do not get noise; they part by momentum, or share
    unevenly, which leaves the function as it was.

    Args:
        layer: name of a Conv1d/2d/3d, ConvTranspose1d/2d/3d, Linear, batch, instance or group
            norm, or PReLU.
        side: ``out``, ``in`` or ``channels``, as in `Prune`.
        source: for every channel there is afterwards, the old channel that it is or copies, or
            -1 for a new one. Every old channel is among them; those of a group of a grouped
            convolution stay in it.
        of: how many channels there are before.
        spread: how unevenly copies share what reads them: 0 for alike, below 1. With more, their
            gradients differ from the first step.
        seed: of new filters and uneven shares.

    Raises:
        EditError: the layer has no such side or not these channels, or shares its weights.

    >>> model = nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 1))
    >>> before = model(torch.ones(1, 1))
    >>> for edit in (Widen("0", "out", (0, 1, 0), 2), Widen("1", "in", (0, 1, 0), 2)):
    ...     _ = edit.apply(model)
    >>> model, bool(torch.allclose(model(torch.ones(1, 1)), before))
    (Sequential(
      (0): Linear(in_features=1, out_features=3, bias=True)
      (1): Linear(in_features=3, out_features=1, bias=True)
    ), True)
    """

    layer: str
    side: str
    source: tuple[int, ...]
    of: int
    spread: float = field(default=0.0, metadata=OPTIONAL)
    seed: int = field(default=0, metadata=OPTIONAL)

    @property
    def form(self) -> str:
        """What the layer becomes."""
        return "widened"

    @property
    def to(self) -> int:
        """How many channels there are afterwards."""
        return len(self.source)

    def apply(self, model: nn.Module, *, weights: bool = True) -> Replaced:
        """Make the layer's tensors larger, in place."""
        module = layer_of(model, self.layer)
        self._check(model, module)
        names = ("weight",) if self.side == "in" else _MADE
        tensors = [
            (name, self._made(module, name, weights=weights), self._state(module))
            for name in names
            if hasattr(module, name)
        ]
        return renewed(module, self.side, self.to, tensors)

    def predict(self, before: LayerCost) -> LayerCost:
        """Return the cost of the layer with more channels."""
        return resized(before, self.side, self.to, self.of)

    def _made(self, module: nn.Module, name: str, *, weights: bool) -> Cut:
        """What makes the wider tensor of a name."""
        new = [place for place, old in enumerate(self.source) if old == NEW]

        def make(tensor: Tensor) -> Tensor:
            wide = self._taken(module, tensor)
            if not weights:
                return self._back(module, wide)
            if self.side == "in":
                wide = wide * self._shares(wide)
            wide[new] = self._begun(module, name, wide[new])
            return self._back(module, wide)

        return make

    def _state(self, module: nn.Module) -> Cut:
        """What makes a tensor of an optimizer's state wider."""
        first = {old: place for place, old in reversed(list(enumerate(self.source)))}
        later = [n for n, old in enumerate(self.source) if old == NEW or first[old] != n]

        def make(tensor: Tensor) -> Tensor:
            wide = self._taken(module, tensor)
            wide[later] = 0
            return self._back(module, wide)

        return make

    def _taken(self, module: nn.Module, tensor: Tensor) -> Tensor:
        """The numbers of every channel there is afterwards, channels first."""
        groups = getattr(module, "groups", 1)
        if isinstance(module, kinds.TRANSPOSED) and tensor.dim() > 1:
            tensor = kinds.turned(tensor, groups)
        if self.side == "in":
            tensor = kinds.turned(tensor, groups)
        else:
            tensor = tensor.unflatten(0, (self.of, -1))
        index = torch.tensor([max(0, old) for old in self.source], device=tensor.device)
        return tensor.index_select(0, index)

    def _back(self, module: nn.Module, wide: Tensor) -> Tensor:
        groups = getattr(module, "groups", 1)
        rows = kinds.turned(wide, groups) if self.side == "in" else wide.flatten(0, 1)
        if isinstance(module, kinds.TRANSPOSED) and rows.dim() > 1:
            rows = kinds.turned(rows, self.to if self.side == "channels" else groups)
        return rows.contiguous()

    def _shares(self, wide: Tensor) -> Tensor:
        """What part of the weights that read an old channel each of its copies gets."""
        with drawing(self.seed, f"{self.layer} shares"):
            parts = 1 + self.spread * (2 * torch.rand(self.to, dtype=torch.float64) - 1)
        index = torch.tensor(self.source) + 1  # what is new shares with nobody
        sums = torch.zeros(self.of + 1, dtype=torch.float64).index_add_(0, index, parts)
        shares = (parts / sums[index]).to(wide)
        return shares.reshape(-1, *[1] * (wide.dim() - 1))

    def _begun(self, module: nn.Module, name: str, wide: Tensor) -> Tensor:
        """What new channels begin with."""
        if self.side == "in" or name == "bias":
            return torch.zeros_like(wide)
        if isinstance(module, nn.PReLU):
            return torch.full_like(wide, 0.25)
        if not isinstance(module, (*KERNELS, nn.Linear)):
            return torch.full_like(wide, _NEUTRAL.get(name, 0.0))
        fan = max(1, wide[0, 0].numel()) if len(wide) else 1
        with drawing(self.seed, self.layer):
            return (torch.randn(wide.shape) * (2 / fan) ** 0.5).to(wide)

    def _check(self, model: nn.Module, module: nn.Module) -> None:
        size = sides(module).get(self.side)
        if size is None:
            raise EditError(
                f"{self.layer} is a {type(module).__name__}, which cannot get channels on the side "
                f"{self.side!r}."
            )
        kept = {*self.source} - {NEW}
        if size != self.of or self.to <= self.of or kept != set(range(self.of)):
            raise EditError(
                f"{self.layer} has {size} channels on the side {self.side!r}, so it cannot have "
                f"{self.to} made of {self.of} ({str(self.source)[:60]}): more are needed than "
                "before, the old ones all among them, and -1 for new ones."
            )
        if not 0 <= self.spread < 1:
            raise EditError(f"spread of {self.layer} must lie in 0..1, not {self.spread}.")
        groups = getattr(module, "groups", 1) if self.side != "channels" else 1
        width = self.of // module.num_groups if isinstance(module, nn.GroupNorm) else 1
        if self.to % width:
            raise EditError(f"{self.layer} must get whole groups of {width} channels.")
        if not _stays_in_groups(self.source, self.of, groups):
            raise EditError(
                f"{self.layer} has {groups} groups, which must get equally many channels, copies "
                "of their own."
            )
        shared = shared_weights(model)
        tied = [name for p in module.parameters() for name in shared.get(id(p), ())]
        others = [name for name in tied if name.rpartition(".")[0] != self.layer]
        if others:
            raise EditError(f"{self.layer} cannot be widened: its weight is tied to {others[0]}.")


def _stays_in_groups(source: Sequence[int], of: int, groups: int) -> bool:
    if len(source) % groups:
        return False
    narrow, wide = of // groups, len(source) // groups
    return all(old == NEW or old // narrow == n // wide for n, old in enumerate(source))


def inserted(size: int, after: dict[int, Any]) -> tuple[int, ...]:
    """Return the source of a side that keeps its channels and gets others between them.

    Args:
        size: how many channels there are.
        after: what comes behind an old channel: old channels to copy, or -1.

    >>> inserted(3, {1: (0, -1)})
    (0, 1, 0, -1, 2)
    """
    return tuple(new for old in range(size) for new in (old, *after.get(old, ())))
