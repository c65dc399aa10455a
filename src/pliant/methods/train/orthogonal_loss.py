"""Orthogonal loss: every class has a fixed direction, and features learn to lie along it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from pliant.cost import call
from pliant.data import unpack
from pliant.edits import Swap
from pliant.errors import DataError, EditError, MethodError, ModelError
from pliant.math.placement import norm_gap, placement
from pliant.method import Method
from pliant.nn.basis import check_basis
from pliant.observe.aside import Tap
from pliant.observe.outputs import logits
from pliant.observe.watch import capture
from pliant.registry import In, Paper, register
from pliant.run import Run
from pliant.surgery.select import weighted


@register(
    "orthogonal_loss",
    paper=Paper(
        "Can Data Placement Be Effective for Neural Networks Classification Tasks? "
        "Introducing the Orthogonal Loss",
        "B. Cancela, V. Bolón-Canedo, A. Alonso-Betanzos",
        "ICPR",
        2020,
        "https://doi.org/10.1109/ICPR48806.2021.9412704",
    ),
)
@dataclass(frozen=True)
class OrthogonalLoss(Method):
    """Fixes one direction for every class, and trains the features to lie along their own.

    The last Linear gives way to a basis that never learns and takes the place of the loss of the
    task: what remains to be learned are the features. The network goes on giving one score for
    each class, its projection. A basis of blocks or of single features has no numbers to store
    and none to multiply by.

    *Measured* (bench ``train-family``: a small CNN on 3,500 digits, five epochs, three seeds):
    93.8 ± 0.6 % beside 96.0 ± 0.2 % of plain training, and 96.4 beside 98.8 % of the training
    digits; the mean features of two classes have a cosine of 0.05 instead of 0.79.

    *Departs from the paper*: its abstract names predefined orthogonal directions and a set of
    losses; the four losses and the bases are our reading. Our default gives every class a block
    of features, since rectified features cannot reach random directions, which have signs.

    >>> OrthogonalLoss(kind="softmax", margin=0.2).basis
    'blocks'
    """

    kind: Literal["angle", "energy", "placement", "softmax"] = "angle"  # of the loss
    basis: Literal["blocks", "identity", "random", "hadamard"] = "blocks"  # Q, the directions
    gamma: Annotated[float, In(0, 10)] = 1.0  # of "energy": weight of the wrong side
    temperature: Annotated[float, In(0, 1000, open="low")] = 16.0  # t, of "softmax"
    margin: Annotated[float, In(0, 1)] = 0.0  # m, of "softmax"
    # s, norm of the features; None: the root of the number of classes for "placement", else 1
    radius: Annotated[float, In(0, 1000, open="low")] | None = None
    norm: Annotated[float, In(0, 10)] = 1e-3  # lambda_n, pulls the norm to the radius
    # share of the training in which the loss of the task is kept, on the projections
    warmup: Annotated[float, In(0, 1)] = 0.0

    def refuse(self, run: Run) -> None:
        """Refuse a network without a linear head, or with too few features before it."""
        name = _head(run)
        head: Any = run.model.get_submodule(name)
        try:
            check_basis(head.in_features, head.out_features, self.basis)
        except EditError as error:
            raise ModelError(f"The head {name} {error}") from None

    def prepare(self, run: Run) -> None:
        """Put the basis in the place of the head."""
        name = _head(run)
        if not run.steps:
            run.keep(name, "a fixed head needs features that are trained for it")
            return
        run.apply(Swap(name, "orthogonal_basis", {"basis": self.basis}, run.seed))
        run.hook(Tap(run.model.get_submodule(name)))
        run.state["head"] = name

    def loss(self, run: Run, loss: Tensor, output: Any, batch: Any) -> Tensor:
        """Return how far the features are from where their classes lie."""
        if "head" not in run.state:
            raise MethodError(
                "orthogonal_loss puts a fixed head in when a training begins, but the run was "
                "started for no steps: call pliant.start(..., steps=...)."
            )
        features, labels = run.aside.get(Tap).take(), unpack(batch)[1]
        if run.step < self.warmup * run.steps:
            return loss
        if not _classes(features, labels):
            raise DataError("orthogonal_loss needs one class number for every feature vector.")
        known = labels.flatten() >= 0
        rows, labels = features.flatten(0, -2)[known].float(), labels.flatten()[known]
        basis = run.model.get_submodule(run.state["head"])
        with torch.autocast(rows.device.type, enabled=False):
            each = self._losses(rows, basis(rows), labels)
        return each.sum() / max(1, len(each))

    def _losses(self, features: Tensor, projections: Tensor, labels: Tensor) -> Tensor:
        default = projections.shape[1] ** 0.5 if self.kind == "placement" else 1.0
        radius = default if self.radius is None else self.radius
        options = {"gamma": self.gamma, "temperature": self.temperature, "margin": self.margin}
        found = placement(self.kind, features, projections, labels, radius=radius, **options)
        return found + self.norm * norm_gap(features, radius)


def _head(run: Run) -> str:
    """Name the last Linear, whose outputs are the scores.

    Raises:
        ModelError: there is none, or its weight serves elsewhere too.
    """
    seen: dict[str, Tensor] = {}
    with capture(run.model, weighted(run.model), lambda name, x, y: seen.update({name: y})):
        scores = logits(call(run.model, run.example))
    name = next((n for n, y in reversed(seen.items()) if y is scores), "")
    if not name or type(run.model.get_submodule(name)) is not nn.Linear:
        raise ModelError(
            "orthogonal_loss puts fixed directions in the place of a last Linear whose outputs "
            f"are the class scores, but {type(run.model).__name__} ends in something else."
        )
    if name not in (readable := run.readable())[0]:
        raise ModelError(f"orthogonal_loss cannot replace {name}: {readable[1][name]}.")
    return name


def _classes(features: Tensor, labels: Any) -> bool:
    numbers = isinstance(labels, Tensor) and not labels.is_floating_point()
    return numbers and labels.shape == features.shape[:-1]
