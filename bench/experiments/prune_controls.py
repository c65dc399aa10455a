"""What pruning methods are compared with: the same method by lot, by norms, or turned around."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from bench.small import method_of
from pliant.cost import Example
from pliant.edits import Remove
from pliant.families.prune import sparse
from pliant.families.prune.allocate import Goal
from pliant.families.prune.columns import columns, hold, project, supports
from pliant.families.prune.density import measured
from pliant.families.prune.pairs import blocks, chosen, divided, leaving, masks_of
from pliant.families.prune.pruner import ChannelPruning
from pliant.families.prune.rewind import smallest
from pliant.families.prune.scores import Groups, Scores
from pliant.method import Method
from pliant.methods.prune.activation_density import ActivationDensity
from pliant.methods.prune.constrained_projection import ConstrainedProjection
from pliant.methods.prune.discriminant_information import DiscriminantInformation
from pliant.methods.prune.dynamic_channel_propagation import DynamicChannelPropagation
from pliant.methods.prune.majority_voting import MajorityVoting
from pliant.methods.prune.mi_layers import MILayers
from pliant.methods.prune.mint import MINT
from pliant.methods.prune.sspruning import SSPruning
from pliant.run import Run
from pliant.surgery.prove import Leaving


@dataclass(frozen=True)
class Blocks(MILayers):
    """Removes as many blocks, but in another order."""

    order: Literal["lot", "norm", "reversed"] = "lot"

    def worth(self, run: Run, found: Sequence[Remove]) -> list[float]:
        if self.order == "reversed":
            return [-value for value in super().worth(run, found)]
        if self.order == "lot":
            return torch.rand(len(found), generator=run.generator).tolist()
        return [_norm(run.model.get_submodule(edit.layer)) for edit in found]


def _norm(block: nn.Module) -> float:
    """The root mean square of the convolutions' weights."""
    weights = [m.weight.detach().flatten() for m in block.modules() if isinstance(m, nn.Conv2d)]
    return float(torch.cat(weights).square().mean().sqrt())


@dataclass(frozen=True)
class Tied(SSPruning):
    """The same scores, but channels that meet in a sum leave together."""

    def groups(self, run: Run) -> Groups:
        return ChannelPruning.groups(self, run)

    def cut(self, run: Run, goal: Goal, *, last: bool = True) -> None:
        ChannelPruning.cut(self, run, goal, last=last)


@dataclass(frozen=True)
class MostUseful(DynamicChannelPropagation):
    """Removes the channels of the greatest utility; without training only."""

    def scores(self, run: Run, groups: Groups) -> Scores:
        return {name: -values for name, values in super().scores(run, groups).items()}


@dataclass(frozen=True)
class MostSeparating(DiscriminantInformation):
    """Removes the channels that separate the classes best."""

    def scores(self, run: Run, groups: Groups) -> Scores:
        return {name: -values for name, values in super().scores(run, groups).items()}


@dataclass(frozen=True)
class Densities(ActivationDensity):
    """The same, with the density of every layer noted before each resizing and at the end."""

    def cut(self, run: Run, goal: Goal, *, last: bool = True) -> None:
        self._look(run)
        super().cut(run, goal, last=last)

    def finalize(self, run: Run) -> None:
        self._look(run)
        super().finalize(run)

    def _look(self, run: Run) -> None:
        found = measured(run, self.groups(run), self.samples)
        run.note(densities={name: density.mean for name, density in found.items()})


@dataclass(frozen=True)
class Threshold(ConstrainedProjection):
    """Zeroes the smallest weights of all layers that read channels: as many as l1,1 would."""

    def allocation(self, run: Run, groups: Groups, goal: Goal) -> Leaving:
        super().allocation(run, groups, goal)
        layers = list(run.state["radii"])
        trial = copy.deepcopy(run.model)
        project(trial, run.state["radii"], self.norm)
        kept = sum(int(mask.sum()) for mask in supports(trial, layers).values())
        weights = {name: run.model.get_submodule(name).weight.detach() for name in layers}
        whole = {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}  # type: ignore[call-overload]
        hold(run.model, smallest(weights, whole, kept))  # type: ignore[arg-type]
        run.state["radii"] = dict.fromkeys(layers, 1e30)  # nothing is projected any more
        return {
            name: units[: max(0, len(units) - 1)]
            for name, units in sparse.unread(run.model, groups).items()
        }


