"""The kinds of data a split can be: tensors, items with an index, a loader of batches."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import DataLoader, IterableDataset, Subset, default_collate
from torch.utils.data.distributed import DistributedSampler

from pliant.cost import Example, counted, mapped, tensors
from pliant.cost.call import is_named
from pliant.data.chance import seeded, unbound
from pliant.data.together import Collate, together
from pliant.errors import DataError, PliantError

LABELS = ("labels", "label", "targets", "target")  # what labels are called in a batch with names
ANSWERS = (*LABELS, "y")  # and among the fields of a named tuple
IGNORED = -100  # the label that cross-entropy leaves out


def unpack(batch: Any) -> tuple[Example, Any]:
    """Take a batch apart into the arguments of a forward call and the labels.

    A tuple ends with its labels: (a, b, labels) becomes ((a, b), labels), and two inputs without
    labels are written as ((a, b),) or by name. A mapping keeps its names: everything but "labels"
    (or label, targets, target) is an input; so it is with the fields of a named tuple ("y" too),
    which are given by place. A dataclass is an input as it is, or by the names of its fields;
    one called as a label holds the labels. Anything else, a lone tensor or a graph, is an input
    without labels; None stands for them.
    """
    if isinstance(batch, Mapping):
        name = next((name for name in LABELS if name in batch), None)
        return {k: v for k, v in batch.items() if k != name}, batch[name] if name else None
    if is_named(batch):
        name = next((name for name in ANSWERS if name in batch._fields), None)
        inputs = tuple(getattr(batch, field) for field in batch._fields if field != name)
        return inputs, getattr(batch, name) if name else None
    if is_dataclass(batch):
        name = next((field.name for field in fields(batch) if field.name in ANSWERS), None)
        return (batch,), getattr(batch, name) if name else None
    alone = not isinstance(batch, list | tuple) or isinstance(batch, PackedSequence)
    if not alone and len(batch) > 1:
        *inputs, labels = batch
        if labels is None or (isinstance(labels, list) and all(each is None for each in labels)):
            return tuple(inputs), None
        return tuple(inputs), labels
    return ((batch,) if alone else tuple(batch)), None


@dataclass(frozen=True, eq=False)
class Tensors:
    """Inputs and labels in memory; uint8 images are scaled and normalised as they are taken.

    Without labels, None stands for them, and batches are tuples of inputs alone.
    """

    inputs: Tensor
    labels: Tensor | None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    crop_flip: bool = False

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, rows: Tensor) -> Any:
        """Cut out rows, as a split of its own."""
        return self.inputs[rows] if self.labels is None else (self.inputs[rows], self.labels[rows])

    def batch(self, rows: Tensor, moves: Tensor | None = None) -> tuple[Tensor, ...]:
        """Give rows as a model takes them, images moved and mirrored by `moves` (rows, 3)."""
        inputs = self.inputs[rows]
        if moves is not None and self.crop_flip and inputs.dim() == 4:
            inputs = crop_flip(inputs, moves)
        inputs = self._normalized(inputs)
        if self.labels is None:
            return (inputs,)
        labels = self.labels[rows]
        return inputs, labels if labels.is_floating_point() else labels.long()

    def _normalized(self, inputs: Tensor) -> Tensor:
        image = inputs.dtype == torch.uint8 and inputs.dim() == 4
        if not image and not self.mean:
            return inputs
        shape = (1, -1, *[1] * (inputs.dim() - 2))
        scale = 255.0 if image else 1.0
        mean = torch.tensor(self.mean or (0.0,)).view(shape) * scale
        std = torch.tensor(self.std or (1.0,)).view(shape) * scale
        return (inputs - mean).div_(std)


@dataclass(frozen=True, eq=False)
class Columns:
    """Samples in memory, as a batch of all of them: a mapping, or a tuple, of tensors.

    Args:
        whole: tensors, however nested, with a row for every sample.
    """

    whole: Any

    def __len__(self) -> int:
        return len(next(tensors(self.whole)))

    def take(self, rows: Tensor) -> "Columns":
        """Cut out rows, as a split of its own."""
        return Columns(mapped(lambda tensor: tensor[rows], self.whole))

    def batch(self, rows: Tensor, moves: Tensor | None = None) -> Any:
        """Give rows as one batch."""
        return self.take(rows).whole


@dataclass(frozen=True, eq=False)
class Items:
    """A data set with length and index, whose items are put together into batches.

    Args:
        items: the data set.
        collate: makes a batch of a list of its items.
        most: samples of a batch at most; 1 where they differ in shape. None for no limit.
    """

    items: Any
    collate: Collate = together
    most: int | None = None

    def __len__(self) -> int:
        return len(self.items)

    def take(self, rows: Tensor) -> "Items":
        """Cut out rows, as a split of its own."""
        return replace(self, items=Subset(self.items, rows.tolist()))

    def batch(self, rows: Tensor, moves: Tensor | None = None) -> Any:
        """Give rows as one batch; augmentation is the data set's own affair."""
        return unbound(self.collate(self.read(rows.tolist())))

    def read(self, rows: Iterable[int]) -> list[Any]:
        """Read samples by number.

        Raises:
            DataError: the data set fails to give one.
        """
        found = []
        for row in rows:
            try:
                found.append(self.items[row])
            except PliantError:
                raise
            except Exception as error:  # it is not our code
                row = self.items.indices[row] if isinstance(self.items, Subset) else row
                raise DataError(
                    f"Sample {row} cannot be read: the data set fails with "
                    f"{type(error).__name__}: {error}; mend it, or leave the sample out."
                ) from error
        return found


