"""How good a network is on labelled samples, while a method decides how far to go."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pliant.cost import Example, call, evaluating
from pliant.data import IGNORED, unpack
from pliant.data.criterion import classes_second
from pliant.data.sources import moved
from pliant.errors import DataError
from pliant.families.prune.gates import Gates, effects
from pliant.families.prune.scores import Groups
from pliant.math.divergence import divergence
from pliant.observe.aside import Teacher
from pliant.observe.outputs import logits
from pliant.observe.watch import samples
from pliant.run import Run

BATCH = 256  # samples of one forward pass
HELD = 64  # samples whose activations are held at once


def labelled(run: Run, count: int) -> list[tuple[Example, Any]]:
    """Draw training samples with labels, without augmentation: inputs of a call, and labels.

    Args:
        run: the seed is its own, so they are the same every time.
        count: how many at least; none come without training data.
    """
    found, seen = list[tuple[Example, Any]](), 0
    if run.data is None or not run.has_inputs:
        return found
    for batch in run.data.batches("train", HELD, seed=run.seed, shuffle=True):
        found.append(unpack(batch))
        seen += samples(found[-1][0])
        if seen >= count:
            break
    return found


def need_inputs(run: Run, method: str, does: str) -> None:
    """Refuse a run without training inputs.

    Args:
        run: of the method.
        method: its name.
        does: what it would do with them, such as "looks at training inputs".

    Raises:
        DataError: there are none.
    """
    if not run.has_inputs:
        raise DataError(
            f"{method} {does}, but there are none: give data, or take magnitude, which looks at "
            "weights alone."
        )


def need_labels(run: Run, method: str, does: str) -> None:
    """Refuse a run without labelled training samples; the arguments are those of `need_inputs`.

    Raises:
        DataError: there are none.
    """
    first = next(iter(labelled(run, 1)), None)
    if first is None or first[1] is None:
        raise DataError(
            f"{method} {does} on labelled training samples, but there are none: give data with "
            "labels, or take group_fisher, which needs inputs alone."
        )


@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterable[Any]) -> float | None:
    """Return the share of right answers, in 0..1; None where labels are not classes."""
    rights = count = 0
    with evaluating(model):
        for batch in batches:
            inputs, labels = unpack(batch)
            if not isinstance(labels, Tensor) or labels.is_floating_point():
                return None
            scores = logits(call(model, inputs))
            labels = labels.to(scores.device)
            known = labels != IGNORED
            rights += int((classes_second(scores, labels).argmax(1) == labels)[known].sum())
            count += int(known.sum())
    return rights / count if count else None


def validation(run: Run, model: nn.Module) -> float | None:
    """Return the accuracy of a network on the run's validation data; None if there are none."""
    if run.data is None or not run.data.has("val"):
        return None
    return accuracy(model, run.data.batches("val", BATCH))


def slopes(
    run: Run,
    groups: Groups,
    batches: Iterable[tuple[Example, Any]],
    behind: Mapping[str, str] | None = None,
) -> dict[str, Tensor]:
    """Return what the loss would be without each unit, to first order: (units,) by group.

    The gradients of gates of one, summed over all samples, by their magnitude.

    Args:
        run: with the network and its loss.
        groups: of channels.
        batches: inputs of forward calls, and labels.
        behind: see `Gates`.
    """
    gates, total = Gates(run.model, groups, behind), torch.zeros(())

    def loss(batch: tuple[Example, Any]) -> Tensor:
        inputs, labels = batch
        device = next((p.device for p in run.model.parameters()), torch.device("cpu"))
        return run.criterion(call(run.model, inputs), moved(labels, device)) * samples(inputs)

    for seen in effects(run.model, gates, batches, loss):
        total = total + sum((effect.double().sum(0) for effect in seen), torch.zeros(()))
    return gates.split(total.abs())


def towards_teacher(
    run: Run, loss: Tensor, output: Any, batch: Any, labels: float, temperature: float
) -> Tensor:
    """Return a loss that learns the classes of a teacher beside the run, if there is one.

    Args:
        run: with the teacher.
        loss: of the task.
        output: of the network.
        batch: from which it came.
        labels: share of the task's loss.
        temperature: by which scores are divided before they become probabilities.
    """
    inputs, targets = unpack(batch)
    teachers = run.aside.all(Teacher)
    if not teachers or (isinstance(targets, Tensor) and targets.is_floating_point()):
        return loss
    scores = logits(output)
    gap = divergence(scores, teachers[0].scores(inputs, scores.device), temperature)
    return labels * loss + (1 - labels) * gap
