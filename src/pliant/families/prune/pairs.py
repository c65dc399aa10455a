"""Blocks of weights between groups of inputs and groups of outputs of one layer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from pliant.cost import Example
from pliant.data import Data, unpack
from pliant.errors import ModelError
from pliant.families.prune import sparse
from pliant.families.prune.allocate import fewest
from pliant.families.prune.dependence import dependences, standard
from pliant.observe.order import order
from pliant.observe.rows import Rows
from pliant.observe.watch import samples
from pliant.run import Run

MOST_GROUPS = 64  # of the outputs of one layer
MOST_SAMPLES = 2400  # a tree takes memory of the square of their number


@dataclass(frozen=True)
class Block:
    """The weights by which one group of outputs reads one group of inputs.

    Args:
        layer: whose weights they are.
        rows: the outputs, from the first to behind the last.
        columns: the inputs.
        level: how far the outputs depend on these inputs.
        energy: mean magnitude of the weights, which decides between equal levels.
        size: how many weights.
    """

    layer: str
    rows: tuple[int, int]
    columns: tuple[int, int]
    level: float
    energy: float
    size: int


def spans(count: int, parts: int) -> list[tuple[int, int]]:
    """Divide units into groups of neighbours, as equal as can be: where each begins and ends."""
    parts = min(count, parts)
    ends = [number * count // parts for number in range(parts + 1)]
    return list(zip(ends, ends[1:], strict=False))


def chosen(data: Data, each: int, seed: int) -> list[Example]:
    """Draw training inputs, equally many of every class where labels are classes.

    Args:
        data: with a training split.
        each: of each class at most; `MOST_SAMPLES` in all.
        seed: of the choice.
    """
    most = min(MOST_SAMPLES, each * max(1, data.class_count))
    quota = max(1, most // max(1, data.class_count))
    seen, found, total = dict[int, int](), list[Example](), 0
    for item in data.batches("train", 256, seed=seed, shuffle=True):
        example, labels = unpack(item)
        keep = torch.ones(samples(example), dtype=torch.bool)
        if isinstance(labels, Tensor) and labels.dim() == 1 and not labels.is_floating_point():
            keep = _within(labels.tolist(), seen, quota)
        found.append(tree_map(lambda v, k=keep: v[k] if isinstance(v, Tensor) else v, example))
        total += int(keep.sum())
        if total >= most:
            break
    return [example for example in found if samples(example)]


def _within(labels: Iterable[int], seen: dict[int, int], quota: int) -> Tensor:
    keep = []
    for label in labels:
        seen[label] = seen.get(label, 0) + 1
        keep.append(seen[label] <= quota)
    return torch.tensor(keep)


def divided(
    run: Run, parts: int, only: Sequence[str] = (), exclude: Sequence[str] = ()
) -> dict[str, int]:
    """Return the layers to look at, each with the number of groups of its outputs.

    Raises:
        ModelError: there are none.
        MethodError: a name pattern matches no layer.
    """
    names = sparse.subjects(run, only, exclude)
    called = order(run.model, run.example, names).called
    layers = {}
    for name in names:
        layer = sparse.layer_of(run, name)
        if getattr(layer, "groups", 1) > 1:
            run.keep(name, "its inputs are divided among groups already")
        elif name == called[0] and not isinstance(layer, nn.Linear):
            run.keep(name, "it reads the inputs of the network")
        else:
            last = name == called[-1]
            layers[name] = min(len(layer.weight), MOST_GROUPS) if last else parts
    if not layers:
        raise ModelError(
            "The model has no two layers in a row between which connections could go: mint "
            "leaves alone the first convolution and those with groups."
        )
    return layers


def blocks(
    run: Run, layers: Mapping[str, int], parts: int, inputs: Sequence[Example], repeats: int
) -> list[Block]:
    """Return the blocks of layers with how far their outputs depend on their inputs.

    A number for each unit and sample counts, its mean over positions: of inputs as the layer
    reads them, of outputs as it gives them.

    Args:
        run: with the network; draws from its generator.
        layers: into how many groups the outputs of each are divided.
        parts: groups of inputs.
        inputs: the same for all layers.
        repeats: of each estimate.
    """
    read = Rows(run.model, list(layers), side="input").all(inputs)
    gave = Rows(run.model, list(layers)).all(inputs)
    found = []
    for name, groups in layers.items():
        rows, columns = spans(gave[name].shape[1], groups), spans(read[name].shape[1], parts)
        x, y = standard(gave[name]), standard(read[name])
        levels = dependences(
            [x[:, slice(*span)] for span in rows],
            [y[:, slice(*span)] for span in columns],
            run.generator,
            repeats,
        )
        weight = run.model.get_parameter(f"{name}.weight").detach().abs()
        for row, own in zip(rows, levels.tolist(), strict=True):
            for column, level in zip(columns, own, strict=True):
                part = weight[slice(*row), slice(*column)]
                found.append(Block(name, row, column, level, float(part.mean()), part.numel()))
    return found


def dropped(found: Sequence[Block], cutoff: float, cap: float) -> list[Block]:
    """Return the blocks that depend least: up to a cutoff, and up to a share of each layer.

    Of equal levels those of the smallest weights go first. The last block of a group of outputs
    stays: without inputs they would be constants, and what lies behind them cut off.
    """
    gone = []
    for layer in dict.fromkeys(block.layer for block in found):
        own = [block for block in found if block.layer == layer]
        most, total = cap * sum(block.size for block in own) + 1e-9, 0
        left = Counter(block.rows for block in own)
        for block in sorted(own, key=lambda b: (b.level, b.energy)):
            if left[block.rows] == 1:
                continue
            total += block.size
            if block.level > cutoff or total > most:
                break
            left[block.rows] -= 1
            gone.append(block)
    return gone


def leaving(run: Run, found: Sequence[Block], share: float, cap: float) -> list[Block]:
    """Return the blocks that become zero: as few as a budget of bytes asks, or a share.

    Args:
        run: with the budget.
        found: all blocks.
        share: of the distinct levels, without a budget.
        cap: share of the weights of a layer at most.

    Raises:
        BudgetError: the budget cannot be met.
    """
    bound = run.limits().get("bytes")
    if bound is None:
        cutoffs = sorted({block.level for block in found})
        place = round(share * len(cutoffs))
        return dropped(found, cutoffs[place - 1], cap) if place else []
    ranked = sorted(dropped(found, math.inf, cap), key=lambda b: (b.level, b.energy))

    def size(count: int) -> int:
        masks = masks_of(run, {block.layer for block in found}, ranked[:count])
        return sparse.bytes_with(run, {name: int(m.sum()) for name, m in masks.items()})

    count = fewest(len(ranked), lambda count: size(count) <= bound)
    if count is None:
        raise sparse.missed(bound, size(len(ranked)))
    return ranked[:count]


def masks_of(run: Run, layers: Iterable[str], gone: Iterable[Block]) -> dict[str, Tensor]:
    """Return by layer which weights stay."""
    masks = {
        name: torch.ones_like(run.model.get_parameter(f"{name}.weight"), dtype=torch.bool)
        for name in layers
    }
    for block in gone:
        masks[block.layer][slice(*block.rows), slice(*block.columns)] = False
    return masks
