"""KD structure: layers narrow themselves under a price for what they cost, taught by the whole."""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Annotated, Any

from torch import Tensor

from pliant.cost import LayerCost
from pliant.errors import MethodError
from pliant.families.distill import resource
from pliant.families.distill.resource import Resource
from pliant.families.distill.teaching import refuse_fractions, taught
from pliant.families.prune.allocate import Goal
from pliant.families.prune.pruner import ChannelPruning, Ratio, Rounds, Share
from pliant.families.prune.ranking import Scope
from pliant.families.prune.scores import Groups, Scores
from pliant.observe.aside import Teacher
from pliant.registry import In, Paper, register
from pliant.run import Run
from pliant.surgery.prove import Leaving


@register(
    "kd_structure",
    paper=Paper(
        "Compact CNN Structure Learning by Knowledge Distillation",
        "W. Ahmed, A. Zunino, P. Morerio, V. Murino",
        "ICPR",
        2020,
        "https://arxiv.org/abs/2104.09191",
    ),
    saves="params macs bytes latency",
)
@dataclass(frozen=True)
class KDStructure(ChannelPruning):
    """Pulls scales of channels to zero by what they cost, then removes those that died.

    A channel's price is what it costs in the layers that make and read it, as many as live there,
    over the cost of its block: layers of one resolution, or those of a name pattern in
    ``blocks``, each with a strength of its own in ``strengths``, of which 0 keeps the block as
    wide as it is. The network as it came teaches it, before the channels leave and after. With a
    budget the weakest leave until it is met, and as long as it is not, the price rises with every
    epoch; without one, those whose scale is below ``threshold``.

    *Departs from the paper*, of which only the abstract is at hand: the price is that of MorphNet
    (Gordon et al., 2018). What a channel that leaves still gave on average goes into the biases of
    the layers that read it. Layers without batch norm are pulled by the norms of their filters.

    >>> KDStructure().start
    0.3
    """

    ratio: Ratio = field(default=0.0, init=False)
    scope: Scope = field(default="global", init=False)
    rounds: Rounds = field(default=1, init=False)
    end: Share = field(default=1.0, init=False)
    start: Share = 0.3  # share of the training in which the structure is learned
    strength: Annotated[float, In(0, 100)] = 0.1  # lambda, of blocks that blocks does not name
    blocks: tuple[str, ...] = ()  # name patterns of layers, each a block of its own
    strengths: tuple[float, ...] = ()  # lambda of each of these
    by: resource.Axis = "macs"  # what is priced
    threshold: Annotated[float, In(0, 1)] = 1e-3  # tau, scale above which a channel lives
    growth: Annotated[float, In(1, 10)] = 1.5  # of the price, with each epoch over the budget
    weight: Annotated[float, In(0, 1)] = 0.7  # a, share of the loss that is the teacher's
    # T, by which scores are divided before they become probabilities
    temperature: Annotated[float, In(0, open="low")] = 4.0

    def refuse(self, run: Run) -> None:
        refuse_fractions(run, "kd_structure")
        if len(self.blocks) != len(self.strengths) or min(self.strengths, default=0) < 0:
            raise MethodError(
                "kd_structure has one strength of 0 or more for each pattern in blocks, not "
                f"{self.strengths} for {self.blocks}."
            )

    def prepare(self, run: Run) -> None:
        run.hook(Teacher(run.model))
        run.state["factor"] = 1.0
        groups = self.groups(run)
        rows = run.planner.rows()
        found = resource.terms(run.model, rows, groups, self.by, self._block)
        run.aside.put(Resource(groups, found, self.threshold))
        super().prepare(run)

    def groups(self, run: Run) -> Groups:
        found = super().groups(run)
        still = [p for p, strength in zip(self.blocks, self.strengths, strict=True) if not strength]
        chosen = []
        for group in found:
            held = any(fnmatchcase(layer, p) for layer, _ in group.makers for p in still)
            for layer, side in group.slots if held else ():
                if side != "in":
                    run.keep(layer, "its block has a strength of 0")
            if not held:
                chosen.append(group)
        if not chosen:
            raise MethodError("kd_structure: every block that could be narrower has a strength 0.")
        return chosen

    def scores(self, run: Run, groups: Groups) -> Scores:
        found = resource.strengths(run.model, groups)
        return {name: gate.detach().double().cpu() for name, gate in found.items()}

    def allocation(self, run: Run, groups: Groups, goal: Goal) -> Leaving:
        if goal.limits:
            return super().allocation(run, groups, goal)
        leaving = {}
        for name, score in self.scores(run, groups).items():
            most = len(score) - run.state["floors"][name]
            order = score.argsort(stable=True).tolist()[:most]
            leaving[name] = [unit for unit in order if float(score[unit]) <= self.threshold]
        return leaving

    def loss(self, run: Run, loss: Tensor, output: Any, batch: Any) -> Tensor:
        return taught(run, loss, output, batch, self.weight, self.temperature)

    def penalty(self, run: Run) -> Tensor | None:
        """Return the price of all channels, until they have left."""
        if not self.pending(run):
            return None
        costs, factor = run.aside.get(Resource), run.state["factor"]
        known = dict(zip(self.blocks, self.strengths, strict=True))
        gates = resource.strengths(run.model, costs.groups)
        return costs.surrogate(gates, lambda block: factor * known.get(block, self.strength))

    def before_step(self, run: Run) -> None:
        if self.pending(run):
            run.spare(resource.scales(run.model, run.aside.get(Resource).groups))

    def after_epoch(self, run: Run) -> None:
        if not self.pending(run):
            return
        costs = run.aside.get(Resource)
        now = costs.cost(resource.strengths(run.model, costs.groups))
        bound = run.limits().get(self.by)
        run.note(alive=now / sum(costs.whole.values()), factor=run.state["factor"])
        if bound is not None and now > bound:
            run.state["factor"] *= self.growth

    def _block(self, name: str, row: LayerCost) -> str:
        named = next((p for p in self.blocks if fnmatchcase(name, p)), None)
        return named if named is not None else "x".join(map(str, row.output[1:])) or "features"
