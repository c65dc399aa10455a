"""A few inputs without labels: to look at, to learn from, and to judge by."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from pliant.cost import Example
from pliant.data import Data, unpack
from pliant.errors import DataError
from pliant.run import Run

HELD = 4  # one sample of so many is held out


@dataclass(frozen=True)
class Few:
    """A few training inputs in batches.

    Args:
        look: one pass over all of them, augmented as in training.
        held: the last quarter of them, which nothing is fitted to; all of them where they make
            one batch.
        rest: the others, as data, or as batches where a loader gave them.
        batch: samples of a batch.
        seed: of order and augmentation.
    """

    look: list[Example]
    held: list[Example]
    rest: Data | list[Example]
    batch: int
    seed: int

    def stream(self) -> Iterator[Example]:
        """Give batches of those that are not held out, without end, each time augmented anew."""
        if isinstance(self.rest, list):
            yield from itertools.cycle(self.rest)
            return
        for epoch in itertools.count():
            yield from _pass(self.rest, self.batch, self.seed, epoch)


def few(run: Run, count: int, batch: int) -> Few:
    """Draw a few training inputs.

    Args:
        run: must have training data.
        count: how many samples.
        batch: samples of a batch; a loader has its own.
    """
    assert run.data is not None
    try:
        some = run.data.subset(train=count, seed=run.seed)
    except DataError:  # a loader: what it gives first, again and again
        found = run.data.calibration(count, batch=batch, seed=run.seed)
        cut = max(1, len(found) - -(-len(found) // HELD))
        return Few(found, found[cut:] or found, found[:cut], batch, run.seed)
    total = some.size("train") or count
    cut = total - total // HELD
    look = list(_pass(some, batch, run.seed, 0))
    if cut in (0, total):
        return Few(look, look, some, batch, run.seed)
    held, rest = _part(some, cut, total), _part(some, 0, cut)
    return Few(look, list(_pass(held, batch, run.seed, 0)), rest, batch, run.seed)


def _part(data: Data, start: int, stop: int) -> Data:
    return replace(data, train=data.indexed("train").take(torch.arange(start, stop)))


def _pass(data: Data, batch: int, seed: int, epoch: int) -> Iterator[Example]:
    items = data.batches("train", batch, seed=seed, epoch=epoch, augment=True, shuffle=True)
    return (unpack(item)[0] for item in items)
