"""What one sample is, asked of the network: whether it answers for a part as it does for all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from pliant.cost.call import Example, call, evaluating, fitted, mapped, tensors
from pliant.math.alone import forked

CLOSE = 1e-3  # largest difference between two answers that rounding makes, of the largest number
TRIED = 12  # how many sizes of a sample of several rows are tried


@dataclass(frozen=True)
class Samples:
    """Where the samples of an example lie.

    Attributes:
        kind: "axis" of its tensors, "items" of its lists, "packed" sequences, or "whole": it is
            one sample, as a graph is.
        axis: of the tensors.
        count: rows along that axis, or items.
        each: rows that make one sample, as the frames of a clip do.
    """

    kind: Literal["axis", "items", "packed", "whole"] = "axis"
    axis: int = 0
    count: int = 1
    each: int = 1

    def __str__(self) -> str:
        """Say what one sample is, in words."""
        if self.kind == "whole":
            return "the whole example"
        if self.kind == "axis":
            return f"{self.each} of {self.count} rows along axis {self.axis}"
        return f"1 of {self.count} {'items' if self.kind == 'items' else 'packed sequences'}"


_asked: WeakKeyDictionary[nn.Module, dict[Any, Samples]] = WeakKeyDictionary()


def samples_of(model: nn.Module, example: Example) -> Samples:
    """Find where the samples of an example lie.

    A part is a sample if the network gives for it what it gave for it within the whole, in eval
    mode. Tried are the items of lists, the rows of the first axis, those of the second, and
    several rows of the first. Where answers differ in their numbers (they may depend on chance or
    on the other samples), those that differ in their size count. Where nothing fits, the example
    is one sample. An example with one row is not asked about: the network is not run.

    Args:
        model: stays as it is, as does the random state.
        example: inputs of one forward call.
    """
    example = fitted(model, example)
    simple = _obvious(example)
    if simple is not None:
        return simple
    known, key = _asked.setdefault(model, {}), _shapes(example)
    if key not in known:
        known[key] = _ask(model, example)
    return known[key]


def one_sample(model: nn.Module, example: Example) -> Example:
    """Return the first sample of an example, as an example: see `samples_of`."""
    given = fitted(model, example)
    return first_of(given, samples_of(model, given))


def first_of(example: Example, where: Samples, *, last: bool = False) -> Example:
    """Return the first sample, or the last, of an example whose samples lie somewhere."""
    found: Example = _cut(example, where, last=last)
    return found


def repeated(example: Example, where: Samples, count: int) -> Example:
    """Return the first sample as often as asked; a whole example stays as it is."""
    one = first_of(example, where)
    if where.kind == "axis":
        return mapped(lambda t: _repeat(t, where, count), one)
    if where.kind == "items":
        return _lists(one, lambda items: items * count, 1)
    return one


def counted(example: Example) -> int:
    """Count the samples of a batch: items of a list, packed sequences, rows of the first tensor."""
    packed = next(_packed(example), None)
    if packed is not None:
        return int(packed.batch_sizes[0])
    if lengths := [len(items) for items in _listed(example)]:
        return lengths[0]
    first = next(tensors(example), None)
    return 1 if first is None or not first.dim() else len(first)


# ---------------------------------------------------------------- asking


def _obvious(example: Example) -> Samples | None:
    """What needs no asking: one row, one item, or no tensor with rows."""
    if next(_packed(example), None) is not None:
        return None
    lists = list(_listed(example))
    if lists:
        return Samples("items") if len(lists[0]) == 1 and _are_single(lists[0]) else None
    first = next((t for t in tensors(example) if t.dim()), None)
    return Samples() if first is None or len(first) == 1 else None


def _ask(model: nn.Module, example: Example) -> Samples:
    try:
        whole = _run(model, example)
    except Exception:  # whoever runs it next says so
        return next(_candidates(example), Samples())
    weak: Samples | None = None
    for where in _candidates(example):
        try:
            part = _run(model, first_of(example, where, last=True))
        except Exception:  # a network may object to a part in any way
            continue
        fits = _fits(whole, part, where)
        if fits == "values":
            return where
        if where.kind == "packed" or (fits == "sizes" and where.each == 1):
            weak = weak or where
    return weak or Samples("whole")


def _candidates(example: Example) -> Iterator[Samples]:
    packed = next(_packed(example), None)
    if packed is not None:
        yield Samples("packed", count=int(packed.batch_sizes[0]))
        return
    lists = list(_listed(example))
    items = [Samples("items", count=len(lists[0]))] if lists and len(lists[0]) > 1 else []
    if items and _are_single(lists[0]):
        yield from items
        items = []
    shape = next(t.shape for t in tensors(example) if t.dim())
    for axis, size in enumerate(shape[:2]):
        if size > 1:
            yield Samples("axis", axis, size)
    yield from items
    several = [each for each in range(2, shape[0]) if shape[0] % each == 0]
    for each in several[:TRIED]:
        yield Samples("axis", 0, shape[0], each)


def _run(model: nn.Module, example: Example) -> list[Tensor]:
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    with evaluating(model), forked(devices, 0), torch.no_grad():
        return [t.detach() for t in tensors(call(model, example))]


def _fits(
    whole: list[Tensor], part: list[Tensor], where: Samples
) -> Literal["values", "sizes", ""]:
    """Compare what a network gave for a part with what it gave for all, of which it is the last."""
    if where.kind != "axis" and len(whole) != len(part):
        if len(whole) != len(part) * where.count:
            return ""
        pairs = list(zip(whole[-len(part) :], part, strict=True))
        return "values" if all(_same(*pair) for pair in pairs) else "sizes"
    if len(whole) != len(part):
        return ""
    cut = [_ending(*pair, where) for pair in zip(whole, part, strict=True)]
    scalars = all(not t.dim() for t in whole)
    if any(t is None for t in cut) or not (changes := _changed(whole, part) or scalars):
        return ""
    same = all(_same(one, other) for one, other in zip(cut, part, strict=True) if one is not None)
    return "values" if same and changes and not scalars else "sizes"


def _changed(whole: list[Tensor], part: list[Tensor]) -> bool:
    return any(one.shape != other.shape for one, other in zip(whole, part, strict=True))


def _ending(whole: Tensor, part: Tensor, where: Samples) -> Tensor | None:
    """The end of an answer that belongs to the part; None where it has no such end."""
    if whole.dim() != part.dim():
        return None
    for axis, (full, some) in enumerate(zip(whole.shape, part.shape, strict=True)):
        if full == some:
            continue
        if full * where.each != some * where.count and some != where.each:
            return None  # inputs of unequal lengths shrink to one row each
        whole = whole.narrow(axis, full - some, some)
    return whole


def _same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    finite = one[one.isfinite()].abs().double()
    most = float(finite.max()) if finite.numel() else 0.0
    return torch.allclose(one, other, rtol=0.0, atol=CLOSE * most, equal_nan=True)


# ---------------------------------------------------------------- parts of examples


def _cut(value: Any, where: Samples, *, last: bool) -> Any:
    if where.kind == "whole":
        return value
    if where.kind == "items":
        return _lists(value, lambda items: items[-1:] if last else items[:1], where.count)
    if where.kind == "packed":
        value = _replaced(value, lambda packed: _sequence(packed, last=last))
    sizes = [t.shape[0] for t in tensors(value) if t.dim()]
    axis = where.axis
    uneven = where.kind == "axis" and where.axis == 0 and len(set(sizes)) > 1 and where.each == 1

    def narrow(tensor: Tensor) -> Tensor:
        if tensor.dim() <= axis or (tensor.shape[axis] != where.count and not uneven):
            return tensor
        start = tensor.shape[axis] - where.each if last else 0
        return tensor.narrow(axis, max(0, start), min(where.each, tensor.shape[axis]))

    return _plain(narrow, value)


def _plain(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Change the tensors of a nested value, those of packed sequences left alone."""
    if isinstance(value, PackedSequence):
        return value
    if isinstance(value, Mapping):
        return {name: _plain(change, part) for name, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(change, part) for part in value)
    return mapped(change, value)


