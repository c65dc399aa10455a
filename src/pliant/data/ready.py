"""The tasks that are ready, by name."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn

from pliant.cost import mapped
from pliant.data import measures
from pliant.data.classes import (
    binary_counts,
    binary_hits,
    binary_loss,
    binary_scores,
    class_hits,
    class_loss,
    class_scores,
    maps_hits,
    maps_loss,
    maps_overlaps,
    share,
    token_hits,
    token_loss,
    token_sums,
)
from pliant.data.measures import Metric
from pliant.data.numbers import image_loss, image_psnr, image_ssim, number_loss, number_rows
from pliant.data.sources import LABELS
from pliant.data.task import Task, own_loss, parameters
from pliant.errors import MethodError, must_be

Metrics = Mapping[str, Any]
"""Names, each with a `Metric`, or with (function, "higher" or "lower")."""


def classification(*, axis: int | None = None, void: int | None = None) -> Task:
    """One class for every sample or position: cross-entropy, and the share of right answers.

    Args:
        axis: of the classes in the output; found by its shape if None.
        void: a label that is no class; -100 never is, nor are -1 and 255 as labels of positions.
    """
    options: dict[str, Any] = {"axis": axis, "void": void}
    return Task(
        "classification",
        partial(class_loss, **options),
        {"accuracy": Metric(partial(class_hits, **options), "higher", "share")},
        options,
        partial(class_scores, axis=axis),
    )


def segmentation(*, void: int | None = None, axis: int = 1) -> Task:
    """A class for every pixel: cross-entropy, and the mean intersection over union.

    Unions are summed over the whole split; the mean is over the classes that occur in labels or
    answers. Scores of a coarser map are interpolated to the labels' size.

    Args:
        void: a label that is no class; -100, -1 and 255 are none if it is not given.
        axis: of the classes in the output.
    """
    options: dict[str, Any] = {"axis": axis, "void": void}
    return Task(
        "segmentation",
        partial(maps_loss, **options),
        {
            "mIoU": Metric(partial(maps_overlaps, **options), "higher", "share", measures.mean_iou),
            "accuracy": Metric(partial(maps_hits, **options), "higher", "share", share),
        },
        {"void": void, "axis": None if axis == 1 else axis},
        partial(class_scores, axis=axis),
    )


def binary(*, probabilities: bool = False, void: int | None = None) -> Task:
    """Yes or no for every sample or position by one logit: binary cross-entropy, right answers.

    Args:
        probabilities: the network ends in a sigmoid.
        void: a value that is no label; NaN and -100 never are, nor are -1 and 255 in maps.
    """
    options: dict[str, Any] = {"probabilities": probabilities, "void": void}
    return Task(
        "binary",
        partial(binary_loss, **options),
        {"accuracy": Metric(partial(binary_hits, **options), "higher", "share")},
        {"probabilities": probabilities or None, "void": void},
        partial(binary_scores, probabilities=probabilities),
    )


def multi_label(*, probabilities: bool = False, void: int | None = None) -> Task:
    """Several yes or no for every sample: binary cross-entropy, F1 over all labels, right answers.

    Args:
        probabilities: the network ends in a sigmoid.
        void: as for `binary`.
    """
    own = partial(binary_counts, probabilities=probabilities, void=void)
    task = binary(probabilities=probabilities, void=void)
    metrics = {"F1": Metric(own, "higher", "share", measures.f1), **task.metrics}
    return replace(task, name="multi-label", metrics=metrics)


def regression() -> Task:
    """Numbers: squared error, the share of the targets' variance explained (R2), and the RMSE."""
    return Task(
        "regression",
        number_loss,
        {
            "R2": Metric(number_rows, "higher", "share", measures.explained),
            "RMSE": Metric(number_rows, "lower", "", measures.root_mean),
        },
    )


def super_resolution(
    *, peak: float = 1.0, border: int = 0, luma: bool = True, ssim: bool = True
) -> Task:
    """Images from images: absolute error, the mean PSNR of images, and their SSIM.

    Outputs are clamped to 0..peak before they are compared.

    Args:
        peak: largest value of a pixel.
        border: pixels at every edge that do not count, by custom as many as the scale.
        luma: compare the brightness Y (BT.601) of RGB images, as is custom.
        ssim: measure the structural similarity too; images need 11 x 11 pixels.
    """
    options: dict[str, Any] = {"peak": peak, "border": border, "luma": luma}
    metrics = {"PSNR": Metric(partial(image_psnr, **options), "higher", "dB")}
    if ssim:
        metrics["SSIM"] = Metric(partial(image_ssim, **options), "higher", "share")
    return Task("super-resolution", image_loss, metrics, {**options, "ssim": ssim})


