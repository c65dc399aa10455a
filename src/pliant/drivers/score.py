"""What an output is worth: the loss of its task, its metrics, its distance to a teacher."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from pliant.cost import Example, call, call_alike, counted, device_of, evaluating
from pliant.data import Data, unpack
from pliant.data.guess import guess, squashed
from pliant.data.measures import Metric
from pliant.data.ready import task_of
from pliant.data.sources import moved
from pliant.data.splits import Split
from pliant.data.task import Task, main_output
from pliant.errors import DataError, ModelError, PliantError, TrainingError, must_be
from pliant.math.alone import forked
from pliant.math.divergence import divergence
from pliant.observe.outputs import answers, wide_answers
from pliant.result import Fidelity
from pliant.run import Run

TINY = 1e-12


@dataclass(frozen=True)
class Score:
    """How good a network is on one split.

    Attributes:
        accuracy: share of right answers, in 0..1; nan where the task has none.
        loss: mean loss of the task; nan where it has none.
        hits: for every answer that was asked for whether it was right, in the order of the split;
            empty where the task has none.
        classes: how many answers there are to choose from; 0 where answers are no classes.
        values: of all metrics, by name; the first one judges.
        rows: of the metric that judges, as `Metric.rows` gives them.
        metric: that one, None where accuracy is all there is.
    """

    accuracy: float
    loss: float
    hits: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool), compare=False)
    classes: int = 0
    values: Mapping[str, float] = field(default_factory=dict)
    rows: Tensor = field(default_factory=lambda: torch.empty(0), compare=False)
    metric: Metric | None = field(default=None, compare=False)

    @property
    def main(self) -> str:
        """Name what judges."""
        return next(iter(self.values), "accuracy")

    @property
    def value(self) -> float:
        """The value of what judges."""
        return self.values.get(self.main, self.accuracy)

    def better(self, other: "Score") -> bool:
        """Say whether this is better than another score of the same task."""
        lower = self.metric is not None and self.metric.better == "lower"
        return self.value < other.value if lower else self.value > other.value


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: Any,
    split: Split = "val",
    *,
    batch: int = 256,
    device: torch.device | str | None = None,
    task: Task | str | None = None,
) -> Score:
    """Score a network on a split, in eval mode and without autocast.

    Flags are left as they were, as is the random state.

    Args:
        model: any network.
        data: a `Data`, or whatever `Data.of` reads; labels that are whole numbers are classes,
            others are targets of a regression.
        split: which part of the data.
        batch: samples per forward call; a loader has its own.
        device: where to compute, the model is moved there; where it is now if None.
        task: what is scored, such as ``"binary"``; guessed from the first batch where there is no
            doubt if None.

    Raises:
        DataError: the split is absent, empty or without labels, or the task is in doubt.
        ModelError: the model fails on a batch, or the device is none.
        MethodError: there is no such task.
    """
    device, task = _device(model, device), task_of(task)
    must_be(Integral, "batch", batch, DataError, "a whole number")
    if not isinstance(data, Data):
        data = Data.of(data).read_by(model)
    model.to(device)
    losses = count = 0.0
    rows: dict[str, list[Tensor]] = defaultdict(list)
    classes = 0
    with scoring(model, task):
        for sample in data.batches(split, batch):
            sample = moved(sample, device)
            task = task or guessed(model, sample)
            output = call(model, task.inputs(sample))
            size = counted(unpack(sample)[0])
            if task.loss is not None:
                losses += float(task.total(output, sample)) * size
            count += size
            for name, metric in task.metrics.items():
                rows[name].append(metric.rows(output, sample, size))
            classes = classes or _classes(task, output)
    if task is None or not count:
        raise DataError(f"The {split} split must hold samples, but it gave none; check the loader.")
    known = {name: torch.cat(parts) for name, parts in rows.items()}
    values = {name: task.metrics[name].value(found) for name, found in known.items()}
    hits = known.get("accuracy", torch.empty(0, dtype=torch.bool))
    return Score(
        accuracy=values.get("accuracy", math.nan),
        loss=losses / count if task.loss is not None else math.nan,
        hits=hits if hits.dtype == torch.bool else torch.empty(0, dtype=torch.bool),
        classes=classes,
        values=values,
        rows=known.get(task.main, torch.empty(0)),
        metric=task.metrics.get(task.main),
    )


def _device(model: nn.Module, asked: torch.device | str | None) -> torch.device:
    here = device_of(model)
    try:
        return here if asked is None else torch.device(asked)
    except (RuntimeError, TypeError) as error:
        words = str(error).splitlines()[0]
        raise ModelError(
            f'device must be a device of PyTorch, such as "cpu", not {asked!r}: {words}'
        ) from error


def guessed(model: nn.Module, batch: Any) -> Task:
    """Tell the task from a batch: see `pliant.data.guess.guess`."""
    inputs = unpack(batch)[0]
    return squashed(guess(call(model, inputs), batch, model), model, inputs)


@contextmanager
def scoring(model: nn.Module, task: Task | None) -> Iterator[None]:
    """Keep a model in eval mode; where it gives its loss in training only, all but what trains.

    Batch norms keep their statistics and dropout is off; what a loss draws is the same each time.
    """
    if task is None or not task.trains:
        with evaluating(model):
            yield
        return
    device = device_of(model)
    with evaluating(model), forked([device] if device.type == "cuda" else [], 0):
        for module in model.modules():
            module.training = not isinstance(module, _NormBase | _DropoutNd)
        yield


def scored(run: Run, data: Data, *, batch: int = 256) -> dict[str, float]:
    """Return what the history says of the validation split: loss and all metrics of the task."""
    score = evaluate(run.model, data, "val", batch=batch, task=run.task)
    values = {name: value for name, value in score.values.items() if name != "loss"}
    return {"val_loss": score.loss, "accuracy": score.accuracy, **values}


def _classes(task: Task, output: Any) -> int:
    return 0 if task.scores is None else task.scores(output).shape[-1]


def distillation(output: Any, teacher: Any, temperature: float, task: Task | None = None) -> Tensor:
    """Return how far an output is from a teacher's.

    Where answers are classes or yes and no it is the divergence of softened classes (Hinton et
    al. 2015), times T^2, a mean over rows of scores; elsewhere the squared error of all outputs in
    units of their variance.
    """
    if task is None:
        return divergence(main_output(output), main_output(teacher), temperature)
    if task.scores is not None:
        mine, other = (task.scores(each).flatten(0, -2) for each in (output, teacher))
        return divergence(mine, other, temperature)
    gaps = [
        (one - other).square().mean() / other.var(correction=0).clamp(min=TINY)
        for one, other in zip(wide_answers(output), wide_answers(teacher), strict=True)
    ]
    return torch.stack(gaps).sum()


# ---------------------------------------------------------------- beside the dense network


@torch.no_grad()
def fidelity(
    dense: nn.Module,
    small: nn.Module,
    inputs: Iterable[Example],
    where: str,
    task: Task | None = None,
) -> Fidelity | None:
    """Compare all outputs of a network with those of the dense one; None where they do not fit.

    Args:
        dense: the network before.
        small: the network after.
        inputs: of forward calls.
        where: which samples these are.
        task: says which outputs are classes; a row of scores for each sample is if None.

    Raises:
        TrainingError: it gives NaN or infinity where the dense one gives a number.
    """
    sums: list[Tensor] = []
    cosines: list[Tensor] = []
    same: list[Tensor] = []
    with evaluating(dense), evaluating(small):
        for given in inputs:
            wanted, found = call_alike(dense, given), call_alike(small, given)
            pairs = list(zip(answers(wanted), answers(found), strict=True))
            if any(one.shape != other.shape for one, other in pairs):
                return None  # as many answers as it likes, as detectors give them
            sums.append(torch.stack([_energies(one, other) for one, other in pairs]))
            cosines.append(_cosines(pairs))
            if (both := _answers(wanted, found, task)) is not None:
                same.append((both[0] == both[1]).flatten().cpu())
    if not cosines:
        return None
    total = torch.stack(sums).sum(0)
    ratios = total[:, 0] / total[:, 1].clamp(min=TINY)
    return Fidelity(
        error=float(ratios.mean().sqrt()),
        cosine=float(torch.cat(cosines).mean()),
        agreement=float(torch.cat(same).double().mean()) if same else None,
        samples=sum(map(len, cosines)),
        where=where,
    )


def _finite(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Two outputs in float64, 0 where the dense one holds a mask of minus infinity."""
    there = one.isfinite()
    if not bool(other.isfinite()[there].all()):
        raise TrainingError(
            "The smaller network gives NaN or infinity where the dense one gives numbers: it was "
            "trained too hard, or its weights are too large to compute with; lower the learning "
            "rate or the weight decay, or choose milder options."
        )
    return tuple(torch.where(there, each.double(), 0.0).cpu() for each in (one, other))  # type: ignore[return-value]


