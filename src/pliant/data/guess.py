"""Tells the task from what a network gives and what its labels are, where there is no doubt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pliant.cost import Example, call, evaluating
from pliant.data.classes import binary_loss, class_view
from pliant.data.ready import (
    binary,
    classification,
    multi_label,
    next_token,
    own,
    regression,
    segmentation,
)
from pliant.data.sources import IGNORED, is_text, unpack
from pliant.data.task import INSTEAD, Task, is_whole, labels_of, main_output
from pliant.errors import DataError, ModelError

LANGUAGE = ("ForCausalLM", "LMHeadModel", "DoubleHeadsModel")  # how Transformers calls them
SURE = 32  # labels that are all 0 or 1 before fractions count as yes and no


def task_loss(output: Any, labels: Any, reduction: str = "mean") -> Tensor:
    """Return the loss of the task that outputs and labels speak of.

    Args:
        output: of the network.
        labels: what it should have said.
        reduction: "mean" over all that has a label, or "none": a tensor of the labels' shape, 0
            where there is no label.

    Raises:
        DataError: there are no labels, or they leave a doubt about the task.
    """
    batch = (None, labels)
    return guess(output, batch).total(output, batch, reduction)


def guess(output: Any, batch: Any, model: nn.Module | None = None) -> Task:
    """Return the task that an output and its labels speak of.

    Args:
        output: of the network, for the inputs of the batch.
        batch: with labels.
        model: the network, if there is one to ask.

    Raises:
        DataError: there are no labels, they do not fit, or there is a doubt; it says what to pass.
    """
    if is_text(unpack(batch)[1]):
        raise DataError(
            "Labels must be numbers, but text came: number the classes, or name task='none' to "
            "compare with the dense network alone."
        )
    if model is not None and not isinstance(unpack(batch)[1], Tensor | None):
        return own()  # boxes and the like are for the network itself
    labels, scores = labels_of(batch), main_output(output)
    if not scores.dim() or not labels.dim() or len(scores) != len(labels):
        raise _doubt("There is one label or row of labels for every sample", scores, labels)
    if is_whole(labels):
        return _whole(scores, labels, output, batch, model)
    return _fractions(scores, labels)


def _whole(
    scores: Tensor, labels: Tensor, output: Any, batch: Any, model: nn.Module | None
) -> Task:
    """Whole numbers: classes, next tokens, or yes and no."""
    if _alike(scores, labels):
        return _same_shape(scores, labels)
    if scores.dim() < 2 or scores.shape[1:].numel() == 1:
        raise _doubt("One output answers one label for every sample", scores, labels)
    if scores.dim() == 3 and labels.shape == scores.shape[:2]:
        found = _tokens(scores, labels, output, batch, model)
        if found is not None:
            return found
    return _classes(scores, labels, output)


def _classes(scores: Tensor, labels: Tensor, output: Any) -> Task:
    """Classes of samples or positions."""
    axis = axis_of(scores, labels, output)
    class_view(scores, (None, labels), axis)  # refuses what is no class
    return segmentation() if scores.dim() > 3 and axis == 1 else classification(axis=axis)


def axis_of(scores: Tensor, labels: Tensor, output: Any) -> int:
    """Return the axis of classes: the one without which scores have the shape of labels.

    Raises:
        DataError: there is none, or it may be the second or the last.
    """
    if scores.dim() == 2 or labels.shape == scores.shape:
        return 1
    trimmed = labels
    if labels.dim() == scores.dim() and labels.shape[1] == 1:
        trimmed = labels[:, 0]
    shapes = {1: (scores.shape[0], *scores.shape[2:]), -1: tuple(scores.shape[:-1])}
    fits = [axis for axis, shape in shapes.items() if shape == tuple(trimmed.shape)]
    if len(fits) == 1:
        return fits[0]
    if fits and _is_named(output):
        return -1 if scores.dim() == 3 else 1  # as Transformers has them
    if fits:
        raise DataError(
            f"The network gives {tuple(scores.shape)} for labels {tuple(labels.shape)}, so "
            "classes may lie on axis 1 or on the last one: name it, "
            "task='classification(axis=1)' or task='classification(axis=-1)'."
        )
    if scores.dim() == labels.dim() + 1 and scores.dim() > 3:
        raise DataError(
            f"The network gives maps {tuple(scores.shape)} of another size than the labels "
            f"{tuple(labels.shape)}: name task='segmentation', which interpolates them, or "
            f"{INSTEAD}."
        )
    raise _doubt("Classes need a score for each, and one label", scores, labels)


def _tokens(
    scores: Tensor, labels: Tensor, output: Any, batch: Any, model: nn.Module | None
) -> Task | None:
    """A next token, if labels are what was read; None if they are not."""
    named = model is not None and type(model).__name__.endswith(LANGUAGE)
    read = _read(batch, labels)
    if read is None:
        if named:
            raise DataError(
                f"{type(model).__name__} foresees the next token, but the inputs that labels "
                "would be compared with are not found: name task='next-token', which shifts "
                "labels by one, or task='classification(axis=-1)', which does not."
            )
        return None
    counted = labels != IGNORED
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if isinstance(mask, Tensor) and mask.shape == labels.shape:
        counted = counted & (mask > 0)
    same = bool((labels == read)[counted].all()) and bool(counted.any())
    ahead = labels.shape[1] > 1 and bool((labels[:, :-1] == read[:, 1:]).all())
    if same and (named or _is_causal(model, batch, scores)):
        return next_token()
    if ahead and not same:
        return classification(axis=-1)  # shifted already
    if same or named:
        raise DataError(
            "Labels of positions may be the tokens themselves or the next ones: name "
            "task='next-token', which shifts labels by one, or "
            "task='classification(axis=-1)', which does not."
        )
    return None


def _read(batch: Any, labels: Tensor) -> Tensor | None:
    """Return the whole numbers of the labels' shape that the network read."""
    inputs = unpack(batch)[0]
    values = list(inputs.values() if isinstance(inputs, Mapping) else inputs)
    if isinstance(inputs, Mapping) and isinstance(inputs.get("input_ids"), Tensor):
        values = [inputs["input_ids"]]
    fits = [v for v in values if isinstance(v, Tensor) and v.shape == labels.shape and is_whole(v)]
    return fits[0].to(labels.device) if fits else None


