"""Single weights that are zero: held there while the network trains, and stored as a bitmap.

Zeros inside of a kernel save bytes where they are stored, and nothing else: a layer with a sparse
kernel is decoded at every call, so it is no faster than the dense one, but slower.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pliant.codecs.address_map import masked_size
from pliant.codecs.tensors import matrix
from pliant.edits.encode import encoding
from pliant.errors import BudgetError, TrainingError, nothing_for
from pliant.families.prune.columns import columns
from pliant.families.prune.scores import Groups
from pliant.nn.layers import Factorizable
from pliant.observe.order import order
from pliant.run import Run
from pliant.surgery.prove import cuttable, edits_of, unproven
from pliant.surgery.select import readable

Masks = Mapping[str, Tensor]
"""By layer, which weights stay: bool, of the shape of its weight."""

NO_GAIN = "stored sparse it would not be smaller"


def subjects(run: Run, only: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[str]:
    """Return the layers whose weights may become zero, and record why others may not.

    Raises:
        ModelError: there are none.
        MethodError: a name pattern matches no layer.
    """
    layers, reasons = run.readable(only, exclude)
    run.keep_all(reasons)
    if not layers:
        needs = "it needs a convolution or a linear layer of its own"
        raise nothing_for(f"layer whose weights may become zero: {needs}", reasons)
    return list(layers)


def prunable(
    run: Run, only: Sequence[str] = (), exclude: Sequence[str] = (), *, linear: bool = False
) -> list[str]:
    """Return the convolutions whose weights may become zero, and record why others' may not.

    Args:
        run: with the network.
        only: name patterns of the layers to consider.
        exclude: name patterns of the layers to leave alone.
        linear: take linear layers too, but for the last layer, as where there are no convolutions.

    Raises:
        ModelError: there is none.
        MethodError: a name pattern matches no layer.
    """
    names = subjects(run, only, exclude)
    convolutions = [name for name in names if not isinstance(layer_of(run, name), nn.Linear)]
    last = order(run.model, run.example, names).called[-1:]
    chosen = convolutions
    if linear or not convolutions:
        chosen = [name for name in names if name in convolutions or name not in last] or names
    for name in names:
        if name not in chosen:
            run.keep(name, "linear layers, or the last of them, keep their weights")
    return chosen


def layer_of(run: Run, name: str) -> Factorizable:
    """Return a layer by its name."""
    layer: Any = run.model.get_submodule(name)
    return layer


def weight_of(run: Run, name: str) -> Tensor:
    """Return the weight of a layer, without gradients.

    Raises:
        TrainingError: it is not finite.
    """
    weight = layer_of(run, name).weight.detach()
    if not weight.isfinite().all():
        raise TrainingError(
            f"Weights must stay finite to be ranked, but those of {name} are not: lower the "
            "learning rate."
        )
    return weight


def stored(weight: Tensor, nonzero: int) -> int:
    """Return the bytes of a kernel with so many numbers, stored as is smallest."""
    sparse = masked_size(nonzero, matrix(tuple(weight.shape)), weight.element_size())
    return min(weight.nbytes, sparse)


def bytes_with(run: Run, counts: Mapping[str, int]) -> int:
    """Return the bytes of the network where layers keep so many weights."""
    weights = {name: layer_of(run, name).weight for name in counts}
    rest = run.planner.now().bytes - sum(weight.nbytes for weight in weights.values())
    return rest + sum(stored(weights[name], count) for name, count in counts.items())


def missed(bound: float, least: int) -> BudgetError:
    """Return the error that a budget of bytes cannot be met."""
    return BudgetError(
        f"The budget bytes={bound:,.0f} cannot be met by weights that become zero (the least "
        f"reachable is {least:,}): allow more, or let the method touch more layers."
    )


def store(run: Run, names: Sequence[str]) -> None:
    """Store the kernels of layers sparse, for good, where that makes them smaller."""
    edits = []
    for name in names:
        edit = encoding(name, layer_of(run, name).weight.detach(), "mask")
        if edit is None:
            run.keep(name, NO_GAIN)
        else:
            edits.append(edit)
    run.apply(*edits)


@torch.no_grad()
def share_of_zeros(masks: Masks) -> float:
    """Return the share of all masked weights that is zero."""
    total = sum(mask.numel() for mask in masks.values())
    return 1 - sum(int(mask.sum()) for mask in masks.values()) / max(1, total)


def unread(model: nn.Module, groups: Groups) -> dict[str, list[int]]:
    """Return the units that nothing reads, by group; one of each group stays in any case."""
    leaving = {}
    for group in groups:
        read = torch.zeros(len(group.units), dtype=torch.bool)
        for slot in group.slots:
            if slot[1] == "in":
                own = columns(model.get_submodule(slot[0])).detach().cpu()
                read |= (own[group.rows(slot)] != 0).flatten(1).any(1)
        gone = (~read).nonzero().flatten().tolist()
        leaving[group.name] = gone[: len(read) - 1]
    return leaving


def drop_unread(run: Run, only: Sequence[str], exclude: Sequence[str]) -> None:
    """Take out the channels that nothing reads any more: the network computes what it did."""
    chosen, _ = readable(run.model, only=only, exclude=exclude, every=True)
    groups, _ = cuttable(run.model, run.example)
    mine = [g for g in groups if all(layer in chosen for layer, _ in g.makers)]
    leaving = unread(run.model, mine)
    failing = unproven(run.model, run.example, mine, leaving)
    run.apply(*edits_of(run.model, [g for g in mine if g.name not in failing], leaving))
