"""Settles what is trained and scored, and refuses what cannot be, before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pliant.cost import call, call_alike, counted, device_of, evaluating, twin
from pliant.data import Data, unpack
from pliant.data.classes import binary_loss, binary_view, class_loss, class_view
from pliant.data.guess import axis_of, guess, squashed
from pliant.data.ready import classification, fed, own
from pliant.data.sources import Tensors, moved
from pliant.data.splits import Split
from pliant.data.task import INSTEAD, Task, ask, labels_of, main_output, own_loss
from pliant.drivers.score import scoring
from pliant.errors import DataError, MethodError, ModelError, PliantError
from pliant.run import Run

LOOKED = 64  # samples that tell the task, where not all labels are in memory
TRIED = 8  # samples on which losses and metrics are tried


def settle(
    task: Task | None, model: nn.Module, data: Data, splits: Sequence[Split], *, trains: bool
) -> Task | None:
    """Settle the task of labels that will be used; None where none are.

    Args:
        task: what was asked for, None to tell it from outputs and labels.
        model: the network, on the device where it works.
        data: with the splits.
        splits: whose labels are used.
        trains: the loss of the training split is to be differentiated.

    Raises:
        DataError: labels are missing or do not fit, or the task is in doubt.
        ModelError: the network fails, or does not return a loss as it should.
        MethodError: a loss or a metric does not give what it must.
    """
    if task is not None and task.name == "none":
        return task if not trains else _refused(task)
    telling: list[Split] = ["train"] if data.has("train") else []  # the most labels there are
    found = {split: _first(model, data, split) for split in dict.fromkeys((*telling, *splits))}
    labelled = {s: b for s, b in found.items() if unpack(b)[1] is not None or _judges(task)}
    if task is None and trains and "train" not in labelled and _returns_loss(model, found["train"]):
        task, labelled = own(), found  # its labels have names of their own
    if trains and "train" not in labelled:
        labels_of(found["train"])  # says what is missing
    if not labelled.keys() & set(splits):
        return task
    for split, batch in labelled.items():
        with evaluating(model), torch.no_grad():
            task = _of(task, model, data, split, batch, trains=trains)
        if split in splits:
            _try(task, model, batch, split, trains=trains and split == "train")
    return task


def _refused(task: Task) -> Task:
    task.total(None, None)  # says what to do
    return task


def settle_run(run: Run) -> bool:
    """Settle the task of a run that was started with one; say whether there is a split to score.

    Raises:
        DataError: as for `settle`.
        ModelError: as for `settle`.
        MethodError: as for `settle`.
    """
    if run.task is None or run.data is None or not run.data.has("val"):
        return False
    run.task = settle(run.task, run.model, run.data, ["val"], trains=False)
    return run.task is not None


def _judges(task: Task | None) -> bool:
    """Whether a task may do without labels: a loss and metrics of one's own know best."""
    return task is not None and task.name in ("custom", "own")


def _returns_loss(model: nn.Module, batch: Any) -> bool:
    """Whether a network calls a loss so for what it was given."""
    with evaluating(model), torch.no_grad():
        output = call(model, unpack(batch)[0])
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return isinstance(found, Tensor) and found.numel() == 1


def _first(model: nn.Module, data: Data, split: Split) -> Any:
    batch = next(iter(data.batches(split, LOOKED)), None)
    if batch is None:
        raise DataError(f"The {split} split must hold samples, but it gave none; check the loader.")
    return moved(batch, device_of(model))


def _of(
    task: Task | None, model: nn.Module, data: Data, split: Split, batch: Any, *, trains: bool
) -> Task:
    """Tell or complete a task from all labels that are in memory, or from a batch."""
    if task is not None and task.feeds is not None:
        return _own(task, model, batch)
    if task is not None and task.name == "custom":
        return _completed(task, model, data, split, batch, trains=trains)
    inputs, labels = unpack(batch)
    if task is None and labels is not None and not isinstance(labels, Tensor):
        return _own(guess(None, batch, model), model, batch, asked=False)
    output = call(model, inputs)
    scores, whole = _every(data, split, main_output(output), batch)
    shown = scores if isinstance(output, Tensor) else {"logits": scores}
    task = guess(shown, whole, model) if task is None else _on_axis(task, scores, whole, output)
    task = squashed(task, model, inputs)
    view = getattr(task.loss, "func", None)
    if view is class_loss:
        class_view(shown, whole, **{k: task.options.get(k) for k in ("axis", "void")})
    elif view is binary_loss:
        binary_view(shown, whole, void=task.options.get("void"))
    return task