@torch.no_grad()
def _is_causal(model: nn.Module | None, batch: Any, scores: Tensor) -> bool:
    """Say whether scores of earlier positions are free of the last token."""
    if model is None or scores.shape[1] < 2:
        return False
    inputs = unpack(batch)[0]

    def moved(value: Any) -> Any:
        whole = isinstance(value, Tensor) and is_whole(value) and value.dtype != torch.bool
        if not whole or value.shape != scores.shape[:2]:
            return value
        other = value.clone()
        other[:, -1] = torch.where(value[:, -1] == value.max(), value.min(), value.max())
        return other

    if isinstance(inputs, Mapping):
        key = "input_ids" if "input_ids" in inputs else next(iter(inputs))
        other: Example = {**inputs, key: moved(inputs[key])}
    else:
        other = (moved(inputs[0]), *inputs[1:])
    with evaluating(model):
        first, again = (main_output(call(model, each)) for each in (inputs, other))
    gap = (first[:, :-1] - again[:, :-1]).abs().max()
    return bool(gap <= 1e-4 * first.abs().max()) and not torch.equal(first[:, -1], again[:, -1])


def _same_shape(scores: Tensor, labels: Tensor) -> Task:
    """Whole numbers in the shape of the outputs."""
    values = labels[labels != IGNORED] if labels.dtype != torch.bool else labels
    if labels.dim() > 2 and labels.dtype != torch.bool:
        left = values[(values != 255) & (values != -1)]
        if left.numel() < values.numel() and not bool((left == 1).any()):
            raise DataError(
                "Labels are 0 and 255 or -1 without any 1, so these may mean yes or no label: give "
                "0 and 1, or pass loss= and metrics=."
            )
        values = left
    if not bool(((values == 0) | (values == 1)).all()):
        raise _doubt("Whole numbers other than 0 and 1 may be classes or amounts", scores, labels)
    return _yes_no(scores, labels)


