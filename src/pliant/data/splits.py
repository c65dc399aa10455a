"""`Data`: three splits of samples, and their batches as a pure function of (seed, epoch)."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from pliant.cost import Example, counted, one_sample
from pliant.data.asking import once_only, read, source_of, splits_of
from pliant.data.chance import generator, key_of
from pliant.data.decoder import completed
from pliant.data.sound import check_pair, check_split, first_batch
from pliant.data.sources import (
    Batches,
    Indexed,
    Items,
    Kept,
    Loose,
    Source,
    Tensors,
    rows_of_rank,
    unpack,
)
from pliant.data.streams import cut, drawn, last_tenth, made, most, prepared
from pliant.data.trials import runs
from pliant.errors import DataError

Split = Literal["train", "val", "test"]
FEW = 8  # samples where a network takes no less than several


@dataclass(frozen=True, eq=False)
class Data:
    """Three splits of labelled samples.

    A split is a pair of tensors (inputs, labels), a data set with length and index, a DataLoader
    or another iterable of batches, or None. A generator of batches is read once, as far as it is
    needed, and its batches are kept. Images may be uint8 (N, C, H, W): they stay so in
    memory and are scaled to 0..1 and normalised batch by batch. Other inputs are normalised only
    if `mean` is given. What a loader gives is passed on as it is, dicts included.

    Attributes:
        train: samples to train and calibrate on.
        val: samples to decide with.
        test: samples for the final number.
        classes: names of the classes, or how many; 0 if not known.
        name: what reports call it.
        mean: of every channel, after scaling to 0..1.
        std: of every channel, after scaling to 0..1.
        resized: height and width that images were resized to; () where they were not.
        augment: "crop-flip" moves training images by up to an eighth of their size and mirrors
            half of them; it applies to splits of tensors.
    """

    train: Any = field(default=None, repr=False)
    val: Any = field(default=None, repr=False)
    test: Any = field(default=None, repr=False)
    classes: tuple[str, ...] | int = 0
    name: str = "data"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    augment: Literal["none", "crop-flip"] = "none"
    resized: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for split in get_args(Split):
            if once_only(part := getattr(self, split)):
                object.__setattr__(self, split, Kept(iter(part)))
        if self.augment not in ("none", "crop-flip"):
            raise DataError(
                f"augment must be 'none' or 'crop-flip', not {self.augment!r}; other augmentation "
                "belongs in a data set of your own."
            )
        if len(self.mean) != len(self.std):
            raise DataError(
                f"mean and std need one number per channel each, not {len(self.mean)} and "
                f"{len(self.std)}; give both."
            )

    @staticmethod
    def of(data: Any, *, seed: int = 0) -> "Data":
        """Make a `Data` of what users have, with labels or without.

        Samples in memory are a tensor, an array, or a mapping or tuple of tensors with a row for
        every sample; a tuple ends with its labels, and so does a pair: two inputs without labels
        are written as ((a, b),) or by name. Samples one by one are a data set with length and
        index: tensors, mappings, tuples, (inputs, label). Batches are a DataLoader or a
        generator. A list holds batches or samples: see `read_by`. A mapping from "train",
        "validation" and "test" names splits. None becomes a `Data` without splits.

        A permutation of samples with an index, seeded by `seed`, puts the last tenth into
        validation and the rest into training; there is no test split. A loader becomes the
        training split.

        Raises:
            DataError: something else came, or inputs and labels do not fit.
        """
        return data if isinstance(data, Data) else Data(**splits_of(data, seed))

    @property
    def class_count(self) -> int:
        """How many classes there are; 0 if not known."""
        return self.classes if isinstance(self.classes, int) else len(self.classes)

    def has(self, split: Split) -> bool:
        """Say whether a split is there."""
        return getattr(self, split) is not None

    def prepared(self) -> dict[str, str]:
        """Say what is done to inputs before a network reads them, for a report.

        Returns:
            For splits in memory "resized", "normalized" and "augmented"; of others nothing, since
            what a data set does to its items nobody can tell.
        """
        source = self.source("train") if self.has("train") else None
        return prepared(source, self.resized) if isinstance(source, Tensors) else {}

    def size(self, split: Split = "train") -> int | None:
        """Count the samples of a split; None where a loader cannot tell."""
        source = self.source(split)
        return source.samples if isinstance(source, Batches) else len(source)

    def indexed(self, split: Split) -> Indexed:
        """Give a split by the number of its samples.

        Raises:
            DataError: it has no index.
        """
        source = self.source(split)
        found = source.indexed() if isinstance(source, Batches) else source
        if found is None:
            raise DataError(
                f"Samples of the {split} split are chosen by number, but it is a stream of "
                f"batches ({type(getattr(self, split)).__name__}); give tensors, a data set with "
                "length and index, or a DataLoader of one."
            )
        return found

    def rows(self) -> int:
        """Count the samples of the training split that can be chosen by number.

        Raises:
            DataError: the split has no index.
        """
        return len(self.indexed("train"))

    def batch_size(self, asked: int) -> int:
        """Return the samples of a training batch: those asked for, or a loader's own."""
        source = self.source("train")
        return (source.batch_size if isinstance(source, Batches) else None) or most(source, asked)

    def steps(self, batch_size: int, world: int = 1, *, rows: Tensor | None = None) -> int:
        """Count the training batches that each of `world` processes gets in an epoch.

        `batch_size` is per process and does not apply to a loader, which has its own, unless
        `rows` of it are chosen.

        Raises:
            DataError: the training split is a loader without length.
        """
        source = self.source("train")
        if isinstance(source, Batches) and rows is None:
            return source.steps(world)
        count = len(self.indexed("train")) if rows is None else len(rows)
        return math.ceil(math.ceil(count / world) / most(source, batch_size))

    def batches(
        self,
        split: Split,
        batch_size: int,
        *,
        seed: int = 0,
        epoch: int = 0,
        augment: bool = False,
        shuffle: bool = False,
        rank: int = 0,
        world: int = 1,
        start: int = 0,
        rows: Tensor | None = None,
    ) -> Iterator[Any]:
        """Give the batches of one epoch, the same ones whenever (seed, epoch) is the same.

        The last batch may be smaller. With several processes each gets every `world`-th sample
        (of a loader: every `world`-th batch, unless its sampler is distributed); training repeats
        or leaves out a few, so that all get `steps` batches, validation and test do neither. A
        user's loader is iterated as it is, under a random state seeded by (seed, epoch); the
        caller's random state stays untouched.

        Args:
            split: "train", "val" or "test".
            batch_size: samples per batch and process; a loader has its own.
            seed: of order and augmentation.
            epoch: its number.
            augment: apply `self.augment`.
            shuffle: in random order; a loader has its own.
            rank: number of this process.
            world: number of processes.
            start: batches to leave out at the beginning, when a run resumes within an epoch.
            rows: numbers of the samples to take, None for all; of a loader those of its data
                set, put into batches of `batch_size` by its `collate_fn`.

        Returns:
            Batches (inputs, labels), or what the user's loader gives.

        Raises:
            DataError: there is no such split, or it has no index to choose rows by.
        """
        source, key = self.source(split), key_of(seed, epoch)
        if rows is not None:
            source = self.indexed(split)
        if not isinstance(source, Batches):
            moves = torch.rand(len(source), 3, generator=generator(key + 1)) if augment else None
            order = torch.arange(len(source)) if rows is None else rows
            if shuffle:
                order = order[torch.randperm(len(order), generator=generator(key))]
            mine = rows_of_rank(order, rank, world, even=split == "train")
            batch_size = most(source, batch_size)
            return made(source, list(mine.split(batch_size)), moves, key, start)
        batches = source.epoch(key, epoch, rank, world)
        stop = source.steps(world) if split == "train" and world > 1 else None
        return cut(batches, start, stop)

    def sample(self, count: int, *, seed: int = 0) -> Any:
        """Draw training inputs at random, without labels and augmentation, for calibration.

        From a data set or loader they are drawn by index, so a sorted one is mixed too; from a
        stream without index its first batches are taken. What a data set does to its own items
        cannot be switched off.

        Args:
            count: how many; all of them if there are fewer.
            seed: of the choice.

        Returns:
            A tensor (count, ...), a mapping of tensors where batches are mappings, or a tuple
            where there are several inputs.
        """
        inputs = drawn(self.source("train"), count, seed, shuffle=True)
        return inputs if isinstance(inputs, Mapping) or len(inputs) > 1 else inputs[0]

    def calibration(self, count: int, *, batch: int = 128, seed: int = 0) -> list[Example]:
        """Draw training inputs as the network saw them: shuffled and augmented, without labels.

        Statistics of inputs without the training's augmentation are others: batch norms
        re-estimated on clean images cost a CIFAR ResNet-20 three points.

        Args:
            count: how many samples at least, rounded up to whole batches.
            batch: samples per batch; a loader has its own.
            seed: of order and augmentation.

        Returns:
            Inputs of forward calls: tuples of tensors, or mappings of keyword arguments.
        """
        return [unpack(item)[0] for item in self.calibration_batches(count, batch=batch, seed=seed)]

    def calibration_batches(self, count: int, *, batch: int = 128, seed: int = 0) -> list[Any]:
        """Draw training batches as for `calibration`, with their labels."""
        found: list[Any] = []
        seen = 0
        for item in self.batches("train", batch, seed=seed, augment=True, shuffle=True):
            inputs = unpack(item)[0]
            found.append(item)
            seen += counted(inputs)
            if seen >= count:
                break
        return found

    def example(self, batch: int = 1) -> Example:
        """Give the first training inputs as arguments of a forward call.

        Of a loader with index these are its first samples, put together as it does; of a stream
        the first rows of its first batch.

        Returns:
            A tuple, or a mapping of keyword arguments where batches are mappings.
        """
        return drawn(self.source("train"), batch, 0, shuffle=False)

    def example_for(self, model: nn.Module) -> Example:
        """Give the first training sample, or the first batch where the network takes no less.

        Of a stream of batches it is the network that says what one sample is: see
        `pliant.cost.samples_of`.
        """
        source = self.source("train")
        if isinstance(source, Batches) and source.items(0) is None:
            return one_sample(model, self._first())
        example = self.example()
        if isinstance(source, Tensors) or runs(model, example) is not None:
            return example
        whole = self._first() if isinstance(source, Batches) else self.example(FEW)
        return whole if runs(model, whole) is not None else example

    def read_by(self, model: nn.Module) -> "Data":
        """Return the data as a network reads them: it is asked where that is not plain.

        The items of a list, or of another iterable that is no DataLoader, are batches or samples:
        what the network takes. Samples are stacked, or put into lists where it takes lists of
        images; samples of several shapes that cannot be listed come one by one. An encoder-decoder
        of Transformers reads labels, moved by one, where nothing else is there for its decoder.
        """
        given = {split: completed(getattr(self, split), model) for split in get_args(Split)}
        found = {split: read(part, model) for split, part in given.items()}
        train = self.train
        if isinstance(train, Loose) and isinstance(found["train"], Items) and self.val is None:
            found["train"], found["val"] = last_tenth(found["train"], train.seed)
        known = all(found[split] is getattr(self, split) for split in found)
        return self if known else replace(self, **found)

    def subset(
        self,
        *,
        train: int | None = None,
        val: int | None = None,
        test: int | None = None,
        seed: int = 0,
    ) -> "Data":
        """Keep only some samples of each split: the first of a seeded shuffle; None keeps all.

        Raises:
            DataError: a count below 1, or a split that is a loader.
        """
        parts: dict[str, Any] = {}
        for split, count in zip(get_args(Split), (train, val, test), strict=True):
            if count is None:
                continue
            source = self.source(split)
            if count < 1 or isinstance(source, Batches):
                raise DataError(
                    f"A subset of {split} needs at least 1 sample of tensors or of a data set, "
                    f"not {count} of {type(source).__name__}; cut the loader's own data set."
                )
            order = torch.randperm(len(source), generator=generator(seed))
            parts[split] = source.take(order[:count])
        return replace(self, **parts)

    def label_counts(self, split: Split = "train") -> Tensor:
        """Count the samples of each class in a split of tensors: a tensor (classes,).

        Raises:
            DataError: the split is not made of tensors.
        """
        source = self.source(split)
        if not isinstance(source, Tensors) or source.labels is None:
            raise DataError(
                f"Labels can be counted in tensors, not in {type(source).__name__}; "
                "go through the batches instead."
            )
        labels = source.labels.flatten().long()
        return torch.bincount(labels[labels >= 0], minlength=self.class_count)

    def check(self, classes: int | None = None, *, labelled: bool = True) -> None:
        """Refuse data that cannot be trained on, before any training.

        Of tensors everything is looked at, of data sets and loaders the first batch.

        Args:
            classes: number of outputs of the model; the data's own number if None.
            labelled: look at the range of classes too; a task looks at its labels itself.

        Raises:
            DataError: a split is empty, inputs are not finite, inputs and labels in memory differ
                in length, or a class is not below `classes`.
        """
        for split in get_args(Split):
            if not self.has(split):
                continue
            source = self.source(split)
            if isinstance(source, Tensors):
                check_pair(split, source.inputs, source.labels)
                found = [source.inputs], source.labels
            else:
                found = first_batch(split, self.batches(split, 2))
            check_split(split, *found, (classes or self.class_count) if labelled else None)

    def source(self, split: Split) -> Source:
        """Return what a split is: tensors, items with an index, or batches.

        Raises:
            DataError: there is no such split.
        """
        part = getattr(self, split) if split in get_args(Split) else None
        if part is None:
            raise DataError(
                f"This needs the split {split!r}, but data {self.name!r} has only "
                f"{[s for s in get_args(Split) if self.has(s)]}; give it to Data."
            )
        return source_of(part, self.mean, self.std, crop_flip=self.augment == "crop-flip")

    def _first(self) -> Example:
        """The inputs of the first batch, as it is."""
        batch = next(iter(self.batches("train", FEW)), None)
        if batch is None:
            raise DataError("The train split must hold samples, but it is empty; add some.")
        return unpack(batch)[0]
