"""A copy of a network that carries marks from the outputs of layers to where others read them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pliant.cost import Example, call, samples_of, twin
from pliant.edits.sides import channel_axis, held, is_tensor, over_all, sides
from pliant.observe.outputs import answers
from pliant.surgery.batch import Batch, in_one, in_passes
from pliant.surgery.brief import Brief, Enough
from pliant.surgery.held import RESHAPED, Held
from pliant.surgery.marks import Slot, Union, codes_of, covered, met, together
from pliant.surgery.parted import Parted, unseen
from pliant.surgery.passes import first_sample, slow_attention
from pliant.surgery.select import UNCALLED

MOVES = (3.0, -3.0)  # added to marked values where they must stay numbers
_APART = (nn.modules.batchnorm._NormBase, nn.GroupNorm)  # norms that are known not to mix all
OUTPUT = "its channels are outputs of the network"
_WHOLE = (nn.RNNBase, nn.RNNCellBase, nn.Bilinear)
WHOLE = "{} {} reads them, whose matrices stay whole"
UNSEEN = "never called with the samples on the first axis"
FEW = 2**14  # places at which channels are looked for one by one


def spread(
    model: nn.Module,
    examples: Sequence[Example],
    marks: Sequence[float],
    heads: Mapping[int, int] | None = None,
    apart: bool = False,
    brief: bool = False,
) -> Probe:
    """Mark the outputs of every layer of a copy of a network, and see where they arrive."""
    network = twin(model).eval()
    for example in examples:
        samples_of(network, example)  # asked before there are marks, and remembered
    probe = Probe(network, examples[0], heads=heads, apart=apart, brief=Brief(brief))
    sources = [slot for slot in probe.sizes if slot[1] == "out"]
    # A single channel cannot leave, and ties nothing: elsewhere it is broadcast.
    several = [slot for slot in sources if probe.sizes[slot] > 1]
    for example in examples:
        probe.begin(example)
        rows = {slot: len(codes_of(probe.sizes[slot], heads)) for slot in several}
        for slots in together(rows, probe.largest):
            for mark in marks:
                if not probe.spread(slots, mark):
                    for slot in slots:
                        probe.spread([slot], mark)
    for slot in sources:
        if slot not in probe.marked and probe.sizes[slot] > 1:
            reason = UNSEEN if slot[0] in probe.called else UNCALLED
            probe.pin(slot, range(probe.sizes[slot]), reason)
    return probe


@dataclass
class Probe:
    """A copy of the model whose convolutions and linear layers read and write marks."""

    model: nn.Module
    example: Example
    sizes: dict[Slot, int] = field(default_factory=dict)
    first: dict[Slot, int] = field(default_factory=dict)  # number of a slot's first channel
    pins: dict[int, tuple[str, str]] = field(default_factory=dict)  # why a channel must stay
    marked: set[Slot] = field(default_factory=set)
    called: set[str] = field(default_factory=set)
    mixed: dict[int, str] = field(default_factory=dict)  # which norm makes channels meet
    batch: Batch = field(default_factory=Batch)  # that is on its way
    heads: Mapping[int, int] | None = None  # whether heads leave whole, and how wide they are
    apart: bool = False  # whether norms over all channels are passed by
    headed: dict[int, int] = field(default_factory=dict)  # width of heads by that of their axis
    lossy: bool = False  # whether marks may have been taken out on their way
    brief: Brief = field(default_factory=Brief)
    kept: dict[tuple[str, torch.Size, str], Tensor] = field(default_factory=dict)  # for one sample

    def __post_init__(self) -> None:
        total = 0
        for name, module in self.model.named_modules():
            for side, size in self._sides(module).items():
                self.sizes[name, side], self.first[name, side] = size, total
                total += size
            if "in" in sides(module):
                module.forward = self._marking(name, module)
            elif self._sides(module):
                module.register_forward_pre_hook(self._reader((name, "channels")))
                if _apart(module) or (self.apart and over_all(module)):
                    module.forward = _unchanged
            kind = type(module).__name__
            if isinstance(module, _WHOLE):
                module.register_forward_pre_hook(self._whole(WHOLE.format(kind, name)))
            if "norm" in kind.lower() and not isinstance(module, _APART) and not _holding(module):
                module.register_forward_hook(self._mixer(f"{kind} {name}"))
            if self.brief.on and name and not self._sides(module) and _holding(module):
                module.forward = self.brief.passing(name, module)
        for name, module in self.model.named_modules():  # behind all layers
            for side, size in held(module).items():
                self.sizes[name, side], self.first[name, side] = size, total
                total += size
        self.held = Held(self.model, self._meet, self._tie)
        self.union = Union(list(range(total)))

    def _sides(self, module: nn.Module) -> dict[str, int]:
        return sides(module) or (over_all(module) if self.apart else {})

    def begin(self, example: Example) -> None:
        """Take another sample, and forget what layers gave for the last one."""
        self.example = example
        self.kept.clear()
        self.brief.kept.clear()

    def largest(self) -> int:
        """Return how many numbers there are in the largest output that a layer gave."""
        return max((output.numel() for output in self.kept.values()), default=1)

    def spread(self, sources: Sequence[Slot], mark: float) -> bool:
        """Mark the outputs of layers, each in samples of its own, and see where they arrive.

        Returns:
            whether it could be told which of them arrived; if not, mark one at a time.
        """
        codes = {source: codes_of(self.sizes[source], self.heads) for source in sources}
        whole = samples_of(self.model, self.example).kind in ("whole", "packed")
        if whole and len(sources) > 1:
            return False
        self.batch = Batch(math.nan if whole else mark, whole=whole)
        for blocks in in_passes(codes) if whole else [in_one(codes)]:
            self.batch.begin(blocks)
            self._pass()
        self.batch.end(in_one(codes))
        return not self.batch.unclear

    def _pass(self) -> None:
        sample = first_sample(self.example, self.model, self.batch.count)
        self.held.begin()
        self.brief.begin([block.source for block in self.batch.blocks], self.batch.count)
        parted = Parted(self._tie_parts, heads=self.heads is not None)
        try:
            with torch.no_grad(), slow_attention(), self.held, parted:
                output = call(self.model, sample)
        except Enough:
            return
        finally:
            self.headed |= parted.headed
            self.lossy |= parted.lossy
        arrived = torch.zeros(self.batch.count, dtype=torch.bool)
        for tensor in answers(output):
            if tensor.dim():
                arrived |= self.batch.by_sample(tensor)
        self.batch.when(arrived, partial(self._stay, OUTPUT))

    def _stay(self, reason: str, arrived: Tensor) -> None:
        """Keep the channels whose marks arrived, (samples,)."""
        for block in self.batch.blocks:
            self.pin(block.source, covered(block.codes, arrived[block.rows]), reason)

    def pin(self, slot: Slot, channels: Iterable[int], reason: str) -> None:
        """Note that channels must stay."""
        for channel in channels:
            self.pins.setdefault(self.first[slot] + channel, (slot[0], reason))

    def tie_groups(self) -> None:
        """Tie the channels at one place of all groups of a grouped convolution.

        A group norm takes its statistics over those of one group, which are tied too.
        """
        for (name, side), size in self.sizes.items():
            if is_tensor(side):
                continue
            module, first = self.model.get_submodule(name), self.first[name, side]
            if isinstance(module, nn.GroupNorm) and not (self.apart and module.num_groups == 1):
                width = size // module.num_groups
                for channel in range(size):
                    self.union.join(first + channel, first + channel // width * width)
                if module.num_groups == 1:
                    self.mixed.setdefault(first, f"{type(module).__name__} {name}")
            groups = getattr(module, "groups", 1)
            if side == "channels" or groups < 2:
                continue
            width = size // groups
            for channel in range(size):
                self.union.join(first + channel, first + channel % width)

    def _tie_parts(self, parts: Sequence[Tensor], axis: int) -> None:
        """Tie what lies at one place of equal parts of a tensor: its middle moves with them."""
        samples = [self.batch.by_samples(part) for part in parts]
        if samples[0] is None:
            return
        axis += samples[0].dim() - parts[0].dim()
        marked = [self.batch.marks(part).movedim(axis, 1) for part in samples if part is not None]
        each = [marks.reshape(*marks.shape[:2], -1).any(2) for marks in marked]
        self.batch.when(torch.stack(each, 2).cpu(), self._tie_places)

    def _tie_places(self, each: Tensor) -> None:
        """Tie what lies at one place of several parts, marks of (samples, places, parts)."""
        for block in self.batch.blocks:
            own, first = each[block.rows], self.first[block.source]
            for place in own.any(2).any(0).nonzero().flatten().tolist():
                found = [c for marks in own[:, place].T for c in covered(block.codes, marks)]
                for channel in found[1:]:
                    self.union.join(first + found[0], first + channel)

    def _tie(self, one: Slot, places: Tensor, other: Slot, there: Tensor) -> None:
        """Tie what lies side by side; what is below 0 comes from elsewhere."""
        first, second = self.first[one], self.first[other]
        for place, index in zip(places.int().tolist(), there.int().tolist(), strict=True):
            if place >= 0 and index >= 0:
                self.union.join(first + place, second + index)

    def _meet(self, given: Tensor, axes: Sequence[int], slot: Slot, places: Tensor | None) -> None:
        """Tie channels that arrive along axes of a tensor to what a tensor has for them there.

        Where a place along the axes has marks of several channels, it has a number for none of
        them, but for a head; where the tensor's own axes are others, the channels stay.
        """
        samples = self.batch.by_samples(given)
        if samples is None:
            return
        late = self.batch.late(given)
        dims = [axis + samples.dim() for axis in axes]
        dims = [1 - dim if late and dim < 2 else dim for dim in dims]
        if 0 in dims:
            return
        marks = self.batch.along(samples, dims)
        if places is not None or marks.shape[1] <= FEW:
            self.batch.when(marks, partial(self._tie_held, slot, places))

    def _tie_held(self, slot: Slot, places: Tensor | None, marks: Tensor) -> None:
        """Tie channels to what a tensor has at the places where they arrive."""
        for block in self.batch.blocks:
            found = list(met(block.codes, marks[block.rows]))
            for channels, there in found:
                if len(channels) > 1 and (self.heads is None or len(found) < 2):
                    continue
                if places is None:
                    reason = RESHAPED.format(f"{slot[0]}.{slot[1].partition(':')[0]}".lstrip("."))
                    self.pin(block.source, channels, reason)
                    continue
                first = self.first[block.source]
                for place in [index for p in there if (index := int(places[p])) >= 0]:
                    for channel in channels:
                        self.union.join(self.first[slot] + place, first + channel)

    def _reader(self, slot: Slot) -> Callable[..., None]:
        @unseen
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                self._read(slot, args[0], channel_axis(module, args[0]))

        return hook

    def _whole(self, reason: str) -> Callable[..., None]:
        @unseen
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            for given in [each for each in args if isinstance(each, Tensor) and each.dim() > 1]:
                self.batch.when(self.batch.by_sample(given), partial(self._stay, reason))

        return hook

    def _mixer(self, name: str) -> Callable[..., None]:
        @unseen
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            given = args[0] if args else None
            if not isinstance(given, Tensor) or not isinstance(output, Tensor):
                return
            samples = self.batch.by_samples(given)
            if samples is None or output.shape != given.shape:
                return
            pair = samples, output.reshape(samples.shape)
            counts = torch.stack([self.batch.marks(each).flatten(1).sum(1) for each in pair], 1)
            self.batch.when(counts, partial(self._mix, name))

        return hook

    def _mix(self, name: str, counts: Tensor) -> None:
        """Note a norm behind which there are more marks than before, (samples, 2)."""
        for block in self.batch.blocks:
            before, after = counts[block.rows].sum(0).tolist()
            if after > before:
                self.mixed.setdefault(self.first[block.source], name)

    def _marking(self, name: str, module: nn.Module) -> Callable[..., Tensor]:
        """Compute one sample, once, and give its output to all: marked, if it is the source."""
        compute, kept = module.forward, self.kept
        features = isinstance(module, nn.Linear)

        @unseen
        def forward(input: Tensor, output_size: Any = None) -> Tensor:
            more = () if output_size is None else (output_size,)  # of a transposed convolution
            axis = input.dim() - 1 if features else 1
            self.called.add(name)
            if features and input.dim() == 1 and self.batch.whole:
                return forward(input[None])[0]
            self._read((name, "in"), input, axis)
            if features and self.batch.late(input):
                return forward(input.transpose(0, 1)).transpose(0, 1)
            rows = len(input) // self.batch.count  # of a sample
            blocks = self.batch.blocks
            if len(input) != self.batch.count * rows or not rows:
                mine = any(block.source == (name, "out") for block in blocks)
                self.batch.unclear |= mine and len(blocks) > 1  # other marks may have led them off
                return compute(input.nan_to_num(), *more)
            place = name, input[:rows].shape, str(output_size)
            if place not in kept:
                kept[place] = compute(input[:rows].nan_to_num(), *more)
            output = kept[place].repeat(self.batch.count, *[1] * (kept[place].dim() - 1))
            for block in blocks:
                if block.source == (name, "out"):
                    self.marked.add(block.source)
                    self.brief.wrote(block.source)
                    own = output[block.rows.start * rows : block.rows.stop * rows]
                    self.batch.write(own, block.codes.repeat_interleave(rows, 0), axis)
            return output

        return forward

    def _read(self, slot: Slot, given: Tensor, axis: int) -> None:
        """Tie what arrives at the channels of a layer to them."""
        for other, places in self.held.along(given, axis - given.dim()):
            self._tie(other, places, slot, torch.arange(self.sizes[slot]))
        samples = self.batch.by_samples(given) if given.dim() > 1 else None
        if samples is None:
            self._read_otherwise(slot, given)
            return
        axis += samples.dim() - given.dim()
        self.batch.when(self.batch.along(samples, [axis]), partial(self._arrive, slot))

    def _arrive(self, slot: Slot, marks: Tensor) -> None:
        """Tie the channels of a layer to those whose marks arrive there, (samples, channels)."""
        target, seen, before = self.first[slot], marks.any(1).tolist(), self.union.joined
        for block in self.batch.blocks:
            if not any(seen[block.rows]):  # most are read nearer to where they were marked
                continue
            source = self.first[block.source]
            for channels, there in met(block.codes, marks[block.rows]):
                tied = [*(source + c for c in channels), *(target + place for place in there)]
                for one in tied[1:]:
                    self.union.join(tied[0], one)
        if any(seen) and not self.batch.whole:
            self.brief.read(new=self.union.joined > before)

    def _read_otherwise(self, slot: Slot, given: Tensor) -> None:
        """Keep what arrives where a layer reads other rows than samples."""
        batch = self.batch
        found = batch.scattered(given) if given.dim() else given.isnan().expand(batch.count).cpu()
        moved = len(self.batch.blocks) == 1 and not math.isnan(self.batch.mark)
        for block in self.batch.blocks:
            if moved or found[block.rows].any():
                everything = range(self.sizes[block.source])
                self.pin(block.source, everything, f"{slot[0]} does not read it sample by sample")


def _apart(module: nn.Module) -> bool:
    """Say whether a norm is passed by: what it mixes is tied afterwards, or not of channels."""
    samples = isinstance(module, _BatchNorm) and module.running_mean is None
    return samples or isinstance(module, nn.GroupNorm)


def _holding(module: nn.Module) -> bool:
    """Say whether a module is a block with layers in it, whatever it calls itself."""
    return any("in" in sides(part) for part in module.modules())


def _unchanged(x: Tensor) -> Tensor:
    return x