@dataclass(frozen=True, eq=False)
class Batches:
    """A user's DataLoader or another iterable of batches, iterated as it is."""

    loader: Any

    @property
    def samples(self) -> int | None:
        """How many samples there are, None where the loader cannot tell."""
        items: Any = getattr(self.loader, "dataset", None)
        return len(items) if hasattr(items, "__len__") else None

    def steps(self, world: int) -> int:
        """Count the batches that each of `world` processes gets."""
        listed = isinstance(self.loader, list | tuple | Loose)
        try:
            batches = sum(1 for _ in self) if listed else len(self.loader)
        except TypeError as error:
            raise DataError(
                "A training must know how many batches an epoch has, but these have no length: "
                "give list(batches), or a data set with a __len__."
            ) from error
        if world == 1 or self._distributed:
            return batches
        if batches < world:
            raise DataError(
                f"Each of {world} processes needs a batch, but the loader gives {batches}; "
                "make its batches smaller or use fewer processes."
            )
        return batches // world

    def epoch(self, key: int, epoch: int, rank: int, world: int) -> Iterator[Any]:
        """Iterate once, under a random state seeded by `key`; each process gets its batches."""
        sampler: Any = getattr(self.loader, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        for owner in (self.loader, sampler):
            if isinstance(generator := getattr(owner, "generator", None), torch.Generator):
                generator.manual_seed(key)
        batches = self.given(key)
        return batches if self._distributed else islice(batches, rank, None, world)

    def given(self, key: int) -> Iterator[Any]:
        """Iterate once under a random state seeded by `key`; batches without samples are none."""
        return filter(has_samples, seeded(self.loader, key))

    def __iter__(self) -> Iterator[Any]:
        return filter(has_samples, self.loader)

    def items(self, key: int) -> Items | None:
        """Give the samples that the loader draws, by index; None if it has no index."""
        if isinstance(self.loader, DataLoader) and self.loader.batch_sampler is None:
            return None  # what its data set holds are batches
        if not isinstance(self.loader, DataLoader) or not is_indexed(self.loader.dataset):
            return None
        batches: Any = self.loader.batch_sampler
        drawn = [row for batch in seeded(batches, key) for row in batch]
        return Items(Subset(self.loader.dataset, drawn), self.loader.collate_fn)

    def indexed(self) -> Items | None:
        """Give all samples of the loader's data set by number; None if it has no index."""
        if not isinstance(self.loader, DataLoader) or not is_indexed(self.loader.dataset):
            return None
        batched = self.loader.batch_sampler is not None
        return Items(self.loader.dataset, self.loader.collate_fn if batched else default_collate)

    @property
    def batch_size(self) -> int | None:
        """Samples of a batch, where the loader says so."""
        return self.loader.batch_size if isinstance(self.loader, DataLoader) else None

    @property
    def _distributed(self) -> bool:
        return isinstance(getattr(self.loader, "sampler", None), DistributedSampler)


@dataclass(frozen=True, eq=False)
class Loose:
    """A list that came without a word on what is in it: batches, or samples to be divided.

    `pliant.data.asking` asks the network; until then they are batches.

    Args:
        items: of the list.
        seed: divides samples into training and validation.
    """

    items: Any
    seed: int = 0

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)


