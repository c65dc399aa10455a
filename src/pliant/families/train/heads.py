"""The head that gives the class scores, and the features that it reads."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pliant.cost import call
from pliant.errors import DataError, EditError, MethodError, ModelError
from pliant.nn.basis import check_basis
from pliant.observe.outputs import logits
from pliant.observe.watch import capture
from pliant.run import Run
from pliant.surgery.select import weighted


def head_of(run: Run) -> str:
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


def check_head(run: Run, basis: str) -> None:
    """Refuse a network without a linear head, or with too few features before it for a basis.

    Raises:
        ModelError: it is one.
    """
    name = head_of(run)
    head: Any = run.model.get_submodule(name)
    try:
        check_basis(head.in_features, head.out_features, basis)
    except EditError as error:
        raise ModelError(f"The head {name} {error}") from None


def basis_of(run: Run) -> nn.Module:
    """Return the fixed head that was put in.

    Raises:
        MethodError: none was, since there is no training.
    """
    if "head" not in run.state:
        raise MethodError(
            "orthogonal_loss puts a fixed head in when a training begins, but the run was "
            "started for no steps: call pliant.start(..., steps=...)."
        )
    return run.model.get_submodule(run.state["head"])


def classified(features: Tensor, labels: Any) -> tuple[Tensor, Tensor]:
    """Return the features (n, width) that have a class, in float32, and their classes (n,).

    Args:
        features: (..., width).
        labels: class numbers (...); below 0 for none.

    Raises:
        DataError: there is not one class number for every feature vector.
    """
    numbers = isinstance(labels, Tensor) and not labels.is_floating_point()
    if not numbers or labels.shape != features.shape[:-1]:
        raise DataError("orthogonal_loss needs one class number for every feature vector.")
    known = labels.flatten() >= 0
    return features.flatten(0, -2)[known].float(), labels.flatten()[known]
