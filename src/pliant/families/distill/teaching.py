"""A loss that is shared between the labels and a teacher."""

from __future__ import annotations

from typing import Annotated, Any

from torch import Tensor

from pliant.data import unpack
from pliant.errors import DataError
from pliant.math.divergence import divergence
from pliant.observe.aside import Teacher
from pliant.registry.options import In
from pliant.run import Run

Temperature = Annotated[float, In(0, open="low")]
FRACTIONS = (
    "{} compares probabilities of classes, but the answers of this task are no classes: leave it "
    "out of a regression."
)


def refuse_fractions(run: Run, name: str) -> None:
    """Refuse a task that is known not to have classes.

    Raises:
        DataError: it has none.
    """
    if run.task is not None and run.task.scores is None:
        raise DataError(FRACTIONS.format(name))


def taught(
    run: Run, loss: Tensor, output: Any, batch: Any, weight: float, temperature: float
) -> Tensor:
    """Mix the loss of the task with the divergence from the teacher of a run.

    Args:
        run: has a `Teacher` beside it.
        loss: of the task.
        output: of the network.
        batch: from which it came.
        weight: share of the teacher, in 0..1.
        temperature: T, by which scores are divided before they become probabilities.

    Raises:
        DataError: the labels are no classes.
    """
    inputs, labels = unpack(batch)
    if run.task is None and isinstance(labels, Tensor) and labels.is_floating_point():
        raise DataError(FRACTIONS.format(type(run.method).__name__))
    scores = run.class_scores(output)
    target = run.class_scores(run.aside.get(Teacher).answer(inputs, scores.device))
    return (1 - weight) * loss + weight * divergence(scores, target, temperature)
