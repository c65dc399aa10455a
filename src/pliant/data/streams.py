"""Batches out of a source: which rows come when, and what is left out."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pliant.cost import Example
from pliant.data.chance import generator, key_of, under
from pliant.data.sources import Batches, Indexed, Items, Source, Tensors, gather, unpack


def last_tenth(source: Indexed, seed: int) -> tuple[Any, Any]:
    """Divide a source by a seeded permutation: nine tenths, and the last tenth or None."""
    order = torch.randperm(len(source), generator=generator(seed))
    first = len(order) - len(order) // 10
    rest = source.take(order[first:]) if first < len(order) else None
    return source.take(order[:first]), rest


def made(
    source: Indexed, chunks: list[Tensor], moves: Tensor | None, key: int, start: int = 0
) -> Iterator[Any]:
    """Make the batches from one on; each of a data set has a random state of its own."""
    for number, rows in enumerate(chunks[start:], start):
        batch = partial(source.batch, rows, None if moves is None else moves[rows])
        yield batch() if isinstance(source, Tensors) else under(key_of(key, number), batch)


def cut(batches: Iterator[Any], start: int, stop: int | None) -> Iterator[Any]:
    """Give the batches from one on, and up to another."""
    for number, batch in enumerate(batches):
        if stop is not None and number >= stop:
            return
        if number >= start:
            yield batch


def drawn(source: Source, count: int, seed: int, *, shuffle: bool) -> Example:
    """Return the first inputs of a source, or some of them at random where they have an index.

    Args:
        source: a stream gives those of its first batches.
        count: how many; fewer if it has or takes no more.
        seed: of the choice.
        shuffle: whether to choose at random.
    """
    if isinstance(source, Batches):
        indexed = source.items(seed)
        if indexed is None:
            return gather((unpack(batch)[0] for batch in source.given(seed)), count)
        source = indexed
    order = torch.arange(len(source))
    if shuffle:
        order = order[torch.randperm(len(source), generator=generator(seed))]
    order = order[: most(source, count)]
    return unpack(next(made(source, [order], None, seed)))[0]


def most(source: Source, batch: int) -> int:
    """Return how many samples a batch of a source holds, of those asked for."""
    return min(batch, (source.most if isinstance(source, Items) else None) or batch)


def prepared(source: Tensors, resized: tuple[int, ...]) -> dict[str, str]:
    """Say what is done to samples in memory before a network reads them: see `Data.prepared`."""
    image = source.inputs.dtype == torch.uint8 and source.inputs.dim() == 4
    scaled = "scaled to 0..1" if image else ""
    if source.mean:
        numbers = (", ".join(f"{v:.4g}" for v in row) for row in (source.mean, source.std))
        scaled += "{}mean {}, deviation {}".format("; " if scaled else "", *numbers)
    return {
        "resized": "x".join(map(str, resized)) or "no",
        "normalized": scaled or "no",
        "augmented": "crop-flip" if source.crop_flip else "no",
    }