def _repeat(tensor: Tensor, where: Samples, count: int) -> Tensor:
    if tensor.dim() <= where.axis or tensor.shape[where.axis] != where.each:
        return tensor
    times = [count if axis == where.axis else 1 for axis in range(tensor.dim())]
    return tensor.repeat(times)


def _listed(value: Any) -> Iterator[list[Any]]:
    """Lists among the arguments whose items are tensors or mappings: one for each sample."""
    for part in value.values() if isinstance(value, Mapping) else value:
        if isinstance(part, list | tuple) and part and not isinstance(part, PackedSequence):
            items = list(part)
            if not hasattr(part, "_fields") and _are_alike(items):
                yield items


def _are_alike(items: list[Any]) -> bool:
    maps = all(isinstance(item, Mapping) for item in items)
    return maps or all(
        isinstance(t, Tensor) and t.dim() and t.dim() == items[0].dim() for t in items
    )


def _are_single(items: list[Any]) -> bool:
    """Whether the items look like single samples: images, rows, mappings; no batches of images."""
    return all(isinstance(item, Mapping) or item.dim() < 4 for item in items)


def _lists(value: Any, change: Callable[[list[Any]], list[Any]], count: int) -> Any:
    """Change the lists among the arguments that have as many items as there are samples."""

    def change_one(part: Any) -> Any:
        plain = type(part) in (list, tuple) and len(part) == count
        return type(part)(change(list(part))) if plain and _are_alike(list(part)) else part

    if isinstance(value, Mapping):
        return {name: change_one(part) for name, part in value.items()}
    return tuple(change_one(part) for part in value)


def _packed(value: Any) -> Iterator[PackedSequence]:
    if isinstance(value, PackedSequence):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _packed(part)


def _replaced(value: Any, change: Callable[[PackedSequence], PackedSequence]) -> Any:
    if isinstance(value, PackedSequence):
        return change(value)
    if isinstance(value, Mapping):
        return {name: _replaced(part, change) for name, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_replaced(part, change) for part in value)
    return value


def _sequence(packed: PackedSequence, *, last: bool) -> PackedSequence:
    """One of the packed sequences, packed again."""
    padded, lengths = pad_packed_sequence(packed)
    place = len(lengths) - 1 if last else 0
    return pack_padded_sequence(padded[:, place : place + 1], lengths[place : place + 1])


def _shapes(value: Any) -> Any:
    """What tells apart examples that may be asked about anew."""
    kinds = [(type(part).__name__, len(part)) for part in _listed(value)]
    return (tuple(kinds), tuple((tuple(t.shape), t.dtype) for t in tensors(value)))
