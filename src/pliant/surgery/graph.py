"""Which channels must leave together, found by marking channels and seeing where they arrive.

Every channel of a layer's output gets a code and is made not-a-number in those samples of a
batch that its code names. One forward pass carries the marks through whatever stands between
layers: sums, concatenations, padding, slices, reshapes, pooling, gates. Where the next layers
read, the pattern of marks over the batch says which channel has arrived at which input. No
operation has to be known by name; one that mixes all channels (a softmax or a normalization over
them) marks them all, and they stay. Where a network does not let such numbers through (it checks
that they are finite, or makes distributions of them), marked values are moved instead, up and
down, and compared with those of a sample without marks. Nothing found here counts before
``pliant.surgery.prove`` has proven it on a copy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pliant.cost import Example
from pliant.errors import ModelError
from pliant.nn.layers import shared_weights
from pliant.observe.readers import readers
<<<<<<< HEAD
from pliant.surgery.marks import Slot
from pliant.surgery.probe import MOVES, Probe, first_sample, spread
=======
from pliant.surgery.marks import Block, Slot, Union, codes_of, covered, met, together
from pliant.surgery.parted import Parted
>>>>>>> cost
from pliant.surgery.select import READ, readable

MIXED = "{} takes its statistics over all of its channels: without some the others would change"
MEET = "all of its channels meet in one place, so none can leave alone"
SINGLE = "it has a single channel"


@dataclass(frozen=True)
class Group:
    """Channels of one kind: those of each unit must leave together, units leave one by one.

    Args:
        name: of the first layer that makes these channels; a number tells apart several groups
            of one layer, whose channels go different ways.
        slots: the sides of layers that the channels pass, in the order of the model.
        units: for each unit and each slot, the indices of its channels there.
    """

    name: str
    slots: tuple[Slot, ...]
    units: tuple[tuple[tuple[int, ...], ...], ...]

    def rows(self, slot: Slot) -> Tensor:
        """Return the indices in one slot as a matrix, a row for every unit."""
        place = self.slots.index(slot)
        return torch.tensor([unit[place] for unit in self.units])

    @property
    def makers(self) -> tuple[Slot, ...]:
        """The slots whose weights make the channels: outputs, and depthwise convolutions aside."""
        return tuple(slot for slot in self.slots if slot[1] == "out")


def trace(
    model: nn.Module,
    example: Example,
    others: Sequence[Example] = (),
    *,
    marks: Sequence[float] = (math.nan,),
    heads: bool = False,
) -> tuple[list[Group], dict[str, str]]:
    """Find the groups of channels that may leave a network, and why other layers keep theirs.

    The model is not touched. Needs a forward pass for every few layers, on some copies of one
    sample; convolutions and linear layers themselves compute one sample only.

    Args:
        model: any module.
        example: the inputs of one forward call, samples on the first axis.
        others: further ones, for layers to which not every sample is routed.
        marks: not-a-number, or `MOVES`, which pass where a network takes such numbers out.
        heads: whether the heads that an axis of channels is cut into leave whole.

    Returns:
        The groups in the order of the model, not proven yet, and for every layer none of whose
        outputs are in a group the reason.

    Raises:
        ModelError: the network answers with no tensor that marks could arrive in.
    """
    try:
        probe = spread(model, [example, *others], marks, heads)
    except ModelError:
        raise
    except Exception:  # a model may object to such numbers in any way
        probe = spread(model, [example, *others], MOVES, heads)
    _pin_unreadable(model, example, probe)
    probe.tie_groups()
    return _groups(probe), _reasons(probe)


<<<<<<< HEAD
=======
# ---------------------------------------------------------------- marks


def _spread(
    model: nn.Module, examples: Sequence[Example], marks: Sequence[float], heads: bool
) -> _Probe:
    network = copy.deepcopy(model).eval()
    for example in examples:
        samples_of(network, example)  # asked before there are marks, and remembered
    probe = _Probe(network, examples[0], heads=heads)
    sources = [slot for slot in probe.sizes if slot[1] == "out"]
    # A single channel cannot leave, and ties nothing: elsewhere it is broadcast.
    several = [slot for slot in sources if probe.sizes[slot] > 1]
    for example in examples:
        probe.begin(example)
        for slots in together(several, probe.sizes, probe.largest):
            for mark in marks:
                if not probe.spread(slots, mark):
                    for slot in slots:
                        probe.spread([slot], mark)
    for slot in sources:
        if slot not in probe.marked and probe.sizes[slot] > 1:
            probe.pin(slot, range(probe.sizes[slot]), UNSEEN)
    return probe


@dataclass
class _Probe:
    """A copy of the model whose convolutions and linear layers read and write marks."""

    model: nn.Module
    example: Example
    sizes: dict[Slot, int] = field(default_factory=dict)
    first: dict[Slot, int] = field(default_factory=dict)  # number of a slot's first channel
    pins: dict[int, tuple[str, str]] = field(default_factory=dict)  # why a channel must stay
    marked: set[Slot] = field(default_factory=set)
    mixed: dict[int, str] = field(default_factory=dict)  # which norm makes channels meet
    blocks: list[Block] = field(default_factory=list)  # of the batch that is on its way
    count: int = 0  # its samples
    unclear: bool = False  # whether marks arrived that cannot be told apart
    heads: bool = False  # whether heads leave whole
    mark: float = math.nan  # in the place of marked values, or added to them
    kept: dict[tuple[str, torch.Size, str], Tensor] = field(default_factory=dict)  # for one sample

    def __post_init__(self) -> None:
        total = 0
        for name, module in self.model.named_modules():
            for side, size in sides(module).items():
                self.sizes[name, side], self.first[name, side] = size, total
                total += size
            if "in" in sides(module):
                module.forward = self._marking(name, module)
            elif sides(module):
                module.register_forward_pre_hook(self._reader((name, "channels")))
                grouped = isinstance(module, nn.GroupNorm)
                if grouped:  # what it mixes is tied afterwards
                    module.forward = _unchanged
            kind = type(module).__name__
            if "norm" in kind.lower() and not isinstance(module, _APART):
                module.register_forward_hook(self._mixer(f"{kind} {name}"))
        self.union = Union(list(range(total)))

    def begin(self, example: Example) -> None:
        """Take another sample, and forget what layers gave for the last one."""
        self.example = example
        self.kept.clear()

    def largest(self) -> int:
        """Return how many numbers there are in the largest output that a layer gave."""
        return max((output.numel() for output in self.kept.values()), default=1)

    def spread(self, sources: Sequence[Slot], mark: float) -> bool:
        """Mark the outputs of layers, each in samples of its own, and see where they arrive.

        Returns:
            whether it could be told which of them arrived; if not, mark one at a time.
        """
        self.blocks, self.count, self.mark, self.unclear = [], 0, mark, False
        for source in sources:
            codes = codes_of(self.sizes[source])
            rows = slice(self.count, self.count + len(codes))
            self.blocks.append(Block(source, codes, rows))
            self.count = rows.stop
        with torch.no_grad(), slow_attention(), Parted(self._tie_parts, heads=self.heads):
            output = call(self.model, first_sample(self.example, self.model, self.count))
        arrived = torch.zeros(self.count, dtype=torch.bool)
        for tensor in answers(output):
            if tensor.dim():
                arrived |= self._by_sample(tensor)
        for block in self.blocks:
            self.pin(block.source, covered(block.codes, arrived[block.rows]), OUTPUT)
        return not self.unclear

    def pin(self, slot: Slot, channels: Iterable[int], reason: str) -> None:
        """Note that channels must stay."""
        for channel in channels:
            self.pins.setdefault(self.first[slot] + channel, (slot[0], reason))

    def tie_groups(self) -> None:
        """Tie the channels at one place of all groups of a grouped convolution.

        A group norm takes its statistics over those of one group, which are tied too.
        """
        for (name, side), size in self.sizes.items():
            module, first = self.model.get_submodule(name), self.first[name, side]
            if isinstance(module, nn.GroupNorm):
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
        if len(parts[0]) != self.count:
            return
        marked = [self._marks(part).movedim(axis, 1) for part in parts]
        each = torch.stack([marks.reshape(*marks.shape[:2], -1).any(2) for marks in marked]).cpu()
        for block in self.blocks:
            own, first = each[:, block.rows], self.first[block.source]
            for place in own.any(0).any(0).nonzero().flatten().tolist():
                found = [c for marks in own for c in covered(block.codes, marks[:, place])]
                for channel in found[1:]:
                    self.union.join(first + found[0], first + channel)

    def _by_sample(self, tensor: Tensor) -> Tensor:
        if len(tensor) != self.count:
            return self._scattered(tensor)
        return self._marks(tensor).flatten(1).any(1).cpu()

    def _scattered(self, tensor: Tensor) -> Tensor:
        """Say in which samples marks are of a tensor with other rows: all of one layer's, or none.

        Rows are taken for parts of samples, in their order, as windows of an image are. Where that
        cannot be, or marks are no not-a-numbers, several layers cannot be told apart.
        """
        found = torch.zeros(self.count, dtype=torch.bool)
        if not tensor.isnan().any():
            self.unclear |= not math.isnan(self.mark) and len(self.blocks) > 1
            return found
        if len(self.blocks) == 1:
            return ~found
        parts = torch.ones(self.count, dtype=torch.bool)
        if len(tensor) % self.count == 0:
            parts = tensor.isnan().reshape(self.count, -1).any(1).cpu()
        if any(parts[block.rows.start] for block in self.blocks):  # these have no marks
            self.unclear = True
            return found
        for block in self.blocks:
            found[block.rows] = parts[block.rows].any()
        return found

    def _marks(self, tensor: Tensor) -> Tensor:
        """Say which numbers are marked: the first sample never is."""
        if math.isnan(self.mark):
            return tensor.isnan()
        return ~torch.isclose(tensor, tensor[:1], rtol=1e-4, atol=1e-6, equal_nan=True)

    def _reader(self, slot: Slot) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                self._read(slot, args[0], channel_axis(module, args[0]))

        return hook

    def _mixer(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            given = args[0] if args else None
            if not isinstance(given, Tensor) or not isinstance(output, Tensor):
                return
            if not len(output) == self.count == len(given):
                return
            before, after = (self._marks(each).flatten(1).sum(1) for each in (given, output))
            for block in self.blocks:
                if after[block.rows].sum() > before[block.rows].sum():
                    self.mixed.setdefault(self.first[block.source], name)

        return hook

    def _marking(self, name: str, module: nn.Module) -> Callable[..., Tensor]:
        """Compute one sample, once, and give its output to all: marked, if it is the source."""
        compute, kept = module.forward, self.kept
        features = isinstance(module, nn.Linear)

        def forward(input: Tensor, output_size: Any = None) -> Tensor:
            count, place = self.count, (name, input.shape[1:], str(output_size))
            more = () if output_size is None else (output_size,)  # of a transposed convolution
            self._read((name, "in"), input, input.dim() - 1 if features else 1)
            if len(input) != count:
                return compute(input.nan_to_num(), *more)
            if place not in kept:
                kept[place] = compute(input[:1].nan_to_num(), *more)
            output = kept[place].expand(count, *kept[place].shape[1:]).clone()
            for block in self.blocks:
                if block.source == (name, "out"):
                    self.marked.add(block.source)
                    self._write(
                        output[block.rows], block.codes, output.dim() - 1 if features else 1
                    )
            return output

        return forward

    def _write(self, output: Tensor, codes: Tensor, axis: int) -> None:
        """Mark the outputs of a layer, in place."""
        shape = [size if dim in (0, axis) else 1 for dim, size in enumerate(output.shape)]
        marked = codes.to(output.device).view(shape)
        if math.isnan(self.mark):
            output.masked_fill_(marked, math.nan)
        else:
            output += self.mark * marked

    def _read(self, slot: Slot, given: Tensor, axis: int) -> None:
        """Tie what arrives at the channels of a layer to them."""
        if len(given) != self.count or given.dim() < 2:
            self._read_otherwise(slot, given)
            return
        others = [dim for dim in range(1, given.dim()) if dim != axis]
        if math.isnan(self.mark):
            marks = (given.sum(others) if others else given).isnan().cpu()  # one mark spoils a sum
        else:
            marked = self._marks(given).movedim(axis, 1)
            marks = marked.reshape(*marked.shape[:2], -1).any(2).cpu()
        target = self.first[slot]
        for block in self.blocks:
            source = self.first[block.source]
            for channels, places in met(block.codes, marks[block.rows]):
                tied = [*(source + c for c in channels), *(target + place for place in places)]
                for one in tied[1:]:
                    self.union.join(tied[0], one)

    def _read_otherwise(self, slot: Slot, given: Tensor) -> None:
        """Keep what arrives where a layer reads other rows than samples."""
        found = self._scattered(given) if given.dim() else given.isnan().expand(self.count).cpu()
        moved = len(self.blocks) == 1 and not math.isnan(self.mark)
        for block in self.blocks:
            if moved or found[block.rows].any():
                everything = range(self.sizes[block.source])
                self.pin(block.source, everything, f"{slot[0]} does not read it sample by sample")


def _unchanged(x: Tensor) -> Tensor:
    return x


def first_sample(example: Example, model: nn.Module, count: int = 1) -> Example:
    """Return the first sample, as often as asked; where the example is one sample, the example."""
    given = fitted(model, example)
    return repeated(given, samples_of(model, given), count)


@contextmanager
def slow_attention() -> Iterator[None]:
    """Turn off the fused path of transformer blocks: it calls no layers."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


