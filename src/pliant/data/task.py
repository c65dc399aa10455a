"""What a network is for: the loss that it trains with, and the metrics by which it is judged.

Ready tasks go by name, ``"segmentation"`` or, with options, ``"segmentation(void=255)"``; any
other is a loss and metrics of one's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pliant.cost import Example, counted
from pliant.data.measures import Metric
from pliant.data.sources import moved, unpack
from pliant.errors import DataError, MethodError, ModelError, PliantError
from pliant.observe.outputs import answers, logits

INSTEAD = "pass loss= and metrics=, or task='none' to compare with the dense network alone"


@dataclass(frozen=True)
class Task:
    """What a network is for.

    Args:
        name: of the task; "own" where the network returns its loss.
        loss: function of (output, batch), None where there is none; ready ones take
            ``reduction="none"`` too.
        metrics: by name; the first judges what was lost.
        options: of a ready task, as they were settled.
        scores: takes class scores, classes on the last axis, out of an output; None where answers
            are no classes.
        feeds: the network reads the labels too: by this name, or in the last place if it is "".
        names: of what it reads before, where labels go by name.
        trains: it gives a loss in training mode only.
    """

    name: str
    loss: Callable[..., Any] | None
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    scores: Callable[[Any], Tensor] | None = None
    feeds: str | None = None
    names: tuple[str, ...] = ()
    trains: bool = False

    def __str__(self) -> str:
        """Write the task as it can be named."""
        given = ", ".join(f"{k}={v!r}" for k, v in self.options.items() if v is not None)
        return f"{self.name}({given})" if given else self.name

    @property
    def main(self) -> str:
        """Name the metric that judges; "" without one."""
        return next(iter(self.metrics), "")

    @property
    def weighs(self) -> bool:
        """Whether there is a loss for every sample or label."""
        return self.feeds is None and "reduction" in parameters(self.loss)

    @property
    def judges(self) -> bool:
        """Whether its loss, and not only its outputs, tells what matters to the user."""
        return self.name in ("custom", "own") and self.loss is not None and not self.trains

    def inputs(self, batch: Any) -> Example:
        """Return what the network is called with for a batch."""
        inputs, labels = unpack(batch)
        if self.feeds is None or labels is None:
            return inputs
        if isinstance(batch, Mapping):
            return dict(batch)
        if not self.feeds:
            return (*inputs, labels)
        return {**dict(zip(self.names, inputs, strict=False)), self.feeds: labels}

    def total(self, output: Any, batch: Any, reduction: str = "mean") -> Tensor:
        """Return the loss of a batch, checked.

        Raises:
            DataError: the task has none.
            MethodError: the loss is no number that can be differentiated.
        """
        if self.loss is None:
            raise DataError(
                f"Task {self.name!r} has no loss to train with: name a task, pass loss=, or leave "
                "train out."
            )
        more = {"reduction": reduction} if reduction != "mean" else {}
        found = ask("loss", self.loss, output, batch, **more)
        if not isinstance(found, Tensor) or (reduction == "mean" and found.numel() != 1):
            what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise MethodError(
                f"A loss must give one number of (output, batch) as a tensor, but {what} came: "
                "take its mean."
            )
        return found if reduction != "mean" else found.reshape(())

    def summed(self, items: Sequence[Any], device: torch.device) -> Callable[[int, Any], Tensor]:
        """Return a function of a batch's number and its output: the loss summed over samples."""
        sizes = [counted(unpack(item)[0]) for item in items]

        def loss(number: int, output: Any) -> Tensor:
            return self.total(output, moved(items[number], device)) * sizes[number]

        return loss


def ask(name: str, function: Callable[..., Any], *args: Any, **more: Any) -> Any:
    """Call a loss or a metric of the user's.

    Raises:
        MethodError: it fails; the message says what it is called with.
    """
    try:
        return function(*args, **more)
    except PliantError:
        raise
    except Exception as error:  # it is the user's function, which may raise anything
        raise MethodError(
            f"{name!r} is called with the output and a whole batch, such as (inputs, labels), but "
            f"raises {type(error).__name__}: {error}; of a criterion of output and labels write "
            "lambda output, batch: criterion(output, batch[1])."
        ) from error


def main_output(output: Any) -> Tensor:
    """Take the tensor that labels are compared with out of what a model gives.

    Raises:
        ModelError: there is none, or there are several of which none is called logits or out.
    """
    named = output.get("out") if isinstance(output, Mapping) else None
    if isinstance(named, Tensor):
        return named  # torchvision's segmentation
    try:
        return logits(output)
    except ModelError:
        found = answers(output)
    if len(found) == 1:
        return found[0]
    raise ModelError(
        f"Labels are compared with one output, but the network gives {len(found)}: {INSTEAD}."
    )


def labels_of(batch: Any) -> Tensor:
    """Return the labels of a batch.

    Raises:
        DataError: there are none, or something else than a tensor.
    """
    labels = unpack(batch)[1]
    if labels is None:
        raise DataError(
            "Training and scoring need labels, but the batch has none: give (inputs, labels), "
            "call them labels in a mapping, or name task='own' if the network returns its loss."
        )
    if not isinstance(labels, Tensor):
        raise DataError(
            f"Labels of a ready task are a tensor, but a {type(labels).__name__} came: {INSTEAD}."
        )
    return labels.long() if is_whole(labels) and labels.dtype != torch.bool else labels


def batch_of(inputs: Example, labels: Any) -> Any:
    """Put a batch together again out of what `unpack` took apart."""
    return {**inputs, "labels": labels} if isinstance(inputs, Mapping) else (*inputs, labels)


def is_whole(labels: Tensor) -> bool:
    """Say whether labels are whole numbers of any type, or truth values."""
    return not labels.is_floating_point() and not labels.is_complex()


def squeezed(labels: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Give labels the shape of what they are compared with, if only axes of 1 differ."""
    mine, other = ([n for n in sizes[1:] if n != 1] for sizes in (labels.shape, shape))
    fits = labels.shape[:1] == shape[:1] and mine == other
    return labels.reshape(shape) if fits and labels.shape != shape else labels


def refuse(what: str, scores: Tensor, labels: Tensor) -> DataError:
    """Say that outputs and labels do not fit, and what to pass."""
    return DataError(
        f"{what}, but the network gives {tuple(scores.shape)} and the labels are "
        f"{labels.dtype} {tuple(labels.shape)}: name another task, or {INSTEAD}."
    )


def own_loss(output: Any, batch: Any = None) -> Tensor:
    """Take the loss out of what a network gives: a number, ``loss``, or a mapping of losses.

    Raises:
        ModelError: there is none.
    """
    named = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(output, Mapping) and output and all(map(_is_number, output.values())):
        return torch.stack([value.reshape(()) for value in output.values()]).sum()
    first = output[0] if isinstance(output, list | tuple) and output else None
    for found in (named, output, first):
        if isinstance(found, Tensor) and _is_number(found):
            return found
    raise ModelError(
        f"A network with its own loss must return it when it is called with its labels, as loss, "
        f"as a mapping of losses or first, but its {type(output).__name__} holds none: {INSTEAD}."
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() == 1 and value.is_floating_point()


def parameters(function: Any) -> Mapping[str, Any]:
    """Return what a function can be called with, by name; nothing if that cannot be told."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}
