"""Whether decisions depend on what lies where: tiles and positions in another order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

BOOTSTRAP = 1000  # draws of the images behind an interval
BINOMIAL = (0.25, 0.5, 0.25)


def parts_of(sizes: Sequence[int], parts: int) -> tuple[int, ...]:
    """Return into how many parts each axis is cut: one where it cannot be divided evenly."""
    return tuple(parts if size % parts == 0 else 1 for size in sizes)


def shuffle_tiles(inputs: Tensor, parts: int, generator: torch.Generator) -> Tensor:
    """Cut every input into tiles and put them together in a random order, each in its own.

    Args:
        inputs: (samples, channels, *positions).
        parts: into how many parts each axis is cut.
        generator: draws the orders.
    """
    cut = parts_of(inputs.shape[2:], parts)
    tiles, shape = _tiles(inputs, cut)
    order = _orders(len(tiles), tiles.shape[1], generator).to(tiles.device)
    mixed = tiles.gather(1, order.view(*order.shape, *[1] * (tiles.dim() - 2)).expand_as(tiles))
    return _untile(mixed, cut, shape)


def permute_positions(maps: Tensor, generator: torch.Generator) -> Tensor:
    """Put the positions of every map into a random order, all channels alike."""
    flat = maps.flatten(2)
    order = _orders(len(flat), flat.shape[2], generator).to(maps.device)
    return flat.gather(2, order[:, None].expand_as(flat)).reshape(maps.shape)


def shift_positions(maps: Tensor) -> Tensor:
    """Move maps round by half of each axis: positions change, but what lies beside what stays."""
    sizes = maps.shape[2:]
    return maps.roll([size // 2 for size in sizes], list(range(2, maps.dim())))


def blur_seams(inputs: Tensor, parts: int) -> Tensor:
    """Smooth the positions on both sides of every border between tiles, axis by axis."""
    blurred = inputs
    for axis, count in enumerate(parts_of(inputs.shape[2:], parts), start=2):
        size = inputs.shape[axis]
        seams = [border * size // count + side for border in range(1, count) for side in (-1, 0)]
        if not seams:
            continue
        at = torch.tensor(seams, device=inputs.device)
        moved = [blurred.index_select(axis, (at + by).clamp(0, size - 1)) for by in (-1, 0, 1)]
        soft = torch.stack([weight * part for weight, part in zip(BINOMIAL, moved, strict=True)])
        blurred = blurred.index_copy(axis, at, soft.sum(0))
    return blurred


@contextmanager
def rearranged(model: nn.Module, layer: str, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Change what a layer gives, inside the block; the hook comes off also after an exception."""

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return change(output)

    handle = model.get_submodule(layer).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True)
class Agreement:
    """How often decisions stay as they were.

    Args:
        share: of all decisions, in 0..1.
        low: the least of the 95 % interval from drawing the images again and again.
        high: the most of it.
        chance: what it would be if the decisions after the change belonged to other images.
        p: how often it is as high when they do.
    """

    share: float
    low: float
    high: float
    chance: float
    p: float


def agreement(before: Tensor, after: Sequence[Tensor], generator: torch.Generator) -> Agreement:
    """Compare decisions with those after a change, made in several ways.

    The null: the same decisions, dealt out to the images at random. A network that puts nearly
    everything into one class agrees with itself by chance, and this shows it.

    Args:
        before: (images,), classes.
        after: each (images,), one for every way.
        generator: draws images and dealings.
    """
    count = len(before)
    each = torch.stack([(before == one).double() for one in after]).mean(0)
    draws = torch.randint(count, (BOOTSTRAP, count), generator=generator)
    spread = each[draws].mean(1)
    dealt = _orders(BOOTSTRAP, count, generator)
    null = torch.stack([(before == one[dealt]).double().mean(1) for one in after]).mean(0)
    share = float(each.mean())
    low, high = (float(spread.quantile(at)) for at in (0.025, 0.975))
    p = (1 + int((null >= share - 1e-12).sum())) / (1 + BOOTSTRAP)
    return Agreement(share, low, high, float(null.mean()), p)


def _orders(rows: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw a permutation for each row, (rows, count)."""
    return torch.rand(rows, count, generator=generator, dtype=torch.float64).argsort(1)


def _tiles(inputs: Tensor, cut: Sequence[int]) -> tuple[Tensor, tuple[int, ...]]:
    """Return tiles (samples, tiles, channels, *tile), and the shape of inputs."""
    sizes = inputs.shape[2:]
    split = [n for size, parts in zip(sizes, cut, strict=True) for n in (parts, size // parts)]
    axes = len(sizes)
    grid, inner = [2 + 2 * axis for axis in range(axes)], [3 + 2 * axis for axis in range(axes)]
    view = inputs.reshape(*inputs.shape[:2], *split).permute(0, *grid, 1, *inner)
    return view.flatten(1, axes), tuple(inputs.shape)


def _untile(tiles: Tensor, cut: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    axes = len(cut)
    view = tiles.reshape(shape[0], *cut, *tiles.shape[2:])
    back = [0, 1 + axes]
    for axis in range(axes):
        back += [1 + axis, 2 + axes + axis]
    return view.permute(back).reshape(shape)
