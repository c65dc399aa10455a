"""Layer pruning by information: the blocks leave that say least about the network's answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pliant.edits import Remove
from pliant.families.prune.allocate import Goal
from pliant.families.prune.blocks import enough, increments, information, keep_blocks, units
from pliant.families.prune.judge import need_inputs
from pliant.families.prune.pruner import ChannelPruning, Ratio, Share
from pliant.families.prune.ranking import Scope
from pliant.math.information import Estimator
from pliant.registry import In, Paper, register
from pliant.run import Run
from pliant.surgery.remove import appended, prove_removed, without

PAPER = Paper(
    "On the Information of Feature Maps and Pruning of Deep Neural Networks",
    "M. Soltani, S. Wu, J. Ding, R. Ravier, V. Tarokh",
    "ICPR",
    2020,
    "https://ailb-web.ing.unimore.it/icpr/author/1262",
)


@register("mi_layers", paper=PAPER, saves="params macs bytes latency")
@dataclass(frozen=True)
class MILayers(ChannelPruning):
    """Removes whole blocks whose branches say least about what the network answers.

    What a block adds to its shortcut is averaged over positions and brought to a few principal
    components, as many for all blocks; so are the scores of the classes. How much the one says
    about the other is estimated as if both were normal (``gaussian``, from canonical
    correlations and a shrunk covariance), from distances to neighbours (``ksg``), by a linear
    probe for the predicted class (``probe``), or as their distance correlation (``dcor``). Blocks
    with an identity as shortcut may leave, dense ones, which append channels to what they read,
    with all that reads these channels, and layers that keep shapes where they lie in no block.
    Depth shrinks, other widths stay. Needs training inputs.

    *Departs from the paper*, of which only the aim is known here: the estimators, what they look
    at and the rounds are inferred. Dense layers of networks that concatenate what they were given
    as a list stay (torchvision's DenseNet). It does not stop by the error: ``ratio`` or the budget
    says how far it goes.

    *Shown* (tests, a DenseNet of two blocks of three layers): without a dense layer logits are
    those where nothing reads its channels, to 1e-5, and costs fall as counted by hand.

    *Measured* (bench ``prune-family``): with 42 % of its multiply-accumulates, trained for 2 epochs
    on 2,000 images, ResNet-20 was right on 46.2 % by ``mi_layers(samples=512)`` and on 68.8 % by
    ``magnitude`` (means of 3 seeds).

    *Not shown* (bench ``prune-items``, small networks, 2 seeds): after 5 epochs it leads blocks by
    lot (-6.8 ± 5 points).

    >>> MILayers(estimator="ksg").neighbours
    3
    """

    ratio: Ratio = 0.3  # share of the blocks that leaves, if there is no budget
    scope: Scope = field(default="global", init=False)
    least: Share = field(default=0.0, init=False)
    estimator: Estimator = "gaussian"  # how information is estimated
    # what counts: all that a block says, or what it says more than those before it in its stage
    score: Literal["absolute", "increment"] = "absolute"
    components: Annotated[int, In(1, 64)] = 16  # q, principal components at most
    neighbours: Annotated[int, In(1, 10)] = 3  # k, of "ksg"
    samples: Annotated[int, In(1)] = 2000  # n, training inputs to look at

    def refuse(self, run: Run) -> None:
        need_inputs(run, "mi_layers", "looks at activations of training inputs")

    def prepare(self, run: Run) -> None:
        found, channels = units(run, self.only, self.exclude), appended(run.model, run.example)
        counted = {axis: b for axis, b in run.limits().items() if axis != "latency"}
        enough(run, found, counted, channels)
        self.cut_if_due(run)

    def cut(self, run: Run, goal: Goal, *, last: bool = True) -> None:
        found = units(run, self.only, self.exclude, needed=not run.edits)
        if not found:
            return
        values = self.worth(run, found)
        ranked = [found[place] for place in sorted(range(len(found)), key=values.__getitem__)]
        channels = appended(run.model, run.example)
        leaving = ranked[: round(goal.ratio * len(found))]
        if goal.limits:
            leaving = enough(run, ranked, goal.limits, channels)
        if leaving:
            prove_removed(run.model, run.example, leaving)
            run.apply(*without(run.model, leaving, channels))
        if last and run.edits:
            run.recalibrate()
        keep_blocks(run, [edit for edit in found if edit not in leaving])

    def worth(self, run: Run, found: Sequence[Remove]) -> list[float]:
        """Return what each block says about the answers: those that say least leave first."""
        how = {"size": self.components, "neighbours": self.neighbours}
        inputs = run.inputs(self.samples)
        values = information(run.model, run.example, found, inputs, estimator=self.estimator, **how)
        run.note(information={e.layer: v for e, v in zip(found, values, strict=True)})
        return increments(values, found) if self.score == "increment" else values
