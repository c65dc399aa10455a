"""Marks of channels over the samples of a batch, and what they say belongs together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Slot = tuple[str, str]
"""A layer and one of its sides."""

ROWS = 128  # samples of a batch that carries the marks of several layers
HELD = 2**25  # numbers in the largest output of a layer for all of them


@dataclass
class Union:
    """Which things belong together, by the usual tree of parents."""

    parent: list[int]
    joined: int = 0  # how often two became one

    def find(self, item: int) -> int:
        """Return what stands for all that an item belongs to."""
        while self.parent[item] != item:
            self.parent[item] = self.parent[self.parent[item]]
            item = self.parent[item]
        return item

    def join(self, one: int, other: int) -> None:
        """Let two items, and all that belongs to either, belong together."""
        first, second = self.find(one), self.find(other)
        self.joined += first != second
        self.parent[first] = second


def codes_of(channels: int, heads: Mapping[int, int] | None = None) -> Tensor:
    """Give every channel its number in binary, each digit as two samples: one is marked.

    So the marks of two channels are never inside those of a third. The first sample has no marks.

    Args:
        channels: how many there are.
        heads: how wide heads are by how many channels become some: their number and the place in
            one have digits of their own, so that the marks of all channels of a head are never
            inside those of another head.
    """
    axes = [axis for axis in heads or () if channels % axis == 0]
    width = heads[max(axes)] if heads and axes else 1
    places, numbers = (width - 1).bit_length(), torch.arange(channels)
    numbers = ((numbers // width) << places) + numbers % width
    digits = max(1, int(numbers[-1]).bit_length())
    bits = torch.stack([(numbers >> digit) & 1 for digit in range(digits)]).bool()
    return torch.cat([torch.zeros(1, channels, dtype=torch.bool), bits, ~bits])


def covered(codes: Tensor, pattern: Tensor) -> list[int]:
    """Return the channels all of whose marks are in a pattern: one for a single channel."""
    inside: Tensor = (codes <= pattern[:, None]).all(0)
    return inside.nonzero().flatten().tolist()


def met(codes: Tensor, marks: Tensor) -> Iterator[tuple[list[int], list[int]]]:
    """Yield channels, and the places at which all of them arrived and no others.

    Behind a norm that mixes all channels every place has the same marks: they are read once.

    Args:
        codes: (samples, channels).
        marks: which places are marked in which samples, (samples, places).
    """
    places = marks.any(0).nonzero().flatten()
    if not len(places):
        return
    patterns, kinds, counts = torch.unique(
        marks[:, places], dim=1, return_inverse=True, return_counts=True
    )
    each = iter(places[kinds.argsort(stable=True)].split(counts.tolist()))
    for some in patterns.split(max(1, HELD // codes.shape[1]), 1):
        inside = (~some).float().T @ codes.float() == 0  # (patterns, channels)
        found = inside.nonzero()[:, 1].split(inside.sum(1).tolist())
        for channels, there in zip(found, each, strict=False):
            if len(channels):
                yield channels.tolist(), there.tolist()


@dataclass(frozen=True)
class Block:
    """The samples of a batch in which the outputs of one layer are marked.

    Args:
        source: the layer.
        codes: which of its channels are marked in which of these samples; in the first none.
        rows: these samples.
    """

    source: Slot
    codes: Tensor
    rows: slice


def together(needed: Mapping[Slot, int], largest: Callable[[], int]) -> Iterator[list[Slot]]:
    """Cut layers into runs whose codes fit into one batch; the first run is one layer.

    Args:
        needed: how many samples the codes of each layer take.
        largest: numbers in the largest output of a layer, for one sample, as far as it is known.
    """
    slots = list(needed)
    found, rows, most = slots[:1], 0, 0
    for slot in slots[1:]:
        more = needed[slot]
        if rows + more > most:
            yield found
            found, rows, most = [], 0, min(ROWS, HELD // max(1, largest()))
        found.append(slot)
        rows += more
    if found:
        yield found