def next_token(*, void: int | None = None) -> Task:
    """The next token: labels are the tokens read, shifted by one here; right answers, perplexity.

    Positions that the mapping's ``attention_mask`` leaves out do not count.

    Args:
        void: a label that does not count, besides -100, -1 and 255 where they are no tokens.
    """
    options: dict[str, Any] = {"void": void}
    return Task(
        "next-token",
        partial(token_loss, **options),
        {
            "accuracy": Metric(partial(token_hits, **options), "higher", "share"),
            "perplexity": Metric(partial(token_sums, **options), "lower", "", measures.perplexity),
        },
        options,
        partial(class_scores, axis=-1),
    )


def own() -> Task:
    """A network that gets its labels and returns its loss, which is also what judges it."""
    return Task("own", own_loss, {"loss": Metric(own_loss, "lower")}, feeds="")


def fed(task: Task, model: nn.Module) -> Task:
    """Say by which name a network reads its labels."""
    known = parameters(model.forward)
    name = next((name for name in LABELS if name in known), "")
    return replace(task, feeds=name, names=tuple(known))


def none() -> Task:
    """No labels count: the network is compared with the dense one alone."""
    return Task("none", None)


READY: Mapping[str, Callable[..., Task]] = {
    "classification": classification,
    "binary": binary,
    "multi-label": multi_label,
    "regression": regression,
    "segmentation": segmentation,
    "next-token": next_token,
    "super-resolution": super_resolution,
    "own": own,
    "none": none,
}


def task_of(
    task: Task | str | None = None,
    loss: Callable[..., Any] | None = None,
    metrics: Metrics | None = None,
) -> Task | None:
    """Make a task of what was asked for; None where nothing was.

    Args:
        task: a `Task`, or one of `READY` with options in brackets.
        loss: function of (output, batch) to a number; in place of the task's.
        metrics: by name, each a `Metric` or (function, "higher" or "lower"); before the task's.

    Raises:
        MethodError: there is no such task, or a metric does not say which way is better.
    """
    known = _named(task) if isinstance(task, str) else task
    if known is not None and not isinstance(known, Task):
        raise MethodError(f"A task must be one of {', '.join(READY)}, or a Task, not {task!r}.")
    if loss is not None and not callable(loss):
        raise MethodError(f"loss= must be a function of (output, batch), not {loss!r}.")
    must_be(Mapping | None, "metrics", metrics, MethodError, "a mapping of names to metrics")
    more = {name: _metric(name, given) for name, given in (metrics or {}).items()}
    loss = None if loss is None else _apart(loss)
    if known is None and loss is None and not more:
        return None
    if known is None:
        if not more and loss is not None:
            more = {"loss": Metric(loss, "lower")}
        return Task("custom", loss, more)
    changed = {"loss": loss} if loss is not None else {}
    return replace(known, metrics={**more, **known.metrics}, **changed)  # type: ignore[arg-type]


def _apart(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a function of one's own copies, so that what it writes into nobody else reads."""

    @wraps(function)
    def copied(output: Any, batch: Any, **more: Any) -> Any:
        mine = output if torch.is_grad_enabled() else mapped(Tensor.clone, output)
        return function(mine, mapped(Tensor.clone, batch), **more)

    return copied


def _metric(name: str, given: Any) -> Metric:
    if isinstance(given, list | tuple) and len(given) in (2, 3):
        given = Metric(*given)
    if isinstance(given, Metric):
        return replace(given, of=_apart(given.of))
    raise MethodError(
        f"The metric {name!r} must say which way is better: write metrics={{{name!r}: "
        '(function, "higher")}, or "lower", or a pliant.data.Metric.'
    )


def _named(spec: str) -> Task:
    """Read ``name`` or ``name(option=value)``."""
    name, _, rest = spec.strip().partition("(")
    name = name.strip().lower().replace("_", "-")
    if name not in READY:
        near = difflib.get_close_matches(name, READY, n=1)
        raise MethodError(
            f"There is no task {name!r}; "
            + (f"did you mean {near[0]!r}? " if near else "")
            + f"There are {', '.join(READY)}, or pass loss= and metrics=."
        )
    known = parameters(READY[name])
    try:
        node = ast.parse(f"f({rest.rstrip()}" if rest else "f()", mode="eval").body
        assert isinstance(node, ast.Call) and not node.args
        given = {str(word.arg): ast.literal_eval(word.value) for word in node.keywords}
    except (SyntaxError, ValueError, AssertionError) as error:
        raise MethodError(
            f"Cannot read the task {spec!r}: write a name, or a name with options such as "
            "'segmentation(void=255)'."
        ) from error
    unknown = next((option for option in given if option not in known), None)
    if unknown is not None:
        has = f"it has {', '.join(known)}" if known else "it has none"
        raise MethodError(f"The task {name!r} has no option {unknown!r}; {has}.")
    return READY[name](**given)
