"""Samples vote for the units whose activations stand out among those of their layer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from pliant.cost import Example
from pliant.families.prune.scores import Groups
from pliant.observe.rows import Rows

Ballot = Literal["mean", "most", "pairwise"]


def ballots(activations: Tensor, ballot: Ballot) -> Tensor:
    """Return the votes that each unit gets from all samples, (units,) float64.

    Args:
        activations: (samples, units).
        ballot: "mean": a sample votes for the units above the mean of the layer; "most": for the
            larger half of them, ties by their order; "pairwise": a unit gets the share of the
            others that it exceeds, ties count a half, so all votes sum to samples * units / 2.
    """
    values = activations.double()
    count = values.shape[1]
    if ballot == "mean":
        return (values > values.mean(1, keepdim=True)).sum(0).double()
    if ballot == "most":
        ranks = (-values).argsort(dim=1, stable=True).argsort(dim=1)
        return (ranks < (count + 1) // 2).sum(0).double()
    ordered = values.sort(dim=1).values
    below = torch.searchsorted(ordered, values.contiguous())
    upto = torch.searchsorted(ordered, values.contiguous(), right=True)
    return ((below + (upto - 1 - below) / 2) / max(1, count - 1)).double().sum(0)


def votes(
    model: nn.Module, groups: Groups, batches: Iterable[Example], ballot: Ballot
) -> dict[str, Tensor]:
    """Return which share of the votes each unit of every group gets, (units,) on the CPU.

    What a layer reads of a unit counts, its magnitude averaged over positions: behind the
    nonlinearity, without dropout. Layers that read the same units add their votes. Nothing is kept
    of a batch but its votes.
    """
    totals = {group.name: torch.zeros(len(group.units)).double() for group in groups}
    cast = dict.fromkeys(totals, 0)
    slots = [(group, slot) for group in groups for slot in group.slots if slot[1] == "in"]
    layers = list(dict.fromkeys(slot[0] for _, slot in slots))
    for rows in Rows(model, layers, side="input", form=_sizes).stream(batches):
        for group, slot in slots:
            if slot[0] in rows:
                seen = rows[slot[0]].cpu()[:, group.rows(slot)].mean(2)
                totals[group.name] += ballots(seen, ballot)
                cast[group.name] += len(seen)
    return {name: total / max(1, cast[name]) for name, total in totals.items()}


def _sizes(map_: Tensor) -> Tensor:
    return map_.abs().flatten(2).float().mean(2) if map_.dim() > 2 else map_.abs()
