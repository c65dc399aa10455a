"""Channels leave one side of one layer; a cut is made of such edits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pliant.cost import LayerCost
from pliant.edits.edit import OPTIONAL, Replaced, layer_of
from pliant.edits.sides import (
    KERNELS,
    LAST,
    NORMS,
    apart,
    every_side,
    held,
    is_tensor,
    sides,
    tensor_of,
)
from pliant.errors import EditError
from pliant.nn import kinds, layers

Cut = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Prune:
    """Keeps some channels of one side of a layer, in their order, and removes the others.

    One edit alone rarely leaves a network that runs: all layers that the channels pass must be
    cut. ``pliant.surgery.graph`` finds them.

    Args:
        layer: name of a Conv1d/2d/3d, ConvTranspose1d/2d/3d, Linear, batch, instance or group
            norm, PReLU, LayerNorm or RMSNorm over channels, or of a layer of another class all of
            whose tensors have a number for every channel; or of a module that holds such tensors
            by itself, among others.
        side: ``out`` or ``in`` of a convolution or Linear; ``channels`` of a layer that treats
            every channel apart (norms, PReLU, depthwise convolutions, by their input channels);
            of any other module one of its tensors and the axis of the channels, ``scale:0``.
        keep: indices of the channels that stay, rising. A grouped convolution must keep equally
            many in each of its groups; those of a group norm stay or leave whole, since the
            statistics of what stays would be others. A norm over all channels takes its
            statistics over fewer of them afterwards.
        of: how many channels there are before.
        each: of a tensor of another module, how many parameters and bytes go with each channel.

    Raises:
        EditError: the layer has no such side, or not these channels.
    """

    layer: str
    side: str
    keep: tuple[int, ...]
    of: int
    each: tuple[int, ...] = field(default=(), repr=False, metadata=OPTIONAL)

    @property
    def form(self) -> str:
        """What the layer becomes."""
        return "pruned"

    @property
    def kept(self) -> tuple[int, int]:
        """How many channels stay, of how many."""
        return len(self.keep), self.of

    def apply(self, model: nn.Module, *, weights: bool = True) -> Replaced:
        """Cut the layer's tensors; a slice is made in any case, it costs no more than a shape."""
        module = layer_of(model, self.layer)
        self._check(module)
        cuts = list(_cuts(module, self.side, self.keep))
        return renewed(module, self.side, len(self.keep), [(name, cut, cut) for name, cut in cuts])

    def predict(self, before: LayerCost) -> LayerCost:
        """Return the cost of the layer with fewer channels."""
        if is_tensor(self.side):
            return _lighter(before, self)
        return resized(before, self.side, *self.kept)

    def removed(self) -> tuple[int, ...]:
        """Return the channels that leave."""
        return tuple(sorted(set(range(self.of)) - set(self.keep)))

    def _check(self, module: nn.Module) -> None:
        size = every_side(module).get(self.side)
        if size is None:
            raise EditError(
                f"{self.layer} is a {type(module).__name__}, of which no channels can be removed "
                f"on the side {self.side!r}."
            )
        rising = all(a < b for a, b in zip(self.keep, self.keep[1:], strict=False))
        fits = self.keep and rising and self.keep[0] >= 0 and self.keep[-1] < self.of
        if size != self.of or not fits:
            raise EditError(
                f"{self.layer} has {size} channels on the side {self.side!r}, so it cannot keep "
                f"{len(self.keep)} of {self.of} ({str(self.keep)[:60]}): the indices must rise "
                "and lie below their number."
            )
        groups = getattr(module, "groups", 1) if self.side in ("in", "out") else 1
        counts = {len(part) for part in _by_group(self.keep, self.of, groups)}
        if len(counts) > 1:
            raise EditError(
                f"{self.layer} has {groups} groups and must keep equally many channels in each."
            )
        if isinstance(module, nn.GroupNorm):
            parts = _by_group(self.keep, self.of, module.num_groups)
            whole = {0, self.of // module.num_groups}
            if module.num_groups > 1 and {len(part) for part in parts} - whole:
                raise EditError(
                    f"{self.layer} normalizes over groups of {self.of // module.num_groups} "
                    "channels, which must stay or leave whole."
                )


def renewed(
    module: Any, side: str, channels: int, tensors: Iterable[tuple[str, Cut, Cut]]
) -> Replaced:
    """Give a layer other tensors, for another number of channels.

    Args:
        module: the layer, changed in place.
        side: whose channels are others now.
        channels: how many there are then.
        tensors: names of tensors, each with what makes the new one out of the old, and what makes
            a tensor of an optimizer's state out of its old one.
    """
    old, new, states = [], [], []
    counts = _counts(module, side, channels)
    for name, make, state in tensors:
        tensor = getattr(module, name)
        if tensor is None:
            continue
        made = layers.in_layout_of(tensor, make(tensor.detach()))
        if isinstance(tensor, nn.Parameter):
            made = nn.Parameter(made, requires_grad=tensor.requires_grad)
            if tensor.grad is not None:  # of the batches before, if a step takes several
                made.grad = layers.in_layout_of(tensor.grad, state(tensor.grad))
            old.append(tensor)
            new.append(made)
            states.append(state)
        setattr(module, name, made)
    for name, value in counts.items():
        setattr(module, name, value)
    return Replaced(tuple(old), tuple(new), cuts=tuple(states))


def resized(before: LayerCost, side: str, k: int, n: int) -> LayerCost:
    """Return the cost of a layer that has k channels on one side where there were n."""
    reverse = before.kind.startswith("ConvTranspose") and side != "channels"
    axis = int((side == "in") != reverse)
    weight = list(before.weight)
    if len(weight) > axis:
        weight[axis] = weight[axis] * k // n
    whole = math.prod(before.weight) if before.weight else 0
    others = before.params - whole  # biases, which only outputs have
    params = (math.prod(weight) if weight else 0) + (others if side == "in" else others * k // n)
    counter = _counter(before)
    last = len(before.weight) == 2 or before.kind in [kind.__name__ for kind in LAST]
    place = -1 if last else 0  # features come last, channels first
    return replace(
        before,
        params=params,
        macs=before.macs * k // n,
        bytes=(before.bytes - counter) * params // max(before.params, 1) + counter,
        weight=tuple(weight),
        input=before.input if side == "out" else _scaled(before.input, place, k, n),
        output=before.output if side == "in" else _scaled(before.output, place, k, n),
    )


def _lighter(before: LayerCost, edit: Prune) -> LayerCost:
    """Return the cost of a module with fewer channels in one of its tensors."""
    name, axis = tensor_of(edit.side)
    weight = list(before.weight)
    if name == "weight" and len(weight) > axis:
        weight[axis] = len(edit.keep)
    params, size = (count * (edit.of - len(edit.keep)) for count in edit.each or (0, 0))
    return replace(
        before, params=before.params - params, bytes=before.bytes - size, weight=tuple(weight)
    )


def _cuts(module: Any, side: str, keep: tuple[int, ...]) -> Iterator[tuple[str, Cut]]:
    """Name the tensors that a side touches, and how each is cut."""
    if is_tensor(side):
        name, axis = tensor_of(side)
        yield name, partial(_selected, list(keep), axis)
        return
    if side == "in":
        groups = getattr(module, "groups", 1)
        cut = _columns(_by_group(keep, sides(module)["in"], groups))
        yield "weight", _by_rows(module, cut, groups)
        return
    times = module.out_channels // module.groups if side == "channels" and _conv(module) else 1
    rows = [channel * times + i for channel in keep for i in range(times)]
    found, _ = apart(module) if side == "channels" and not _conv(module) else ({}, 0)
    tensors = found or dict.fromkeys(("weight", "bias", "running_mean", "running_var"), 0)
    for name, axis in tensors.items():
        if hasattr(module, name):
            cut = partial(_selected, rows, axis)
            groups = len(keep) if side == "channels" else getattr(module, "groups", 1)
            yield name, _by_rows(module, cut, groups) if name == "weight" else cut


def _by_rows(module: Any, cut: Cut, groups: int) -> Cut:
    """Let a cut of a weight with output channels first cut one with inputs first, where it is so.

    Args:
        module: as it is before.
        cut: of rows.
        groups: that it has afterwards.
    """
    if not isinstance(module, kinds.TRANSPOSED):
        return cut
    before = module.groups
    return lambda weight: kinds.turned(cut(kinds.turned(weight, before)), groups).contiguous()


def _selected(rows: list[int], axis: int, tensor: Tensor) -> Tensor:
    return tensor.index_select(axis, _index(rows, tensor))


def _columns(parts: list[list[int]]) -> Cut:
    """Cut the inputs of a kernel, whose groups of rows read different ones."""

    def cut(tensor: Tensor) -> Tensor:
        blocks = tensor.chunk(len(parts))
        return torch.cat(
            [
                block.index_select(1, _index(part, tensor))
                for block, part in zip(blocks, parts, strict=True)
            ]
        )

    return cut


def _by_group(keep: tuple[int, ...], of: int, groups: int) -> list[list[int]]:
    """Split channels among the groups of a convolution, each counted from its group's first."""
    width = max(1, of // groups)
    parts: list[list[int]] = [[] for _ in range(groups)]
    for channel in keep:
        parts[channel // width].append(channel % width)
    return parts


def _counts(module: Any, side: str, k: int) -> dict[str, Any]:
    if side == "channels" and _conv(module):
        times = module.out_channels // module.groups
        return {"in_channels": k, "out_channels": k * times, "groups": k}
    if side == "channels" and isinstance(module, nn.GroupNorm):
        width = module.num_channels // module.num_groups
        return {"num_channels": k, "num_groups": max(1, k // width)}
    if side == "channels" and isinstance(module, (*NORMS, nn.PReLU)):
        return {"num_parameters" if isinstance(module, nn.PReLU) else "num_features": k}
    if type(module) in LAST:
        return {"normalized_shape": (k,)}
    if side == "channels" or is_tensor(side):
        return _said(module, apart(module)[1] if side == "channels" else held(module)[side], k)
    return {f"{side}_channels" if _conv(module) else f"{side}_features": k}


def _said(module: Any, size: int, k: int) -> dict[str, Any]:
    """The attributes of a module that say how many channels there are, and what they say then."""
    found: dict[str, Any] = {}
    for name, value in vars(module).items():
        if type(value) is int and value == size:
            found[name] = k
        shape = value if isinstance(value, tuple | list) else ()  # such as (C, 1, 1)
        if size in shape and all(v in (1, size) for v in shape) and math.prod(shape) == size:
            found[name] = tuple(k if v == size else v for v in shape)
    return found


def _conv(module: nn.Module) -> bool:
    return isinstance(module, KERNELS)


def _index(rows: list[int], tensor: Tensor) -> Tensor:
    return torch.tensor(rows, dtype=torch.long, device=tensor.device)


def _counter(before: LayerCost) -> int:
    """Bytes of a batch norm's counter of batches, which does not shrink: 8, or 0 without one."""
    if "BatchNorm" not in before.kind or (before.bytes - 8) % (2 * before.params):
        return 0
    return 8


def _scaled(shape: tuple[int, ...], place: int, k: int, n: int) -> tuple[int, ...]:
    if not shape:
        return shape
    new = list(shape)
    new[place] = new[place] * k // n
    return tuple(new)
