"""MINT: connections go between groups of filters that tell little about each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pliant.errors import DataError
from pliant.families.prune import sparse
from pliant.families.prune.columns import hold
from pliant.families.prune.dependence import LEAST
from pliant.families.prune.judge import need_inputs
from pliant.families.prune.pairs import MOST_GROUPS, blocks, chosen, divided, leaving, masks_of
from pliant.method import Method
from pliant.observe.watch import samples
from pliant.registry import In, Paper, register
from pliant.run import Run

PAPER = Paper(
    "MINT: Deep Network Compression via Mutual Information-based Neuron Trimming",
    "M. R. Ganesh, J. J. Corso, S. Yasaei Sekeh",
    "ICPR",
    2020,
    "https://arxiv.org/abs/2003.08472",
)


@register("mint", paper=PAPER, saves="bytes")
@dataclass(frozen=True)
class MINT(Method):
    """Zeroes the weights between groups of filters that depend little on each other, in one shot.

    How far a group of outputs of a layer depends on a group of its inputs, given all other inputs,
    is estimated on training samples by spanning trees. The blocks of weights that depend least
    become zero at once and stay so while training goes on: give a trained network. Channels that
    nothing reads any more leave in the end, and kernels are stored sparse. Blocks of zeros save
    bytes; the network is faster only by channels that have left, and decoding its kernels takes
    time. For a budget of bytes as few blocks go as it takes; else ``share`` is of the distinct
    values of dependence, and that of the weights is another: the history has it as ``zeros``.

    *Departs from the paper* and its code: activations of inputs are taken where a layer reads
    them, behind norm and rectifier, so shortcuts and flattening need no rules; parents and
    children are of the same samples, the neighbour whose value is exchanged is the one asked for,
    and edges of trees are those of the trees, where the released code mixes up rows; features are
    standardized; ``cap`` holds whatever the ties, of which blocks of small weights go first.

    *Not shown* (bench ``prune-items``, small networks, 2 seeds): at 15 % of the weights it leads
    blocks by lot (-23.6 ± 0.6 points); at 15 % of the weights it is no worse than blocks of small
    norms (-46 ± 7.6 points).

    >>> MINT(cap=0.9).groups
    8
    """

    share: Annotated[float, In(0, 1)] = 0.5  # delta, of the distinct values, without a budget
    cap: Annotated[float, In(0, 1, "high")] = 0.75  # share of the weights of a layer at most
    groups: Annotated[int, In(1, MOST_GROUPS)] = 8  # of the inputs and the outputs of each layer
    samples: Annotated[int, In(1)] = 250  # of each class, at most 2,400 in all
    repeats: Annotated[int, In(1, 10)] = 1  # estimates over which to average
    only: tuple[str, ...] = ()  # name patterns of the layers to consider
    exclude: tuple[str, ...] = ()  # name patterns of the layers to leave alone

    def refuse(self, run: Run) -> None:
        need_inputs(run, "mint", "looks at training inputs")

    def prepare(self, run: Run) -> None:
        assert run.data is not None
        layers = divided(run, self.groups, self.only, self.exclude)
        inputs = chosen(run.data, self.samples, run.seed)
        if (count := sum(map(samples, inputs))) < LEAST:
            raise DataError(
                f"mint estimates dependences from {LEAST} samples or more, not {count}: give more "
                "training samples, or raise samples."
            )
        found = blocks(run, layers, self.groups, inputs, self.repeats)
        masks = masks_of(run, layers, leaving(run, found, self.share, self.cap))
        run.state["masks"] = masks
        run.note(zeros=sparse.share_of_zeros(masks), blocks=len(found))
        hold(run.model, masks)

    def before_step(self, run: Run) -> None:
        hold(run.model, run.state["masks"], gradients=True)

    def after_step(self, run: Run) -> None:
        hold(run.model, run.state["masks"])  # momentum and decay move zeros too

    def finalize(self, run: Run) -> None:
        if not run.step:
            run.recalibrate()
        sparse.drop_unread(run, self.only, self.exclude)
        sparse.store(run, list(run.state["masks"]))
