"""HFP: filters leave that the outputs learn least from, until the network is fast enough."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from pliant.errors import DataError
from pliant.families.prune.allocate import counted_limits, savings
from pliant.families.prune.gain import Form, gains
from pliant.families.prune.pruner import ChannelPruning, Rounds
from pliant.families.prune.ranking import Scope
from pliant.families.prune.scores import Groups, Scores
from pliant.families.prune.times import saved_ms
from pliant.registry import In, Paper, register
from pliant.run import Run

BATCH = 64  # samples whose activations are held at once
PAPER = Paper(
    "HFP: Hardware-Aware Filter Pruning for Deep Convolutional Neural Networks Acceleration",
    "F. Yu, C. Han, P. Wang, R. Huang, X. Huang, L. Cui",
    "ICPR",
    2020,
    "https://ailb-web.ing.unimore.it/icpr/author/469",
)


@register("hfp", paper=PAPER, saves="params macs bytes latency")
@dataclass(frozen=True)
class HFP(ChannelPruning):
    """Removes the filters of the least information gain, in rounds, until a budget is met.

    The gain is what the predicted classes lose without a filter: half the Fisher information of a
    gate on it (``gain="fisher"``), the divergence itself (``"exact"``, a forward pass for every
    filter), or the certainty (``"entropy"``). All filters are compared. With ``per_cost`` the gain
    is divided by what leaves with a filter: milliseconds by layer, measured on the target, where
    the budget is of these, else what the budget counts. A latency is met by measuring the whole
    network. Needs unlabelled training inputs.

    *Departs from the paper*, of which only the abstract was to be had: gates are where layers read
    a filter, so filters that meet in a sum count and leave together; rounds are equal parts of the
    way (Opti-Cut), scores are taken anew in each, and none is undone; the table of milliseconds
    serves the ranking, while the budget is met by measuring networks and not by adding up layers.

    *Measured* (bench ``prune-family``): with 50 % of its multiply-accumulates, trained for 2 epochs
    on 2,000 images, ResNet-20 was right on 67.2 % by ``hfp(samples=256, rounds=2)`` and on 68.8 %
    by ``magnitude`` (means of 3 seeds).

    *Not shown* (bench ``prune-items``, small networks, 2 seeds): at equal latency it is no worse
    than filters of small norm (-4.4 ± 2.2 points); at equal latency it is no worse than channels by
    lot (-3.35 ± 3.6 points); five rounds are no worse than one (-6 ± 2.7 points); sum over layers
    against the measured network, the worst of 20 widths, torch (10.614 %); sum over layers against
    the measured network, the worst of 20 widths, onnxruntime (18.897 %).

    >>> HFP(gain="exact").rounds
    5
    """

    scope: Scope = field(default="global", init=False)
    rounds: Rounds = 5  # S_r, cuts, each after scoring anew
    gain: Form = "fisher"  # how information gain is measured
    samples: Annotated[int, In(1)] = 1024  # S, training inputs of one scoring
    per_cost: bool = False  # divide the gain by what leaves with the filter

    def refuse(self, run: Run) -> None:
        if not run.has_inputs:
            raise DataError(
                "hfp looks at training inputs, but there are none: give data, or take magnitude, "
                "which looks at weights alone."
            )

    def scores(self, run: Run, groups: Groups) -> Scores:
        inputs = run.inputs(self.samples, batch=BATCH)
        found = gains(run.model, groups, inputs, self.gain, run.generator)
        if not self.per_cost:
            return found
        timed = run.clock is not None and "latency" in run.limits()
        saved = (
            saved_ms(run, groups) if timed else savings(run, groups, [], tuple(counted_limits(run)))
        )
        return {name: gain / saved[name] for name, gain in found.items()}