@dataclass(frozen=True)
class OtherBlocks(MINT):
    """Zeroes blocks of the same shapes, but by lot or by the norm of their weights."""

    by: Literal["lot", "norm"] = "lot"

    def prepare(self, run: Run) -> None:
        assert run.data is not None
        layers = divided(run, self.groups, self.only, self.exclude)
        found = blocks(run, layers, self.groups, chosen(run.data, 2, run.seed), 1)
        lots = torch.rand(len(found), generator=run.generator).tolist()
        levels = lots if self.by == "lot" else [block.energy for block in found]
        found = [replace(each, level=level) for each, level in zip(found, levels, strict=True)]
        masks = masks_of(run, layers, leaving(run, found, self.share, self.cap))
        run.state["masks"] = masks
        run.note(zeros=sparse.share_of_zeros(masks))
        hold(run.model, masks)


@dataclass(frozen=True)
class SparseVoting(MajorityVoting):
    """Votes in a network of which a share of the weights was zeroed before, and stays zero."""

    zeros: float = 0.8

    def prepare(self, run: Run) -> None:
        layers = [n for n, m in run.model.named_modules() if isinstance(m, nn.Linear)]
        weights = {name: sparse.weight_of(run, name) for name in layers}
        masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}
        total = sum(mask.numel() for mask in masks.values())
        run.state["sparse"] = smallest(weights, masks, round((1 - self.zeros) * total))
        hold(run.model, run.state["sparse"])
        super().prepare(run)

    def before_step(self, run: Run) -> None:
        hold(run.model, run.state["sparse"], gradients=True)
        super().before_step(run)

    def after_step(self, run: Run) -> None:
        hold(run.model, run.state["sparse"])
        super().after_step(run)

    def cut(self, run: Run, goal: Goal, *, last: bool = True) -> None:
        super().cut(run, goal, last=last)
        run.state["sparse"] = supports(run.model, list(run.state["sparse"]))


RADII = (0.05, 0.1, 0.2, 0.4)
CONTROLS: Mapping[str, Method] = {
    "blocks by lot": Blocks(samples=1000),
    "blocks of small norms": Blocks(order="norm", samples=1000),
    "blocks that say most": Blocks(order="reversed", samples=1000),
    "tied shortcuts": Tied(samples=512),
    "most useful channels": MostUseful(),
    "most separating channels": MostSeparating(search="none", samples=512),
    "densities, inherited": Densities(rounds=3, start=0.2),
    "densities, fresh": Densities(rounds=3, start=0.2, weights="fresh"),
    **{
        f"threshold {radius:g}": Threshold(radius=radius, least=0.0)
        for radius in (0.05, 0.1, 0.2, 0.4)
    },
    "weight blocks by lot": OtherBlocks(cap=0.95),
    "weight blocks of small norms": OtherBlocks(cap=0.95, by="norm"),
    "sparse": SparseVoting(ratio=0.0, rounds=1),
    "sparse, voted": SparseVoting(ratio=0.65),
}
"""Methods that are not in the registry, by the name that plans call them."""


def method(spec: str) -> Method:
    """Return a control by its name, or a registered method."""
    return CONTROLS[spec] if spec in CONTROLS else method_of(spec)


def steps_of_eight(model: nn.Module, example: Example) -> float:
    """Return the seconds of an imagined device, which computes 8 by 8 channels at a time."""
    convs: list[Any] = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    blocks = sum(math.ceil(m.in_channels / 8) * math.ceil(m.out_channels / 8) for m in convs)
    return 1e-4 * (1 + blocks)


def nearly_dead(model: nn.Module) -> dict[str, float]:
    """Return the shares of filters, and of inputs read, below a hundredth of the layer's most."""
    filters, inputs = [], []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            norms = module.weight.detach().flatten(1).norm(dim=1)
            filters.append(norms < 0.01 * norms.max())
            reads = columns(module).detach().norm(dim=1)
            inputs.append(reads < 0.01 * reads.max())
    shares = (float(torch.cat(each).double().mean()) for each in (filters, inputs))
    return dict(zip(("dead_filters", "dead_inputs"), shares, strict=True))


def risen(log: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the share of layers whose density was higher at the end than at the first look."""
    seen = [row["densities"] for row in log if "densities" in row]
    ups = [seen[-1][name] > seen[0][name] for name in seen[0]] if len(seen) > 1 else []
    return sum(ups) / len(ups) if ups else None
