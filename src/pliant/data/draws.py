"""Training samples beside those of the loop's own batches, for methods that want more of them."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pliant.data.chance import generator, key_of, seeded
from pliant.data.sources import Batches, rows_of_rank
from pliant.data.splits import Data
from pliant.errors import DataError


@dataclass
class Draws:
    """An endless stream of training samples, whose place is plain numbers: it can be resumed.

    By index, samples come in the order in which `Data.batches` shuffles the same epoch, begun in
    its middle: whoever draws as many as each batch of that order holds, once at every batch, gets
    every sample once an epoch and never one of the batch itself. A stream of batches without index
    is gone through once more beside the loop, shuffled by a seed of its own.

    Args:
        data: of which the training split is drawn.
        seed: of the order.
        rank: number of this process; every one draws its own samples.
        world: number of processes.
    """

    data: Data
    seed: int
    rank: int = 0
    world: int = 1
    order: tuple[Any, Tensor, Tensor] | None = None  # of an epoch: key, rows, augmentation
    stream: tuple[list[int], Iterator[Any]] | None = field(default=None, repr=False)

    def take(
        self, place: list[int], count: int, *, epoch: int, rows: Tensor | None = None
    ) -> tuple[Any, list[int]]:
        """Draw from a place on.

        Args:
            place: epoch, passes and what was taken in this pass; the last result of this call.
            count: samples; a stream of batches gives what its batch holds.
            epoch: the place is begun anew where it has another one.
            rows: of the split to draw from; None for all.

        Returns:
            A batch, and the place behind it.
        """
        here = list(place) if place and place[0] == epoch else [epoch, 0, 0]
        source = self.data.source("train")
        if rows is None and isinstance(source, Batches) and source.indexed() is None:
            return self._next(source, here)
        return self._drawn(here, count, rows)

    def remove(self) -> None:
        """Let go of what is kept between two draws."""
        self.order = self.stream = None

    def _drawn(self, place: list[int], count: int, rows: Tensor | None) -> tuple[Any, list[int]]:
        source, key = self.data.indexed("train"), key_of(self.seed, place[0])
        if self.order is None or self.order[0] != place[0]:
            order = torch.arange(len(source)) if rows is None else rows
            order = order[torch.randperm(len(order), generator=generator(key))]
            mine = rows_of_rank(order, self.rank, self.world, even=True)
            moves = torch.rand(len(source), 3, generator=generator(key + 1))
            self.order = (place[0], mine, moves)
        _, mine, moves = self.order
        at = (len(mine) // 2 + place[2] + torch.arange(count)) % len(mine)
        chosen = mine[at]
        batch = next(
            seeded((source.batch(each, moves[each]) for each in (chosen,)), key_of(key, place[2]))
        )
        return batch, [place[0], 0, (place[2] + count) % len(mine)]

    def _next(self, source: Batches, place: list[int]) -> tuple[Any, list[int]]:
        epoch, passes, taken = place
        if self.stream is None or self.stream[0] != place:
            key = key_of(self.seed + 1, epoch, passes)
            batches = source.epoch(key, epoch, self.rank, self.world)
            for _ in range(taken):
                next(batches, None)
            self.stream = (place, batches)
        batch = next(self.stream[1], None)
        if batch is None:
            if not taken:
                raise DataError(
                    "A second batch was asked of the training data, but its loader gives none; "
                    "give a loader that can be gone through more than once."
                )
            return self._next(source, [epoch, passes + 1, 0])
        after = [epoch, passes, taken + 1]
        self.stream = (after, self.stream[1])
        return batch, after


def ranks() -> tuple[int, int]:
    """Return the number of this process, and how many train together."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()
