"""SSAL: heads within the network learn groups of classes that it confuses, and leave at the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from torch import Tensor

from pliant.data import unpack
from pliant.families.distill import branches
from pliant.families.distill.grouping import Kind
from pliant.method import Method
from pliant.observe.heads import Reading
from pliant.registry import In, Paper, register
from pliant.run import Run


@register(
    "ssal",
    paper=Paper(
        "Contextual Classification Using Self-Supervised Auxiliary Models for Deep Neural Networks",
        "S. Palacio, P. Engler, J. Hees, A. Dengel",
        "ICPR",
        2020,
        "https://github.com/Engler93/Self-Supervised-Autogenous-Learning",
    ),
)
@dataclass(frozen=True)
class SSAL(Method):
    """Trains heads at several depths on groups of classes that the network takes for one another.

    Classes are grouped by the mistakes of the network, few large groups for the first head and
    more small ones for the last, so labels of groups come from those that there are. Heads shape
    the features they read while the network trains, and leave with the end of the training:
    nothing changes at inference. The network should come trained; if it does not, let it train
    for a share of the training before its mistakes are counted (``start``). The history says how
    well the network alone did on validation data, and how well together with its heads.

    *Departs from the paper*: a head is one convolution, a normalization over all its channels (so
    that batches of one work), a mean over places and a linear layer; those of the paper are
    deeper. Heads have an optimizer of their own, SGD with the learning rate and momentum of the
    run's first group. They are not kept for joint prediction.

    In the bench ``distill-family`` the network alone did not gain: 0.3 +- 0.2 points behind plain
    training, in twice the time, and random groups were as good as those by mistakes. Together with
    its heads it trailed as well (``layers-items``, digits, five seeds): 92.2 ± 1.1 % beside
    93.7 ± 1.1 % of plain training, and 92.5 ± 0.7 % alone.

    >>> SSAL(groups=(2, 3, 5)).weights
    (0.8, 0.9, 1.0)
    """

    weights: tuple[float, ...] = (0.8, 0.9, 1.0)  # alpha, of the loss of each head; says how many
    # G, groups of each head; a fifth, a third and a half of the classes if none
    groups: tuple[int, ...] = ()
    kind: Kind = "similar"  # classes of a group are confused, or are not; random for comparison
    margin: Annotated[float, In(1, 2)] = 1.1  # by which a group may exceed its share of classes
    start: Annotated[float, In(0, 1, "high")] = 0.0  # share of the training before they are counted
    at: tuple[str, ...] = ()  # names of the layers that heads read; spread evenly if none
    width: Annotated[int, In(1, 4096)] = 128  # of the hidden layer of a head
    decay: Annotated[float, In(0, 1)] = 3e-4  # weight decay of heads
    power: Annotated[float, In(0, 1)] = 0.4  # beta, of heads in the joint prediction
    samples: Annotated[int, In(1)] = 5000  # validation samples on which mistakes are counted

    def refuse(self, run: Run) -> None:
        branches.refuse(run, self.weights, self.groups, self.at)

    def prepare(self, run: Run) -> None:
        names = list(self.at) or branches.places(run, len(self.weights))
        run.hook(Reading(run.model, names))
        run.state.update(names=names, groups=[], heads={}, momentum={})
        if not self.start:
            self._group(run)

    def loss(self, run: Run, loss: Tensor, output: Any, batch: Any) -> Tensor:
        """Add the weighted losses of the heads."""
        reading = run.aside.get(Reading)
        features = reading.take()
        reading.follow(run.model)
        if not run.state["groups"]:
            return loss
        labels = branches.classes(run.class_scores(output), unpack(batch)[1])
        return loss + branches.losses(run, features, labels, self.weights, self.width)

    def after_step(self, run: Run) -> None:
        if not run.state["groups"] and run.steps and run.step >= self.start * run.steps:
            self._group(run)
        branches.step(run, self.decay)

    def finalize(self, run: Run) -> None:
        if run.state["heads"]:
            run.note(**branches.read(run, self.power, self.samples))

    def _group(self, run: Run) -> None:
        branches.regroup(
            run, self.groups, self.kind, heads=len(self.weights), margin=self.margin,
            samples=self.samples,
        )  # fmt: skip
