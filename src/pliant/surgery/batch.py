"""The batch that carries marks through a network, or several passes in its place."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pliant.surgery.marks import Block, Slot

Use = Callable[[Tensor], None]
"""What is to be done with marks, one row for every sample."""


def in_one(codes: Mapping[Slot, Tensor]) -> list[Block]:
    """Give each layer samples of its own in one batch."""
    blocks, count = list[Block](), 0
    for source, own in codes.items():
        blocks.append(Block(source, own, slice(count, count + len(own))))
        count += len(own)
    return blocks


def in_passes(codes: Mapping[Slot, Tensor]) -> Iterator[list[Block]]:
    """Give each sample of one layer a pass of its own."""
    for source, own in codes.items():
        for row in own:
            yield [Block(source, row[None], slice(0, 1))]


@dataclass
class Batch:
    """Samples in which the outputs of layers are marked, each in its own.

    Where an example is one sample as a whole, as a graph is, no batch can be made of it: each
    sample is a pass of its own, and what is seen in it is used when all have been made.

    Args:
        mark: in the place of marked values, or added to them.
        whole: whether samples are passes.
    """

    mark: float = math.nan
    whole: bool = False
    blocks: list[Block] = field(default_factory=list)
    count: int = 0  # samples on their way
    unclear: bool = False  # whether marks arrived that cannot be told apart
    later: list[tuple[Use, list[Tensor]]] = field(default_factory=list)  # in the order of a pass
    place: int = 0  # in that order

    def begin(self, blocks: Sequence[Block]) -> None:
        """Begin a pass."""
        self.blocks, self.count, self.place = list(blocks), blocks[-1].rows.stop, 0

    def end(self, blocks: Sequence[Block]) -> None:
        """Use what was seen in passes, as if it had been one batch."""
        self.blocks = list(blocks)
        for use, marks in self.later:
            if len(marks) == blocks[-1].rows.stop:  # seen in every pass
                use(torch.cat(marks))

    def when(self, marks: Tensor, use: Use) -> None:
        """Use marks, (samples, ...): now, or when all passes have been made."""
        if not self.whole:
            use(marks)
            return
        if self.place == len(self.later):
            self.later.append((use, []))
        self.later[self.place][1].append(marks)
        self.place += 1

    def by_sample(self, tensor: Tensor) -> Tensor:
        """Say in which samples marks are."""
        samples = self.by_samples(tensor)
        if samples is None:
            return self.scattered(tensor)
        return self.marks(samples).reshape(self.count, -1).any(1).cpu()

    def by_samples(self, tensor: Tensor) -> Tensor | None:
        """Put the rows of a sample, such as words or windows, behind an axis of samples.

        None where rows are no parts of samples, or not in their order: then samples that have no
        marks would have some.
        """
        if not tensor.dim() or not len(tensor):
            return None
        if self.late(tensor):
            return tensor.transpose(0, 1)
        if len(tensor) % self.count:
            return None
        if len(tensor) == self.count:
            return tensor
        samples = tensor.unflatten(0, (self.count, -1))
        first = [block.rows.start for block in self.blocks]
        return None if len(first) > 1 and self.marks(samples)[first].any() else samples

    def late(self, tensor: Tensor) -> bool:
        """Say whether samples are the second axis, as where time comes first."""
        other = tensor.dim() > 2 and bool(len(tensor) % self.count)
        return other and tensor.shape[1] == self.count

    def scattered(self, tensor: Tensor) -> Tensor:
        """Say that marks in rows that are no samples are in all samples of a layer.

        Those of several layers cannot be told apart, nor marks that are numbers.
        """
        found = torch.zeros(self.count, dtype=torch.bool)
        spoilt = bool(tensor.isnan().any())
        if len(self.blocks) > 1:
            self.unclear |= spoilt or not math.isnan(self.mark)
            return found
        return ~found if spoilt else found

    def marks(self, tensor: Tensor) -> Tensor:
        """Say which numbers are marked: the first sample never is."""
        if math.isnan(self.mark):
            return tensor.isnan()
        return ~torch.isclose(tensor, tensor[:1], rtol=1e-4, atol=1e-6, equal_nan=True)

    def along(self, samples: Tensor, dims: Sequence[int]) -> Tensor:
        """Say which places along some axes are marked in which samples, (samples, places)."""
        others = [dim for dim in range(1, samples.dim()) if dim not in dims]
        if math.isnan(self.mark):  # one mark spoils a sum
            return (samples.sum(others) if others else samples).isnan().flatten(1).cpu()
        marked = self.marks(samples)
        return (marked.any(others) if others else marked).flatten(1).cpu()

    def write(self, output: Tensor, codes: Tensor, axis: int) -> None:
        """Mark the outputs of a layer, in place."""
        shape = [size if dim in (0, axis) else 1 for dim, size in enumerate(output.shape)]
        marked = codes.to(output.device).view(shape)
        if math.isnan(self.mark):
            output.masked_fill_(marked, math.nan)
        else:
            output += self.mark * marked