def _yes_no(scores: Tensor, labels: Tensor) -> Task:
    """Labels 0 and 1, one for every output."""
    several = scores.dim() == 2 and scores.shape[1] > 1
    if several and bool((labels.reshape(scores.shape).sum(1) == 1).all()):
        raise DataError(
            "Every row of labels holds a single 1, so it may name one class or be one of several "
            "yes and no: name task='classification' or task='multi-label'."
        )
    return multi_label() if several else binary()


def _fractions(scores: Tensor, labels: Tensor) -> Task:
    """Floating point: numbers, or yes and no."""
    if not _alike(scores, labels):
        raise _doubt("Numbers are compared with outputs of their own shape", scores, labels)
    known = labels[~labels.isnan()]
    binary_only = bool(((known == 0) | (known == 1)).all())
    if binary_only and bool((known == 1).any() & (known == 0).any()):
        if known.numel() < SURE:
            raise DataError(
                f"All of {known.numel()} labels are 0 or 1, so they may be yes and no or amounts: "
                "name task='binary', 'multi-label' or 'regression'."
            )
        return _yes_no(scores, labels)
    if scores.dim() == 2 and scores.shape[1] > 1 and bool((known >= 0).all()):
        sums = labels.reshape(scores.shape).sum(1)
        if bool((sums - 1).abs().le(1e-4).all()):
            raise DataError(
                "Every row of labels sums to 1, so they may be probabilities of classes or "
                "amounts: name task='classification' or task='regression'."
            )
    return regression()


def _alike(scores: Tensor, labels: Tensor) -> bool:
    """Say whether shapes are the same but for axes of 1."""
    mine, other = ([n for n in t.shape[1:] if n != 1] for t in (scores, labels))
    return mine == other


def _is_named(output: Any) -> bool:
    """Say whether an output is one of Transformers', with logits."""
    held = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return isinstance(held, Tensor)


def _doubt(what: str, scores: Tensor, labels: Tensor) -> DataError:
    return DataError(
        f"{what}, but the network gives {tuple(scores.shape)} and the labels are {labels.dtype} "
        f"{tuple(labels.shape)}, so the task is in doubt: name it, task='classification', "
        f"'regression', 'binary', 'multi-label', 'segmentation' or another, 'own' if the network "
        f"returns its loss when it is called with labels, or {INSTEAD}."
    )


# ---------------------------------------------------------------- sigmoids


def squashed(task: Task, model: nn.Module, inputs: Example) -> Task:
    """Take account of a network that gives probabilities where the task reads logits."""
    if task.name not in ("binary", "multi-label") or not ends_in_sigmoid(model, inputs):
        return task
    make = multi_label if task.name == "multi-label" else binary
    made = make(probabilities=True, void=task.options.get("void"))
    metrics = {**task.metrics, **made.metrics}
    ready = getattr(task.loss, "func", None) is binary_loss
    return replace(made, metrics=metrics, loss=made.loss if ready else task.loss)


@torch.no_grad()
def ends_in_sigmoid(model: nn.Module, inputs: Example) -> bool:
    """Say whether a network's output is what a sigmoid gave."""
    with evaluating(model), _Sigmoids() as seen:
        output = call(model, inputs)
    try:
        place = main_output(output).untyped_storage().data_ptr()
    except ModelError:
        return False
    return any(one.untyped_storage().data_ptr() == place for one in seen.given)


class _Sigmoids(TorchFunctionMode):
    """Keeps what sigmoids give inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in ("sigmoid", "sigmoid_") and isinstance(found, Tensor):
            self.given.append(found)
        return found
