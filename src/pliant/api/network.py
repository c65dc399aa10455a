"""The whole way from a network and data to a smaller network with a report, in one call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pliant.api.asked import place_of, written_alone
from pliant.api.job import Job, Methods
from pliant.budget import Budget
from pliant.compose import resolve
from pliant.cost import Example, as_example, bare
from pliant.data import Data, Train
from pliant.data.ready import Metrics, task_of
from pliant.data.task import Task
from pliant.drivers.devices import own_randomness
from pliant.drivers.loop import Watch
from pliant.latency import Where, as_target
from pliant.result import Result


def once(
    model: nn.Module,
    data: Any,
    method: Methods,
    budget: Budget | str | None = None,
    *,
    train: Train | None = None,
    target: Where | None = None,
    seed: int = 0,
    strict: bool = True,
    example: Example | Tensor = (),
    name: str = "",
    control: bool = False,
    folder: str | Path | None = None,
    resume: bool = False,
    watch: Watch | None = None,
    task: Task | str | None = None,
    loss: Callable[..., Any] | None = None,
    metrics: Metrics | None = None,
) -> Result:
    """Make a smaller network out of a network; the given one stays as it is.

    What can be refused is refused before any training. Accuracy is measured on the test split,
    or on validation where there is none. Random numbers of PyTorch are one stream for a whole
    process, so of calls in several threads one works and the others wait for it.

    Args:
        model: any network; a copy of it is compressed, on the device that `train` names.
        data: a `Data`, or what `Data.of` takes: inputs as a tensor or by name, a pair (inputs,
            labels), a list, a data set, a DataLoader, a generator; or None where the method needs
            none; then `example` is needed. Labels are needed for training only.
        method: a name, a spec such as ``"nrmf(alpha=0.01)"``, a `Method`, or several (a chain).
        budget: what the result may cost: a `Budget`, or text such as ``"params=0.3"``. One with
            nothing but a ``drop`` asks for the smallest network within it (see `smallest`, which
            compresses several times); a method that saves nothing is judged by it.
        train: how long to train with the method, and to fine-tune afterwards; None calibrates
            only: no labels, no training, seconds.
        target: where milliseconds are measured, such as ``"onnxruntime,threads=2"``, or a
            function that measures (see `Target.of`): for a budget with a latency, and the report.
        seed: of everything random; the caller's random state stays untouched.
        strict: raise where the budget is missed; otherwise the report says so. What was lost of
            the score is judged in `report.verdict`; more than the budget's ``drop`` (2 points
            where none is given) is warned of by an `AccuracyWarning`.
        example: inputs of one forward call, one tensor, (a, b) or by name; taken from the data
            if not given.
        name: what the report calls the model; its class if not given.
        control: also train a copy without the method for as many epochs, and report that as the
            network before: the honest reference of a network that comes untrained. With
            `train.distill` it is the teacher.
        folder: where checkpoints are kept while training; None keeps none.
        resume: go on from the checkpoints in `folder`; without, those of an earlier run there
            are removed.
        watch: called with a dict at every step (see `fit`) and at every change of phase.
        task: what the network is for: ``"classification"``, ``"binary"``, ``"multi-label"``,
            ``"regression"``, ``"segmentation"``, ``"next-token"``, ``"super-resolution"``,
            ``"own"`` (it returns its loss), ``"none"`` (labels count for nothing), with options
            such as ``"segmentation(void=255)"``, or a `Task`. Told from outputs and labels if
            None, and refused where that leaves a doubt.
        loss: in place of the task's: a function of (output, batch) to a number.
        metrics: by name, each (function of (output, batch), "higher" or "lower") or a `Metric`;
            the first one judges what was lost.

    Returns:
        The compressed network in eval mode on the model's device, its edits and the report.

    Raises:
        MethodError: the method, the task or an option is unknown.
        BudgetError: the budget is malformed, impossible, or (if strict) missed.
        DataError: data or example are empty, not finite, or do not fit the model.
        ModelError: the model fails in forward, has a weight that is not finite, or has nothing
            to compress.
        TrainingError: loss or weights stopped being finite.
    """
    asked = resolve(method), Budget.of(budget), train, seed
    place = Path(folder) if folder is not None else None
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        own_randomness(seed, place_of(model)),
        written_alone(place, resume=resume),
    ):
        read = Data.of(data, seed=seed).read_by(bare(model))
        job = Job(bare(model), read, *asked, as_example(example), resume)
        job.folder = place
        job.watch = watch or job.watch
        job.target = None if target is None else as_target(target)
        job.task = task_of(task, loss, metrics)
        return job.go(control=control, strict=strict, name=name or type(bare(model)).__name__)
