"""How good a network is on labelled samples, while a method decides how far to go."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pliant.cost import Example, call, evaluating
from pliant.data import IGNORED, unpack
from pliant.data.criterion import classes_second
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
