"""What the layers of a network cost, as a function of how strong their channels are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pliant.cost import LayerCost
from pliant.edits.sides import CONVS, sides
from pliant.errors import MethodError
from pliant.run import Run
from pliant.surgery.graph import Group

Axis = Literal["macs", "params"]


@dataclass(frozen=True)
class Side:
    """The channels on one side of a layer.

    Args:
        units: for groups of channels that meet here, how many channels each of their units has.
        fixed: channels that belong to no unit, such as those of images or classes.
    """

    units: Mapping[str, float]
    fixed: float

    def count(self, alive: Mapping[str, Tensor]) -> float:
        """Return how many channels there are with the units that live."""
        return self.fixed + sum(n * float(alive[name].sum()) for name, n in self.units.items())

    def strength(self, gates: Mapping[str, Tensor]) -> Tensor:
        """Return the sum of the strengths of all channels of units."""
        parts = [n * gates[name].sum() for name, n in self.units.items()]
        return torch.stack(parts).sum() if parts else torch.zeros(())


@dataclass(frozen=True)
class Term:
    """One layer: its cost is the product of ``each``, its inputs and its outputs.

    Args:
        layer: its name.
        block: whose strength it shares.
        each: what one pair of an input and an output costs.
        inputs: of one output: of its group only, in a grouped convolution.
        outputs: of the layer.
    """

    layer: str
    block: str
    each: float
    inputs: Side
    outputs: Side


@dataclass
class Resource:
    """The cost of a network by its channels, and a surrogate that can be differentiated.

    Args:
        groups: of channels.
        terms: of all layers with weights.
        threshold: strength above which a unit lives.
        whole: the cost of every block with all units.
    """

    groups: Sequence[Group]
    terms: Sequence[Term]
    threshold: float
    whole: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        full = {group.name: torch.ones(len(group.units)) for group in self.groups}
        for term in self.terms:
            self.whole[term.block] = self.whole.get(term.block, 0.0) + _product(term, full)

    def cost(self, gates: Mapping[str, Tensor]) -> float:
        """Return the cost with the units that live."""
        alive = self._alive(gates)
        return sum(_product(term, alive) for term in self.terms)

    def surrogate(self, gates: Mapping[str, Tensor], strength: Callable[[str], float]) -> Tensor:
        """Return the sum over blocks of strength times surrogate cost over cost of the block.

        Of a layer it is ``each`` times (inputs that live) times (strengths of the outputs), plus
        the same with both sides exchanged: numbers of those that live are constants.

        Args:
            gates: the strength of every unit, by group.
            strength: lambda of a block by its name.
        """
        alive, total = self._alive(gates), torch.zeros(())
        for term in self.terms:
            weight = strength(term.block)
            if not weight:
                continue
            outs = term.inputs.count(alive) * term.outputs.strength(gates)
            ins = term.outputs.count(alive) * term.inputs.strength(gates)
            total = total + weight * term.each / self.whole[term.block] * (outs + ins)
        return total

    def remove(self) -> None:
        """Nothing is in the network."""

    def _alive(self, gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: gate.detach() > self.threshold for name, gate in gates.items()}


def _product(term: Term, alive: Mapping[str, Tensor]) -> float:
    return term.each * term.inputs.count(alive) * term.outputs.count(alive)


def terms(
    model: nn.Module,
    rows: Mapping[str, LayerCost],
    groups: Sequence[Group],
    by: Axis,
    block: Callable[[str, LayerCost], str],
) -> list[Term]:
    """Return a term for every convolution and linear layer that a network calls.

    Args:
        model: as it is.
        rows: what its layers cost.
        groups: of channels that may leave.
        by: multiply-accumulates, or numbers in kernels.
        block: names the block of a layer, from its name and cost.
    """
    found = []
    for name, row in rows.items():
        module: Any = model.get_submodule(name)
        known = sides(module)
        if not isinstance(module, (*CONVS, nn.Linear)) or not known or not row.calls:
            continue
        apart = int(getattr(module, "groups", 1))
        total = row.macs if by == "macs" else module.weight.numel()
        if "channels" in known:  # each output has one input of its own
            outs = _side(groups, (name, "channels"), known["channels"], 1)
            ins = Side({}, 1.0)
            each = total / known["channels"]
        else:
            outs = _side(groups, (name, "out"), known["out"], 1)
            ins = _side(groups, (name, "in"), known["in"], apart)
            each = total / (known["out"] * known["in"] / apart)
        found.append(Term(name, block(name, row), each, ins, outs))
    return found


def _side(groups: Sequence[Group], slot: tuple[str, str], size: int, apart: int) -> Side:
    units, taken = {}, 0
    for group in groups:
        if slot in group.slots:
            places = group.rows(slot)
            units[group.name] = places.shape[1] / apart
            taken += places.numel()
    return Side(units, (size - taken) / apart)


def strengths(model: nn.Module, groups: Sequence[Group]) -> dict[str, Tensor]:
    """Return how strong every unit is, with gradients: its largest scale in any batch norm.

    Of units that pass no batch norm it is the norm of a filter over the root of its size, the
    largest of all filters that make it.
    """
    return {group.name: _gate(model, group) for group in groups}


def _gate(model: nn.Module, group: Group) -> Tensor:
    found = []
    for slot in group.slots:
        module: Any = model.get_submodule(slot[0])
        if isinstance(module, _BatchNorm) and module.affine:
            found.append(module.weight.abs()[group.rows(slot).to(module.weight.device)])
    for slot in group.makers if not found else ():
        module = model.get_submodule(slot[0])
        kernel = module.weight.flatten(1)
        norms = kernel.norm(dim=1) / kernel.shape[1] ** 0.5
        found.append(norms[group.rows(slot).to(norms.device)])
    return torch.cat(found, 1).amax(1)


def scales(model: nn.Module, groups: Sequence[Group]) -> list[Tensor]:
    """Return the scales of batch norms that are strengths, which no decay shall pull."""
    layers = [model.get_submodule(slot[0]) for group in groups for slot in group.slots]
    norms = {id(m): m for m in layers if isinstance(m, _BatchNorm) and m.affine}
    return [norm.weight for norm in norms.values()]


def scores(model: nn.Module, groups: Sequence[Group]) -> dict[str, Tensor]:
    """Return how strong every unit is, in float64 without gradients."""
    found = strengths(model, groups)
    return {name: gate.detach().double().cpu() for name, gate in found.items()}


# ------------------------------------------------------------------ in a run


def check(blocks: Sequence[str], strengths: Sequence[float]) -> None:
    """Refuse blocks without a strength of their own.

    Raises:
        MethodError: there are more or fewer strengths, or one is below 0.
    """
    if len(blocks) != len(strengths) or min(strengths, default=0) < 0:
        raise MethodError(
            "kd_structure has one strength of 0 or more for each pattern in blocks, not "
            f"{strengths} for {blocks}."
        )


def movable(
    run: Run, groups: Sequence[Group], blocks: Sequence[str], strengths: Sequence[float]
) -> list[Group]:
    """Leave out groups of blocks that cost nothing, and say so of their layers.

    Args:
        run: about to start.
        groups: of channels.
        blocks: name patterns of layers.
        strengths: of each of them.

    Raises:
        MethodError: no group is left.
    """
    still = [pattern for pattern, strength in zip(blocks, strengths, strict=True) if not strength]
    chosen = []
    for group in groups:
        held = any(fnmatchcase(layer, p) for layer, _ in group.makers for p in still)
        for layer, side in group.slots if held else ():
            if side != "in":
                run.keep(layer, "its block has a strength of 0")
        if not held:
            chosen.append(group)
    if not chosen:
        raise MethodError("kd_structure: every block that could be narrower has a strength 0.")
    return chosen


def begin(
    run: Run, groups: Sequence[Group], by: Axis, patterns: Sequence[str], threshold: float
) -> None:
    """Put the cost of a run's network beside it, with a price that is not raised yet.

    Args:
        run: about to start.
        groups: of channels that may leave.
        by: what is priced.
        patterns: of names, each a block; all other layers of one resolution are one.
        threshold: see `Resource`.
    """

    def block(name: str, row: LayerCost) -> str:
        named = next((p for p in patterns if fnmatchcase(name, p)), None)
        return named if named is not None else "x".join(map(str, row.output[1:])) or "features"

    run.state["factor"] = 1.0
    found = terms(run.model, run.planner.rows(), groups, by, block)
    run.aside.put(Resource(groups, found, threshold))


def price(run: Run, blocks: Sequence[str], given: Sequence[float], strength: float) -> Tensor:
    """Return the price of all channels.

    Args:
        run: that began.
        blocks: names of some blocks.
        given: their strengths.
        strength: of all others.
    """
    costs, factor = run.aside.get(Resource), run.state["factor"]
    known = dict(zip(blocks, given, strict=True))
    gates = strengths(run.model, costs.groups)
    return costs.surrogate(gates, lambda block: factor * known.get(block, strength))


def raise_price(run: Run, by: Axis, growth: float) -> None:
    """Note what lives, and raise the price where that costs more than the budget."""
    costs = run.aside.get(Resource)
    now = costs.cost(strengths(run.model, costs.groups))
    bound = run.limits().get(by)
    run.note(alive=now / sum(costs.whole.values()), factor=run.state["factor"])
    if bound is not None and now > bound:
        run.state["factor"] *= growth


def dead(
    scores: Mapping[str, Tensor], floors: Mapping[str, int], threshold: float
) -> dict[str, list[int]]:
    """Return the weakest units of every group whose strength is not above a threshold.

    Args:
        scores: strength of every unit, by group.
        floors: units that stay at least.
        threshold: below or at which a unit is dead.
    """
    leaving = {}
    for name, score in scores.items():
        order = score.argsort(stable=True).tolist()[: len(score) - floors[name]]
        leaving[name] = [unit for unit in order if float(score[unit]) <= threshold]
    return leaving
