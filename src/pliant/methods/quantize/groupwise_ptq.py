"""GWQ-2KD: one scale per group of channels, then distillation on a few unlabelled samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pliant.edits.quantize import LEAST, MOST
from pliant.errors import MethodError
from pliant.families.quantize.fit import Stages, fitted
from pliant.families.quantize.layers import Layers, packable
from pliant.families.quantize.levels import damages, gaps
from pliant.families.quantize.plan import Written
from pliant.families.quantize.samples import few, shown
from pliant.families.quantize.tuning import Goal, Outputs, Rates
from pliant.math.quantize import Grouping
from pliant.method import Method
from pliant.registry import In, Paper, register
from pliant.run import Run
from pliant.surgery.fold import foldable
from pliant.surgery.plain import plain

LONGEST = 100_000  # steps of one stage


@register(
    "groupwise_ptq",
    paper=Paper(
        "GWQ-2KD: Towards Low-Bit Quantization of Deep Neural Networks with Limited Data",
        "Y. Yuan, C. Chen, X. Hu, S. Peng",
        "ICPR",
        2020,
        "https://doi.org/10.1109/ICPR48806.2021.9412678",
    ),
    saves="bytes",
)
@dataclass(frozen=True)
class GroupwisePTQ(Method):
    """Rounds weights and activations to a few bits, with one scale per group of channels.

    Batch norms are folded. Then a few training inputs, without labels, show the ranges of
    activations, and the rounded network learns to say what the dense one says: every block on
    its own first, then all of them together. A quarter of these inputs is held out: each block,
    and then the whole, ends in the state that was best on them, which may be the one before any
    step. Where you gave a loss, or the network returns its own, that counts in the second stage in
    the place of answers, with the labels; blocks on their own only know what the dense one says.
    It happens after the training, if there is one. With a budget every layer gets 8, 4, 3
    or 2 bits, so that outputs of layers change least.

    Convolutions, transposed ones too, and linear layers are rounded with what they read; rows of
    embeddings, recurrent layers, attention and experts whose matrices lie in one parameter of
    three axes keep theirs in floating point. Weights that are tied stay tied.

    Files that are coded are smaller at the same error where levels are not few but coarse:
    ``bits=8`` with a ``step``, since few bits clip the largest weights. *Measured* (bench
    ``coding-vdsr``: VDSR on Set5): with ANS 17.8 times smaller than float32 at 0.10 dB lost, where
    nncodec reaches 12.5 times, and 12.1 at 0.01 dB, where it reaches 9.5.

    *Departs from the paper*: its abstract names groups and stages, and no formula; quantizers
    and losses are the usual ones of block reconstruction. Scales are trained by their logarithms,
    weights by steps in units of their levels, and all blocks of the first stage at the same time.
    Networks in 16 bits learn in 32.

    >>> GroupwisePTQ(bits=8, activations=8).groups
    4
    """

    # b_w, of a weight: 2 to 8; a budget chooses them by layer
    bits: Annotated[int, In(LEAST, MOST)] = 4
    # b_a, of what layers read: 2 to 8; 0 leaves it in floating point
    activations: Literal[0] | Annotated[int, In(LEAST, MOST)] = 4
    ends: Annotated[int, In(LEAST, MOST)] = 8  # bits of both in the first and the last layer
    # bits of the rows of embeddings: 2 to 8; 0 leaves them in floating point
    rows: Literal[0] | Annotated[int, In(LEAST, MOST)] = 8
    # G, scales of a layer: 1 is per layer; 0 is one for every channel
    groups: Annotated[int, In(0)] = 4
    grouping: Grouping = "range"  # which channels share one
    # distance of levels, the same in all layers, in units of the root mean square of all weights:
    # for 8 bits that are coded afterwards; 0 places levels for the least squared error
    step: Annotated[float, In(0, 8)] = 0.0
    samples: Annotated[int, In(1)] = 256  # N_cal, training inputs to look at
    # steps of stage 1, in which blocks learn by themselves
    independent: Annotated[int, In(0, LONGEST)] = 200
    joint: Annotated[int, In(0, LONGEST)] = 200  # steps of stage 2, in which they learn together
    batch: Annotated[int, In(1)] = 32  # samples of a step
    # of weights in stage 1, in units of the distance between two levels
    lr: Annotated[float, In(0, 1)] = 0.02
    # of the logarithms of scales in stage 1; less beyond 4 bits
    scale_lr: Annotated[float, In(0, 1)] = 3e-3
    # learning rates of stage 2, in units of those of stage 1
    slowdown: Annotated[float, In(0, 1)] = 0.3
    features: Annotated[float, In(0)] = 1.0  # mu, weight of each block's error in stage 2
    answers: Annotated[float, In(0)] = 1.0  # nu, weight of the divergence from the dense answer
    temperature: Annotated[float, In(0, open="low")] = 4.0  # T, softens answers
    outputs: Outputs = "classes"  # whether class scores are compared by KL or by squared error
    correct: bool = True  # shift biases by the mean error before the stages
    integer: bool = False  # round sums' inputs too, to 8 bits, for runtimes of integers
    only: tuple[str, ...] = ()  # name patterns of the layers to consider
    exclude: tuple[str, ...] = ()  # name patterns of the layers to leave alone

    def prepare(self, run: Run) -> None:
        """Refuse what cannot work; whether a budget can be met is tried on a copy."""
        if self.activations and not run.has_inputs:
            raise MethodError(
                "groupwise_ptq needs inputs to find the ranges of activations, but there are "
                "none: pass data, or round weights only with activations=0."
            )
        folded = run.rehearsal()
        _begin(folded)
        layers = self._layers(folded)
        ways = self._written.ways(folded, layers)
        self._written.plan(folded, layers, ways, {n: [0.0] * len(row) for n, row in ways.items()})

    def finalize(self, run: Run) -> None:
        """Fold, choose bits, calibrate, distil, and pack."""
        _begin(run)
        inputs = few(run, self.samples, self.batch) if run.has_inputs else None
        layers = self._layers(run)
        ways = self._written.ways(run, layers)
        scores = {}
        if run.limits():
            moved = {n: [gaps(run.model, e, self.grouping) for e in row] for n, row in ways.items()}
            scores = damages(run.model, moved, inputs.look[0] if inputs else None)
        plan = self._written.plan(run, layers, ways, scores)
        run.apply(*fitted(run, plan, self.grouping, inputs, self._stages))

    def _layers(self, run: Run) -> Layers:
        seen = shown(run, self.samples, self.batch)
        return packable(run.model, run.example, seen, only=self.only, exclude=self.exclude)

    @property
    def _written(self) -> Written:
        shared = self.groups, self.grouping, self.integer
        return Written(self.bits, self.activations, self.ends, self.rows, *shared)

    @property
    def _stages(self) -> Stages:
        rates = Rates(self.lr, self.scale_lr)
        goal = Goal(self.features, self.answers, self.temperature, self.outputs)
        steps = self.independent, self.joint
        return Stages(self.correct, *steps, rates, self.slowdown, goal, self.step)


def _begin(run: Run) -> None:
    """Keep the weights of layers that compute them at every call, and fold batch norms."""
    computing = [edit for edit in plain(run.model, run.example) if edit.values is not None]
    run.apply(*computing)
    run.apply(*foldable(run.model, run.example))
