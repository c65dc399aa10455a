"""Follows the tensors that modules hold by themselves to where they meet channels.

A block may scale what it gives, a network may put tokens of its own before those that come, or
add positions to them. Such a tensor has numbers for the channels that it meets, along one of its
axes, and loses those of the channels that leave. No name says which axis that is: the tensor is
followed through all that reshapes it, each number with its place, until it meets what has marks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pliant.edits.sides import held, tensor_of
from pliant.surgery.marks import Slot

Places = list[tuple[Slot, Tensor]]
"""Axes of tensors, and for every number of what is made of them its index along that axis.

Not-a-number where a number comes from elsewhere.
"""
RESHAPED = "{} is reshaped before it meets them, so it stays whole"

_PLACING = (
    "view reshape getitem expand expand_as broadcast_to permute transpose swapaxes movedim t get "
    "unsqueeze squeeze flatten unflatten narrow chunk split unbind select index_select repeat tile "
    "flip roll interpolate"
)
_MOVING = frozenset(_PLACING.split())
"""Functions that put numbers elsewhere, by their first argument."""
_SINGLE = (
    "add radd iadd sub rsub isub subtract mul rmul imul multiply div rdiv truediv rtruediv "
    "itruediv true_divide divide pow rpow maximum minimum where addcmul addcdiv lerp"
)
_EACH = frozenset(_SINGLE.split())
"""Functions that compute each number of its own ones."""
_JOINING = frozenset(("cat", "concat", "concatenate"))
_FIRST = frozenset(("prelu", "batch_norm", "instance_norm", "group_norm"))
_LAST = frozenset(("layer_norm", "rms_norm"))


class Held(TorchFunctionMode):
    """Calls ``meet`` and ``tie`` wherever a tensor that a module holds meets others.

    Args:
        model: holds the tensors.
        meet: gets another tensor, the axes of it (counted from the last) along which one held
            lies, and its side and indices there; None where no axis of it lies so.
        tie: gets two sides and their indices, as far as they lie side by side.
    """

    def __init__(
        self,
        model: nn.Module,
        meet: Callable[[Tensor, Sequence[int], Slot, Tensor | None], None],
        tie: Callable[[Slot, Tensor, Slot, Tensor], None],
    ) -> None:
        super().__init__()
        self.meet, self.tie = meet, tie
        self.own: dict[int, tuple[Tensor, Places]] = {}
        for name, module in model.named_modules():
            for side in held(module):
                tensor, axis = getattr(module, tensor_of(side)[0]), tensor_of(side)[1]
                numbers = torch.arange(tensor.shape[axis], dtype=torch.float32)
                shape = [-1 if dim == axis else 1 for dim in range(tensor.dim())]
                places = numbers.view(shape).expand(tensor.shape)
                self.own.setdefault(id(tensor), (tensor, []))[1].append(((name, side), places))
        self.known = dict(self.own)

    def begin(self) -> None:
        """Forget what was made of the tensors, before another forward pass."""
        self.known = dict(self.own)

    def of(self, tensor: Tensor) -> Places:
        """Return what is known of a tensor."""
        return self.known[id(tensor)][1] if id(tensor) in self.known else []

    def along(self, tensor: Tensor, axis: int) -> Places:
        """Return those sides that lie along an axis of a tensor, with their indices there."""
        found = []
        for slot, places in self.of(tensor):
            for dim, stride in enumerate(places.stride()):
                places = places if stride else places.narrow(dim, 0, 1)
            if places.shape[axis] == tensor.shape[axis] > 1:
                lines = places.nan_to_num(nan=-1).movedim(axis, 0).reshape(tensor.shape[axis], -1)
                if (lines == lines[:, :1]).all() and (lines[:, 0] != lines[0, 0]).any():
                    found.append((slot, lines[:, 0]))
        return found

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call the function, and see what became of the tensors in it."""
        found = func(*args, **(kwargs or {}))
        given = list(_tensors((*args, *(kwargs or {}).values())))
        if any(id(tensor) in self.known for tensor in given):
            with torch._C.DisableTorchFunction():
                name = getattr(func, "__name__", "").strip("_")
                self._follow(name, func, args, kwargs or {}, given, found)
        return found

    def _follow(
        self,
        name: str,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        given: Sequence[Tensor],
        found: Any,
    ) -> None:
        others = [each for each in given if id(each) not in self.known and each.numel() > 1]
        mine = [each for each in given if id(each) in self.known]
        if name in _MOVING:
            if args and id(args[0]) in self.known:
                self._move(func, args, kwargs, found)
        elif name in _JOINING:
            axis = kwargs.get("dim", args[1] if len(args) > 1 else 0)
            self._meet_all(mine, others, skipped=axis - given[0].dim() if axis >= 0 else axis)
            if not others:
                self._note(found, self._joined(mine, axis))
        elif name in _EACH:
            self._meet_all(mine, others)
            if not others:
                self._note(found, self._spread(mine, found.shape))
        elif name in _FIRST or name in _LAST:
            for each in mine if others else ():
                self._meet(each, others[0], {-1: -1 if name in _LAST else 1 - others[0].dim()})
        elif len(mine) == 1 and isinstance(found, Tensor) and found.shape == mine[0].shape:
            self._note(found, self.of(mine[0]))

    def _meet_all(
        self, mine: Sequence[Tensor], others: Sequence[Tensor], skipped: int | None = None
    ) -> None:
        """Let tensors that lie on one another meet, their last axes on one another."""
        for place, each in enumerate(mine):
            axes = {axis: axis for axis in range(-each.dim(), 0) if axis != skipped}
            for other in others:
                self._meet(each, other, axes)
            for other in mine[:place]:
                for axis in [axis for axis in axes if axis >= -other.dim()]:
                    for slot, places in self.along(each, axis):
                        for second, there in self.along(other, axis):
                            self.tie(slot, places, second, there)

    def _meet(self, each: Tensor, other: Tensor, axes: dict[int, int]) -> None:
        """Let a tensor meet another, along axes of the first as they lie on those of the second."""
        lost = []
        for mine, theirs in axes.items():
            if theirs < -other.dim() or each.shape[mine] != other.shape[theirs]:
                continue
            found = self.along(each, mine)
            for slot, places in found:
                self.meet(other, [theirs], slot, places)
            lost += [theirs] if not found and each.shape[mine] > 1 else []
        for slot, _ in self.of(each) if lost else ():
            self.meet(other, lost, slot, None)

    def _move(self, func: Any, args: tuple[Any, ...], kwargs: Any, found: Any) -> None:
        made = [found] if isinstance(found, Tensor) else found
        if not isinstance(made, list | tuple) or not all(isinstance(m, Tensor) for m in made):
            return
        each: list[Places] = [[] for _ in made]
        for slot, places in self.of(args[0]):
            moved = func(places, *args[1:], **kwargs)
            for one, part in zip(
                each, [moved] if isinstance(moved, Tensor) else moved, strict=True
            ):
                whole = (part - part.round()).abs() < 1e-3  # no mean of several places
                one.append((slot, part if bool(whole.all()) else part.where(whole, torch.nan)))
        for tensor, own in zip(made, each, strict=True):
            self._note(tensor, own)

    def _joined(self, parts: Sequence[Tensor], axis: int) -> Places:
        found = []
        for place, part in enumerate(parts):
            for slot, places in self.of(part):
                rest = [torch.full(other.shape, torch.nan) for other in parts]
                found.append((slot, torch.cat([*rest[:place], places, *rest[place + 1 :]], axis)))
        return found

    def _spread(self, parts: Sequence[Tensor], shape: torch.Size) -> Places:
        return [(slot, p.broadcast_to(shape)) for part in parts for slot, p in self.of(part)]

    def _note(self, tensor: Any, places: Places) -> None:
        if isinstance(tensor, Tensor) and id(tensor) not in self.own:
            self.known[id(tensor)] = tensor, places


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    """Go through arguments, and what lies in lists of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from (each for each in value if isinstance(each, Tensor))
