"""A few inputs without labels: to look at, to learn from, and to judge by."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from pliant.cost import Example
from pliant.data import Data, unpack
from pliant.data.task import Task
from pliant.errors import DataError
from pliant.run import Run

HELD = 4  # one sample of so many is held out


class Shown(NamedTuple):
    """Inputs of one forward call, and the batch that they come from where its labels count."""

    inputs: Example
    batch: Any = None


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
        task: whose loss counts with the labels; None where outputs are compared only.
    """

    look: list[Example]
    held: list[Shown]
    rest: Data | list[Shown]
    batch: int
    seed: int
    task: Task | None = None

    def stream(self) -> Iterator[Shown]:
        """Give batches of those that are not held out, without end, each time augmented anew."""
        if isinstance(self.rest, list):
            yield from itertools.cycle(self.rest)
            return
        for epoch in itertools.count():
            yield from _pass(self.rest, self.batch, self.seed, epoch, self.task)


def shown(run: Run, count: int, batch: int) -> Iterator[Example]:
    """Give the inputs to look at, if there are any, drawn where the first is asked for."""
    if run.has_inputs:
        yield from few(run, count, batch).look


def few(run: Run, count: int, batch: int) -> Few:
    """Draw a few training inputs.

    Args:
        run: must have training data.
        count: how many samples.
        batch: samples of a batch; a loader has its own.
    """
    assert run.data is not None
    task = run.task if run.task is not None and run.task.judges else None
    try:
        some = run.data.subset(train=count, seed=run.seed)
    except DataError:  # a loader: what it gives first, again and again
        items = run.data.calibration_batches(count, batch=batch, seed=run.seed)
        found = [_shown(item, task) for item in items]
        cut = max(1, len(found) - -(-len(found) // HELD))
        inputs = [each.inputs for each in found]
        return Few(inputs, found[cut:] or found, found[:cut], batch, run.seed, task)
    total = some.size("train") or count
    cut = total - total // HELD
    whole = list(_pass(some, batch, run.seed, 0, task))
    look = [each.inputs for each in whole]
    if cut in (0, total):
        return Few(look, whole, some, batch, run.seed, task)
    held, rest = _part(some, cut, total), _part(some, 0, cut)
    return Few(look, list(_pass(held, batch, run.seed, 0, task)), rest, batch, run.seed, task)


def _part(data: Data, start: int, stop: int) -> Data:
    return replace(data, train=data.indexed("train").take(torch.arange(start, stop)))


def _pass(data: Data, batch: int, seed: int, epoch: int, task: Task | None) -> Iterator[Shown]:
    items = data.batches("train", batch, seed=seed, epoch=epoch, augment=True, shuffle=True)
    return (_shown(item, task) for item in items)


def _shown(item: Any, task: Task | None) -> Shown:
    return Shown(unpack(item)[0]) if task is None else Shown(task.inputs(item), item)