def _every(data: Data, split: Split, scores: Tensor, batch: Any) -> tuple[Tensor, Any]:
    """Put all labels that are in memory in the place of a batch's, and scores for each."""
    source = data.source(split)
    known = isinstance(source, Tensors) and source.labels is not None and scores.dim()
    if not known or not isinstance(source, Tensors) or len(source) <= len(scores):
        return scores, batch
    wide = scores[:1].expand(len(source), *scores.shape[1:])
    return wide, moved((source.inputs, source.labels), scores.device)


def _completed(
    task: Task, model: nn.Module, data: Data, split: Split, batch: Any, *, trains: bool
) -> Task:
    """Give metrics of one's own that came without a loss the loss of the task, if that is clear."""
    if task.loss is not None:
        return task
    try:
        known = _of(None, model, data, split, batch, trains=trains)
    except PliantError:
        if trains:
            raise
        return task
    return replace(known, metrics={**task.metrics, **known.metrics})


def _on_axis(task: Task, scores: Tensor, batch: Any, output: Any) -> Task:
    """Settle the axis of classes, if it is named by nobody."""
    open_ = task.name == "classification" and task.options.get("axis") is None
    if not open_ or scores.dim() < 3:
        return task
    axis = axis_of(scores, labels_of(batch), output)
    made = classification(axis=axis, void=task.options.get("void"))
    ready = getattr(task.loss, "func", None) is class_loss
    return replace(
        made, metrics={**task.metrics, **made.metrics}, loss=made.loss if ready else task.loss
    )


def _own(task: Task, model: nn.Module, batch: Any, *, asked: bool = True) -> Task:
    """Find out how a network with its own loss reads its labels, and in which mode it gives it."""
    task = fed(task, model)
    for trains in (False, True):
        tried = replace(task, trains=trains)
        try:
            with scoring(model, tried):
                own_loss(call(model, tried.inputs(batch)))
        except PliantError as error:
            said = error
        else:
            return tried
    raise ModelError(
        f"Labels of this kind ({type(unpack(batch)[1]).__name__}) are for a network that returns "
        f"its own loss when it is called with them, but {type(model).__name__} does not: "
        f"{said if asked else INSTEAD + '.'}"
    ) from said


def _try(task: Task, model: nn.Module, batch: Any, split: Split, *, trains: bool) -> None:
    """Compute loss and metrics of a few samples once.

    Raises:
        MethodError: a loss or metric of one's own fails, or the loss cannot be differentiated.
    """
    few = _cut(batch)
    with scoring(model, task), torch.set_grad_enabled(trains):
        output = call(model, task.inputs(few))
        if trains or task.loss is not None:
            loss = task.total(output, few)
            learns = any(p.requires_grad for p in model.parameters())
            if trains and learns and not loss.requires_grad:
                raise MethodError(
                    "The loss must be computed from the network's output by PyTorch, so that it "
                    "can be differentiated, but it has no gradient: detach nothing."
                )
        for name, metric in task.metrics.items():
            ask(name, metric.rows, output, few, counted(unpack(few)[0]))
    if trains and not task.trains:  # some give more while they train
        copy = twin(model)  # what it draws or counts meanwhile is forgotten
        with scoring(copy, replace(task, trains=True)), torch.no_grad():
            task.total(call_alike(copy, task.inputs(few)), few)


def _cut(batch: Any) -> Any:
    """Keep the first samples of a batch of tensors that are cut alike."""
    if not isinstance(batch, Mapping | list | tuple):
        return batch
    size = counted(unpack(batch)[0])
    values = list(batch.values()) if isinstance(batch, Mapping) else batch
    if size <= TRIED:
        return batch
    alike = all(isinstance(v, Tensor) and v.dim() and len(v) == size for v in values)
    if not alike:
        return batch
    if isinstance(batch, Mapping):
        return {name: value[:TRIED] for name, value in batch.items()}
    return type(batch)(value[:TRIED] for value in values) if type(batch) in (list, tuple) else batch
