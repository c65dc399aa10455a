"""OSKD: samples of one class that look alike to the network teach one another while it trains."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

from torch import Tensor

from pliant.data import unpack
from pliant.errors import MethodError
from pliant.families.distill import subclass
from pliant.math.divergence import mean_where, neighbour_means
from pliant.method import Method
from pliant.registry import In, Paper, register
from pliant.run import Run

MOST = 10.0  # of the weight: beyond it the classes collapse


@register(
    "oskd",
    paper=Paper(
        "Efficient Online Subclass Knowledge Distillation for Image Classification",
        "M. Tzelepi, N. Passalis, A. Tefas",
        "ICPR",
        2020,
        "https://doi.org/10.1016/j.eswa.2021.115132",  # its extended version
    ),
)
@dataclass(frozen=True)
class OSKD(Method):
    """Pulls every sample towards its nearest neighbours of the same class, while training.

    Nearest samples of one class are taken for members of a subclass that has no label. The mean
    of their outputs is a soft target beside the label: no teacher, no second network, no second
    stage, and nothing changes at inference. A batch should hold four samples of a class or more.

    *Departs from the paper*: the abstract names online subclass similarities as targets; that
    they are means of the k nearest, and all numbers, are our reading. Neighbours are those of
    the batch (of each process by itself), and with ``memory`` those that the present epoch has
    shown before, as the network saw them then. With ``repel`` the furthest of a class are pushed
    apart, so that a class does not only shrink.

    In the bench ``distill-family`` it led plain training by 0.1 +- 0.1 points, which is chance;
    with cosine, weights, memory and repelling it trailed itself without them by 0.1 +- 0.1.
    """

    # lambda, of the soft targets beside the loss of the task
    weight: Annotated[float, In(0, MOST)] = 0.1
    # k, nearest samples of the class; None: all of them
    neighbours: Annotated[int, In(1)] | None = 5
    look_at: subclass.Look = "logits"  # features: what the last layer reads
    nearest_by: Literal["distance", "cosine"] = "distance"  # cosine compares directions only
    weighted: bool = False  # the nearer of the neighbours count more
    memory: Annotated[int, In(0)] = 0  # samples of the epoch, beside the batch, to choose from
    # lambda_r, of a term that keeps the furthest of a class apart
    repel: Annotated[float, In(0, MOST)] = 0.0
    margin: Annotated[float, In(0)] = 1.0  # mean squared distance at which they are far enough
    measure: subclass.Measure = "mse"  # distance to the target; "kl" is for logits
    temperature: Annotated[float, In(0, open="low")] = 4.0  # T, of "kl"
    warmup: Annotated[float, In(0, 1)] = 0.1  # share of the training before it begins
    # share of the training in which it then rises to its weight
    ramp: Annotated[float, In(0, 1)] = 0.2

    def prepare(self, run: Run) -> None:
        if self.measure == "kl" and self.look_at == "features":
            raise MethodError(
                'oskd: measure="kl" compares probabilities of classes: it needs look_at="logits".'
            )
        subclass.begin(run, self.look_at)

    def loss(self, run: Run, loss: Tensor, output: Any, batch: Any) -> Tensor:
        """Add the mean distance to the means of the neighbours."""
        labels = unpack(batch)[1]
        rows = subclass.rows(run, output, labels, self.look_at)
        share = subclass.ramped(run, self.warmup, self.ramp)
        if not share or not (self.weight or self.repel):
            return loss
        others, cosine = tuple(run.state["seen"]) or None, self.nearest_by == "cosine"
        means = partial(
            neighbour_means, rows, labels, self.neighbours, others=others, cosine=cosine
        )
        target, known = means(weighted=self.weighted)
        subclass.count(run, known)
        gaps = subclass.gaps(rows, target, self.measure, self.temperature)
        loss = loss + share * self.weight * mean_where(gaps, known)
        if self.repel and self.neighbours is not None:
            target, known = means(furthest=True)
            close = (self.margin - (rows - target).square().mean(1)).clamp_min(0)
            loss = loss + share * self.repel * mean_where(close, known)
        subclass.remember(run, rows, labels, self.memory)
        return loss

    def after_epoch(self, run: Run) -> None:
        subclass.forget(run)
