"""What every epoch of a training is made of: a pure function of its number."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from pliant.data.draws import ranks
from pliant.data.splits import Data
from pliant.errors import DataError, MethodError


@dataclass(frozen=True, eq=False)
class Epoch:
    """One pass over the training data, as the loop proposes it and a method may change it.

    Attributes:
        number: counted from 0.
        of: how many epochs there are, a broken one included.
        batch: samples per batch and process.
        samples: rows of the training split, whole numbers (n,), of which some may come more than
            once; or a share in 0..1 of all: the first of one shuffle by `seed`, so that larger
            shares hold smaller ones.
        rate: factor of the learning rate that the loop would have.
        seed: of everything random in it.
    """

    number: int
    of: int
    batch: int
    samples: Tensor | float = 1.0
    rate: float = 1.0
    seed: int = 0


Change = Callable[[Epoch, Data], Epoch]
Place = Callable[[], tuple[int, int, int]]
"""Where a loop stands: epochs and steps that are over, and how many steps it will take."""


@dataclass(eq=False)
class Epochs:
    """The epochs of a training, as a method wants them.

    Args:
        data: of which the training split is taken.
        count: how many; fractions are allowed.
        batch: samples per batch and process; a loader has its own.
        seed: of order, augmentation and shares.
        change: what a method makes of an epoch that is proposed to it; None leaves all alike.
        rank: number of this process.
        world: number of processes.
        at: the epoch whose batches were last given.
    """

    data: Data
    count: float
    batch: int
    seed: int = 0
    change: Change | None = None
    rank: int = 0
    world: int = 1
    at: int = -1
    known: dict[int, tuple[Epoch, Tensor | None]] = field(default_factory=dict, repr=False)
    lengths: dict[int, int] = field(default_factory=dict, repr=False)

    @property
    def steps(self) -> int:
        """Count the batches of all epochs; a part that rounds to none is one."""
        if not self.count:
            return 0
        whole, part = int(self.count), self.count - int(self.count)
        if self.change is None:  # one product, rounded once
            return max(1, round(self.count * self.length(0)))
        found = sum(self.length(number) for number in range(whole))
        return max(1, round(found + (part * self.length(whole) if part else 0)))

    def __getitem__(self, number: int) -> Epoch:
        """Return an epoch; what is asked for is checked.

        Raises:
            MethodError: the method wants what cannot be.
            DataError: it chooses samples or batches of a split that has no index.
        """
        return self._made(number)[0]

    def length(self, number: int) -> int:
        """Count the batches of an epoch that each process gets."""
        if number not in self.lengths:
            epoch, rows = self._made(number)
            self.lengths[number] = self.data.steps(epoch.batch, self.world, rows=rows)
        return self.lengths[number]

    @property
    def last(self) -> int:
        """The number of the last epoch."""
        return math.ceil(self.count) - 1

    def batches(self, number: int, *, start: int = 0) -> Iterator[Any]:
        """Give the batches of an epoch, from one of them on: see `Data.batches`."""
        epoch, rows = self._made(number)
        self.at = number
        return self.data.batches(
            "train",
            epoch.batch,
            seed=self.seed,
            epoch=number,
            augment=True,
            shuffle=True,
            rank=self.rank,
            world=self.world,
            start=start,
            rows=rows,
        )

    def served(self, place: Place) -> Iterable[Any]:
        """Return batches that are always those of the epoch at which a loop stands."""
        return _Served(self, place)

    def began(self, number: int) -> int:
        """Count the batches of all epochs before one."""
        return sum(self.length(earlier) for earlier in range(number))

    def rows(self, number: int) -> Tensor | None:
        """Return the rows of an epoch; None for all, as the split gives them."""
        return self._made(number)[1]

    def _made(self, number: int) -> tuple[Epoch, Tensor | None]:
        if number not in self.known:
            self.known.clear()  # of one epoch at a time: rows may be many
            self.known[number] = self._make(number)
        return self.known[number]

    def _make(self, number: int) -> tuple[Epoch, Tensor | None]:
        batch = self.data.batch_size(self.batch)
        plain = Epoch(number, math.ceil(self.count), batch, seed=self.seed)
        if self.change is None:
            return plain, None
        epoch = self.change(plain, self.data)
        self._check(epoch)
        whole = not isinstance(epoch.samples, Tensor) and epoch.samples == 1
        if whole and epoch.batch == plain.batch:
            return epoch, None
        return epoch, self._chosen(epoch)

    def _chosen(self, epoch: Epoch) -> Tensor:
        size = self.data.rows()
        if isinstance(epoch.samples, Tensor):
            low, high = int(epoch.samples.min()), int(epoch.samples.max())
            if low < 0 or high >= size:
                raise MethodError(
                    f"An epoch takes rows of the training split, 0 to {size - 1}, but epoch "
                    f"{epoch.number} wants {low} to {high}; choose among those that are there."
                )
            return epoch.samples.long()
        order = torch.randperm(size, generator=torch.Generator().manual_seed(epoch.seed))
        return order[: max(1, round(epoch.samples * size))]

    def _check(self, epoch: Any) -> None:
        """Refuse what is no epoch.

        Raises:
            MethodError: something else came, or a number out of its range.
        """
        if not isinstance(epoch, Epoch):
            raise MethodError(f"A method must give an Epoch for an epoch, not {epoch!r}.")
        wrong = ""
        if isinstance(epoch.samples, Tensor):
            numbers = epoch.samples.dtype in (torch.int64, torch.int32)
            if not numbers or epoch.samples.dim() != 1 or not len(epoch.samples):
                wrong = f"rows (n,), whole numbers and at least one, not {epoch.samples}"
        elif not 0 < epoch.samples <= 1:
            wrong = f"rows or a share in 0..1 above 0, not {epoch.samples!r}"
        if not isinstance(epoch.batch, int) or epoch.batch < 1:
            wrong = f"a batch of at least 1 sample, not {epoch.batch!r}"
        if not 0 < epoch.rate < math.inf:
            wrong = f"a factor of the learning rate above 0, not {epoch.rate!r}"
        if wrong:
            raise MethodError(f"Epoch {epoch.number} needs {wrong}; correct the method's epoch().")


class _Served:
    """Batches without a length: how many there are depends on the epoch."""

    def __init__(self, epochs: Epochs, place: Place) -> None:
        self.epochs, self.place = epochs, place

    def __iter__(self) -> Iterator[Any]:
        number, step, steps = self.place()
        past = step - self.epochs.began(number)
        counted = steps == self.epochs.steps and 0 < past < self.epochs.length(number)
        start = past if counted else 0
        broken = number == self.epochs.last and self.epochs.count % 1
        left = self.epochs.steps - self.epochs.began(number) - start if broken else None
        return islice(self.epochs.batches(number, start=start), left)


def planned(
    data: Data | None, count: float, batch: int, seed: int, change: Change | None
) -> Epochs | None:
    """Plan the epochs of a loop; None where it did not say how many it has.

    Raises:
        DataError: it said a part of what is needed.
    """
    if not count and not batch:
        return None
    if data is None or not data.has("train") or count <= 0 or batch < 1:
        raise DataError(
            "The data of epochs are planned from training data, epochs and batch together: call "
            "pliant.start(..., data=data, epochs=..., batch=...)."
        )
    return Epochs(data, count, batch, seed, change, *ranks())


def check_epoch(epochs: Epochs | None, number: int, method: str) -> None:
    """See that a loop trains on the batches that a method chose for an epoch.

    Raises:
        MethodError: it trains on others.
    """
    if epochs is None or epochs.at != number:
        raise MethodError(
            f"{method} chooses samples, batch size and learning rate of every epoch, but epoch "
            f"{number} trains on other batches: call pliant.start(..., data=data, epochs=..., "
            "batch=...) and take the batches of each epoch from run.batches()."
        )
