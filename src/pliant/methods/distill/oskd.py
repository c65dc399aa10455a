"""OSKD: samples of one class that look alike to the network teach one another while it trains.

The file is long because neighbours are found in four ways, each an option.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pliant.data import unpack
from pliant.errors import DataError, MethodError, ModelError
from pliant.math.divergence import divergences, mean_where, neighbour_means
from pliant.method import Method
from pliant.observe.aside import Tap
from pliant.observe.order import order
from pliant.observe.outputs import logits
from pliant.registry import In, Paper, register
from pliant.run import Run
from pliant.surgery.select import weighted

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

    >>> OSKD(neighbours=None).weight  # with all of a class it is a centre loss
    0.1
    """

    # lambda, of the soft targets beside the loss of the task
    weight: Annotated[float, In(0, MOST)] = 0.1
    # k, nearest samples of the class; None: all of them
    neighbours: Annotated[int, In(1)] | None = 5
    look_at: Literal["logits", "features"] = "logits"  # features: what the last layer reads
    nearest_by: Literal["distance", "cosine"] = "distance"  # cosine compares directions only
    weighted: bool = False  # the nearer of the neighbours count more
    memory: Annotated[int, In(0)] = 0  # samples of the epoch, beside the batch, to choose from
    # lambda_r, of a term that keeps the furthest of a class apart
    repel: Annotated[float, In(0, MOST)] = 0.0
    margin: Annotated[float, In(0)] = 1.0  # mean squared distance at which they are far enough
    measure: Literal["mse", "kl"] = "mse"  # distance to the target; "kl" is for logits
    temperature: Annotated[float, In(0, open="low")] = 4.0  # T, of "kl"
    warmup: Annotated[float, In(0, 1)] = 0.1  # share of the training before it begins
    # share of the training in which it then rises to its weight
    ramp: Annotated[float, In(0, 1)] = 0.2

    def prepare(self, run: Run) -> None:
        """Find the last layer, if what it reads is looked at."""
        if self.measure == "kl" and self.look_at == "features":
            raise MethodError(
                'oskd: measure="kl" compares probabilities of classes: it needs look_at="logits".'
            )
        run.state.update(samples=0, paired=0, seen=[])
        if self.look_at == "features":
            called = order(run.model, run.example, list(weighted(run.model))).called
            if not called:
                raise ModelError(
                    'oskd: look_at="features" needs a last convolution or Linear, but the model '
                    'calls none: use look_at="logits".'
                )
            run.hook(Tap(run.model.get_submodule(called[-1])))

    def loss(self, run: Run, loss: Tensor, output: Any, batch: Any) -> Tensor:
        """Add the mean distance to the means of the neighbours."""
        share = self._share(run)
        rows, labels = self._rows(run, output), unpack(batch)[1]
        if not _classes(rows, labels):
            raise DataError(
                "oskd compares samples of one class: it needs one class number per sample, and "
                f"rows (samples, numbers) to compare, not {tuple(rows.shape)}."
            )
        if not share or not (self.weight or self.repel):
            return loss
        seen, cosine = run.state["seen"], self.nearest_by == "cosine"
        others = (seen[0], seen[1]) if seen else None
        target, known = neighbour_means(
            rows, labels, self.neighbours, others=others, cosine=cosine, weighted=self.weighted
        )
        run.state["samples"] += len(known)
        run.state["paired"] += int(known.sum())
        loss = loss + share * self.weight * mean_where(self._gaps(rows, target), known)
        if self.repel and self.neighbours is not None:
            target, known = neighbour_means(
                rows, labels, self.neighbours, others=others, cosine=cosine, furthest=True
            )
            close = (self.margin - (rows - target).square().mean(1)).clamp_min(0)
            loss = loss + share * self.repel * mean_where(close, known)
        self._remember(run, rows.detach(), labels)
        return loss

    def after_epoch(self, run: Run) -> None:
        """Note how many samples had a neighbour, and warn where most had none."""
        samples, paired = run.state["samples"], run.state["paired"]
        run.state.update(samples=0, paired=0, seen=[])
        if not samples:
            return
        run.note(paired=paired / samples)
        if 2 * paired < samples:
            warnings.warn(
                f"oskd: only {paired} of {samples} samples had another one of their class in the "
                "batch: use larger batches, or draw them class by class.",
                stacklevel=2,
            )

    def _share(self, run: Run) -> float:
        """Return the share of the weight that holds now; all of it if the steps are not known."""
        past = run.step / run.steps - self.warmup if run.steps else 1.0
        if past < 0:
            return 0.0
        return min(1.0, past / self.ramp) if self.ramp else 1.0

    def _remember(self, run: Run, rows: Tensor, labels: Tensor) -> None:
        """Keep the last samples of the epoch, none of which comes again in it."""
        if self.memory:
            seen = run.state["seen"] or [rows[:0], labels[:0]]
            pairs = zip(seen, (rows, labels), strict=True)
            run.state["seen"] = [torch.cat([old, new])[-self.memory :] for old, new in pairs]

    def _rows(self, run: Run, output: Any) -> Tensor:
        if self.look_at == "logits":
            return logits(output)
        return F.normalize(run.aside.get(Tap).take().flatten(1), dim=1)

    def _gaps(self, rows: Tensor, target: Tensor) -> Tensor:
        if self.measure == "kl":
            return divergences(rows, target, self.temperature)
        return (rows - target).square().mean(1)


def _classes(rows: Tensor, labels: Any) -> bool:
    """Say whether there is one class number per row."""
    numbers = isinstance(labels, Tensor) and not labels.is_floating_point()
    return numbers and rows.dim() == 2 and labels.shape == rows.shape[:1]
