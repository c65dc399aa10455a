"""Channels change places: some are picked out, or put where others expect them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.cost import LayerCost
from pliant.errors import EditError

MOST = 2**20  # channels: what comes from a file must not fill the memory


class Gather(nn.Module):
    """Picks out channels, in the order that is said.

    Args:
        places: which channels, by their places.
    """

    spec: ClassVar[Mapping[str, type]] = {"places": tuple}
    index: Tensor

    def __init__(self, places: Sequence[int]) -> None:
        super().__init__()
        self.places = tuple(places)
        self.register_buffer("index", torch.tensor(self.places), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels, ...) to (N, picked, ...)."""
        return x.index_select(1, self.index)

    def extra_repr(self) -> str:
        """Say how many are picked."""
        return f"{len(self.places)} channels"

    @classmethod
    def build(cls, layer: Any, spec: Mapping[str, Any]) -> Gather:
        """Make it; what it reads is seen when it runs."""
        _check(spec["places"], max(_whole(spec["places"]), default=0) + 1)
        return cls(spec["places"])

    @classmethod
    def predict(cls, before: LayerCost, spec: Mapping[str, Any]) -> LayerCost:
        """It costs no product and nothing that is saved.

        Where it comes before a layer that was cut to what is picked, more channels come than that.
        """
        places, known = spec["places"], before.output[0]
        cut = known == len(places)
        of = max(known, *(place + 1 for place in _whole(places))) if cut else known
        return _moved(cls, before, places, of, len(places))


class Scatter(nn.Module):
    """Puts channels to places among more, which are zero but for them.

    So branches that keep different channels can be added: to ``x`` of all channels, what a branch
    has of some is added at their places.

    Args:
        places: where each channel goes.
        of: how many channels there are then.
    """

    spec: ClassVar[Mapping[str, type]] = {"places": tuple, "of": int}
    index: Tensor

    def __init__(self, places: Sequence[int], of: int) -> None:
        super().__init__()
        self.places, self.of = tuple(places), of
        index = torch.full((of,), len(self.places))  # a channel of zeros stands behind the others
        index[torch.tensor(self.places)] = torch.arange(len(self.places))
        self.register_buffer("index", index, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels, ...) to (N, of, ...)."""
        return F.pad(x, (0, 0) * (x.dim() - 2) + (0, 1)).index_select(1, self.index)

    def extra_repr(self) -> str:
        """Say how many go among how many."""
        return f"{len(self.places)} channels among {self.of}"

    @classmethod
    def build(cls, layer: Any, spec: Mapping[str, Any]) -> Scatter:
        """Make it; what it reads is seen when it runs."""
        _check(spec["places"], spec["of"])
        return cls(spec["places"], spec["of"])

    @classmethod
    def predict(cls, before: LayerCost, spec: Mapping[str, Any]) -> LayerCost:
        """It costs no product and nothing that is saved."""
        found = before.output[0]
        if found != len(spec["places"]):
            raise EditError(
                f"gives {found} channels to {len(spec['places'])} places: name as many."
            )
        return _moved(cls, before, spec["places"], spec["of"], spec["of"])


def _whole(places: Sequence[Any]) -> list[int]:
    return [place for place in places if type(place) is int]


def _check(places: Sequence[Any], of: int) -> None:
    whole = _whole(places)
    fits = len({*whole}) == len(places) and all(0 <= place < of <= MOST for place in whole)
    if not places or not fits:
        raise EditError(
            f"has channels whose places must be different whole numbers below {min(of, MOST)}, "
            f"not {str(places)[:60]}."
        )


def _moved(
    kind: type[nn.Module], before: LayerCost, places: Sequence[int], of: int, channels: int
) -> LayerCost:
    _check(places, of)
    shape = (channels, *before.output[1:])
    row = replace(before, kind=kind.__name__, input=before.output, output=shape)
    return replace(row, params=0, macs=0, bytes=0, weight=(), parts=())