@dataclass(frozen=True, eq=False)
class Grouped:
    """Samples that come one after the other, put together into batches as they come."""

    samples: Iterable[Any]
    collate: Collate = together
    size: int = 32

    def __iter__(self) -> Iterator[Any]:
        samples = iter(self.samples)
        while group := list(islice(samples, self.size)):
            yield self.collate(group)

    def __len__(self) -> int:
        length: Any = getattr(self.samples, "__len__", None)
        if length is None:
            raise TypeError("samples without a length")
        return math.ceil(length() / self.size)


class Kept:
    """Batches of an iterator, which gives each of them once: kept for every later look."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self.batches, self.kept = batches, list[Any]()

    def __iter__(self) -> Iterator[Any]:
        number = 0
        while True:
            if number == len(self.kept):
                batch = next(self.batches, self)  # itself where there is none
                if batch is self:
                    return
                self.kept.append(batch)
            yield self.kept[number]
            number += 1


Source = Tensors | Columns | Items | Batches
Indexed = Tensors | Columns | Items


def has_samples(batch: Any) -> bool:
    """Say whether a batch holds a sample."""
    return batch is None or counted(unpack(batch)[0]) > 0


def is_pair(part: Any) -> bool:
    """Say whether a split is (inputs, labels) as tensors."""
    return (
        isinstance(part, list | tuple)
        and not hasattr(part, "_fields")
        and len(part) == 2
        and all(isinstance(item, Tensor) for item in part)
    )


def is_text(part: Any) -> bool:
    """Say whether something is a list of text."""
    return isinstance(part, list) and bool(part) and all(isinstance(p, str | bytes) for p in part)


def is_indexed(part: Any) -> bool:
    """Say whether something has a length and items by number."""
    plain = not isinstance(part, str | bytes | Tensor | Mapping | IterableDataset)
    return plain and hasattr(part, "__len__") and hasattr(part, "__getitem__")


def moved(value: Any, device: torch.device) -> Any:
    """Move the tensors of a batch to a device, whatever holds them."""
    return mapped(lambda tensor: tensor.to(device), value)


def crop_flip(images: Tensor, moves: Tensor) -> Tensor:
    """Move images by up to an eighth of their size, zeros coming in, and mirror half of them.

    Args:
        images: (N, C, H, W).
        moves: (N, 3) in 0..1: down, right, mirror.
    """
    count, _, height, width = images.shape
    reach = max(1, height // 8)
    padded = F.pad(images, (reach, reach, reach, reach))
    down, right = (moves[:, :2] * (2 * reach + 1)).long().unbind(1)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    moved = windows[torch.arange(count), :, down, right]
    return torch.where((moves[:, 2] < 0.5).view(-1, 1, 1, 1), moved.flip(3), moved)


def gather(inputs: Iterable[Example], count: int) -> Example:
    """Put inputs of batches together until there are `count` samples."""
    parts: list[Example] = []
    have = 0
    for part in inputs:
        parts.append(part)
        have += counted(part)
        if have >= count:
            break
    if not parts:
        raise DataError("The train split must hold samples, but it is empty; add some.")
    return _joined(parts, count)


def _joined(values: Sequence[Any], count: int) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        return torch.cat(list(values))[:count] if first.dim() else first
    if isinstance(first, Mapping):
        return {name: _joined([value[name] for value in values], count) for name in first}
    if isinstance(first, list):  # of images, say
        return [item for value in values for item in value][:count]
    if type(first) is tuple:
        return tuple(_joined(column, count) for column in zip(*values, strict=True))
    return first


def rows_of_rank(order: Tensor, rank: int, world: int, *, even: bool) -> Tensor:
    """Give a process its rows; with `even`, some rows repeat so that all get equally many."""
    if even and len(order) % world:
        length = math.ceil(len(order) / world) * world
        order = order.repeat(math.ceil(length / len(order)))[:length]
    return order[rank::world]
