"""Samples of one class as targets for one another: what is compared, what is remembered."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pliant.errors import DataError, ModelError
from pliant.math.divergence import divergences
from pliant.observe.aside import Tap
from pliant.observe.order import order
from pliant.observe.outputs import logits
from pliant.run import Run
from pliant.surgery.select import weighted

Look = Literal["logits", "features"]
Measure = Literal["mse", "kl"]


def begin(run: Run, look_at: Look) -> None:
    """Lay out what is counted and remembered, and hook the last layer if what it reads is compared.

    Raises:
        ModelError: the network calls no layer with weights.
    """
    run.state.update(samples=0, paired=0, seen=[])
    if look_at == "logits":
        return
    called = order(run.model, run.example, list(weighted(run.model))).called
    if not called:
        raise ModelError(
            'oskd: look_at="features" needs a last convolution or Linear, but the model '
            'calls none: use look_at="logits".'
        )
    run.hook(Tap(run.model.get_submodule(called[-1])))


def rows(run: Run, output: Any, labels: Any, look_at: Look) -> Tensor:
    """Return what is compared of a batch, (samples, numbers): logits, or features of length 1.

    Raises:
        DataError: there is not one class number for each row.
    """
    if look_at == "logits":
        found = logits(output)
    else:
        found = F.normalize(run.aside.get(Tap).take().flatten(1), dim=1)
    numbers = isinstance(labels, Tensor) and not labels.is_floating_point()
    if not numbers or found.dim() != 2 or labels.shape != found.shape[:1]:
        raise DataError(
            "oskd compares samples of one class: it needs one class number per sample, and "
            f"rows (samples, numbers) to compare, not {tuple(found.shape)}."
        )
    return found


def gaps(found: Tensor, target: Tensor, measure: Measure, temperature: float) -> Tensor:
    """Return how far each row is from its target, (samples,)."""
    if measure == "kl":
        return divergences(found, target, temperature)
    return (found - target).square().mean(1)


def ramped(run: Run, warmup: float, ramp: float) -> float:
    """Return the share of a weight that holds now; all of it if the steps are not known.

    Args:
        run: whose step it is.
        warmup: share of the training before which the weight is 0.
        ramp: share of the training in which it then rises.
    """
    past = run.step / run.steps - warmup if run.steps else 1.0
    if past < 0:
        return 0.0
    return min(1.0, past / ramp) if ramp else 1.0


def remember(run: Run, found: Tensor, labels: Tensor, most: int) -> None:
    """Keep the last samples of the epoch, none of which comes again in it."""
    if most:
        seen = run.state["seen"] or [found[:0], labels[:0]]
        pairs = zip(seen, (found.detach(), labels), strict=True)
        run.state["seen"] = [torch.cat([old, new])[-most:] for old, new in pairs]


def count(run: Run, known: Tensor) -> None:
    """Count the samples of a batch, and those of them that have a neighbour."""
    run.state["samples"] += len(known)
    run.state["paired"] += int(known.sum())


def forget(run: Run) -> None:
    """Note how many samples of the epoch had a neighbour, warn where most had none, begin anew."""
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