>>>>>>> cost
# ---------------------------------------------------------------- groups


def _pin_unreadable(model: nn.Module, example: Example, probe: Probe) -> None:
    """Keep the channels of layers whose tensors cannot be cut."""
    _, reasons = readable(model, every=True)
    for name, reader in readers(model, first_sample(example, model)).items():
        reasons.setdefault(name, READ.format(reader))
    for names in shared_weights(model).values():
        for name in names:
            other = next(n for n in names if n != name)
            reasons.setdefault(name.rpartition(".")[0], f"its weight is tied to {other}")
    for (name, side), size in probe.sizes.items():
        if name in reasons:
            probe.pin((name, side), range(size), reasons[name])


def _groups(probe: Probe) -> list[Group]:
    pinned = {probe.union.find(channel) for channel in probe.pins}
    members: dict[int, dict[Slot, list[int]]] = {}
    for slot, size in probe.sizes.items():
        for channel in range(size):
            root = probe.union.find(probe.first[slot] + channel)
            if root not in pinned:
                members.setdefault(root, {}).setdefault(slot, []).append(channel)
    families: dict[tuple[tuple[Slot, int], ...], list[tuple[tuple[int, ...], ...]]] = {}
    for slots in members.values():
        if any(side == "out" for _, side in slots):
            kind = tuple((slot, len(channels)) for slot, channels in slots.items())
            families.setdefault(kind, []).append(tuple(map(tuple, slots.values())))
    return _named(
        [
            (tuple(slot for slot, _ in kind), units)
            for kind, units in families.items()
            if len(units) > 1
        ]
    )