def _energies(wanted: Tensor, found: Tensor) -> Tensor:
    one, other = _finite(wanted, found)
    return torch.stack([(one - other).square().sum(), one.square().sum()])


def _cosines(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The cosine of each sample's outputs, a mean over outputs; one row where they have none."""
    rows = []
    count = len(pairs[0][0]) if pairs[0][0].dim() else 1
    for wanted, found in pairs:
        one, other = _finite(wanted, found)
        whole = one.dim() > 0 and len(one) == count
        one, other = (each.reshape(count if whole else 1, -1) for each in (one, other))
        rows.append(torch.cosine_similarity(one, other).expand(count))
    return torch.stack(rows).mean(0)


def _answers(wanted: Any, found: Any, task: Task | None) -> tuple[Tensor, Tensor] | None:
    """The classes that both networks answer, None where answers are none."""
    if task is not None and task.name not in ("none", "own", "custom"):
        if task.scores is None:
            return None
        return tuple(task.scores(each).argmax(-1) for each in (wanted, found))  # type: ignore[return-value]
    try:
        scores = main_output(wanted), main_output(found)
    except PliantError:
        return None
    named = getattr(wanted, "logits", None) is scores[0]
    if scores[0].dim() != 2 and not (named and scores[0].dim() == 3):
        return None
    return None if scores[0].shape[-1] < 2 else tuple(each.argmax(-1) for each in scores)  # type: ignore[return-value]