def _named(found: Sequence[tuple[tuple[Slot, ...], Sequence[Any]]]) -> list[Group]:
    groups, seen = [], dict[str, int]()
    for slots, units in found:
        name = next(name for name, side in slots if side == "out")
        seen[name] = seen.get(name, 0) + 1
        own = name if seen[name] == 1 else f"{name}:{seen[name]}"
        groups.append(Group(own, slots, tuple(units)))
    return groups


def _reasons(probe: Probe) -> dict[str, str]:
    """Say for every layer why its channels stay, if nothing else is found out about them."""
    pins: dict[int, tuple[str, str]] = {}
    for channel, pin in probe.pins.items():
        pins.setdefault(probe.union.find(channel), pin)
    reasons, mixed = {}, {probe.union.find(c): name for c, name in probe.mixed.items()}
    for (name, side), size in probe.sizes.items():
        if side == "in":
            continue
        roots = [probe.union.find(probe.first[name, side] + i) for i in range(size)]
        norm = next((MIXED.format(mixed[root]) for root in roots if root in mixed), MEET)
        layer, why = next((pins[root] for root in roots if root in pins), (name, norm))
        reasons[name] = why if layer == name else f"it shares channels with {layer}: {why}"
        if size < 2:
            reasons[name] = SINGLE
    return reasons
