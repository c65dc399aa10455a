"""Features of labelled samples at several layers, and classifiers that are compared on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from scipy.stats import binomtest
from torch import Tensor, nn

from pliant.cost import Example
from pliant.data import Data
from pliant.data.splits import Split
from pliant.errors import DataError, ModelError
from pliant.families.analyze.hulls import Hulls
from pliant.families.analyze.inputs import check_logits, labelled, logits
from pliant.observe.order import order
from pliant.observe.rows import Rows
from pliant.observe.watch import capture
from pliant.result import Curves
from pliant.surgery.select import weighted

BATCH = 128
SPREAD = 4  # layers where none are named
CHUNK = 512  # queries whose distances to all training samples are held at once
Pool = Literal["mean", "flat"]


@dataclass(frozen=True, eq=False)
class Features:
    """What layers read of labelled samples.

    Args:
        layers: by name, (samples, features).
        scores: of the network, (samples, classes).
        labels: (samples,).
    """

    layers: dict[str, Tensor]
    scores: Tensor
    labels: Tensor

    @property
    def right(self) -> Tensor:
        """Which samples the network labels rightly, (samples,)."""
        return self.scores.argmax(1) == self.labels

    def of(self, kept: Tensor) -> Features:
        """Return those of some samples."""
        rows = {name: matrix[kept] for name, matrix in self.layers.items()}
        return Features(rows, self.scores[kept], self.labels[kept])


def layers_of(model: nn.Module, example: Example, wanted: Sequence[str]) -> list[str]:
    """Return the layers whose inputs are looked at, in the order in which they are called.

    Args:
        model: any network that gives class scores.
        example: inputs of one forward call.
        wanted: names; if empty, up to four of all convolutions and linear layers, evenly spread:
            the last, and not the first, whose input is the sample itself.

    Raises:
        ModelError: a name is none, no convolution or linear layer is called, or the model fails.
    """
    with capture(model, (), lambda *_: None):
        check_logits(logits(model, example))
    known = dict(model.named_modules())
    missing = [name for name in wanted if name not in known]
    called = () if missing else order(model, example, list(weighted(model))).called
    if missing or not (wanted or called):
        what = f"{missing[0]!r} is none" if missing else "none is called"
        raise ModelError(
            f"Features are what layers of {type(model).__name__} read, but {what}: take names from "
            "named_modules()."
        )
    if wanted:
        return list(wanted)
    inner = called[1:] or called
    count = min(SPREAD, len(inner))
    return [inner[(place + 1) * len(inner) // count - 1] for place in range(count)]


def features(
    model: nn.Module,
    data: Data,
    split: Split,
    layers: Sequence[str],
    *,
    pool: Pool = "mean",
    most: int | None = None,
    seed: int = 0,
) -> Features:
    """Collect what layers read of a split, the same samples for all, in eval mode.

    Args:
        model: any network that gives class scores.
        data: with labels.
        split: of it; a loader is read in its own order, what has an index in a shuffled one.
        layers: names.
        pool: maps become their means over positions, or all their numbers.
        most: samples; None for all.
        seed: of the order.

    Raises:
        DataError: no classes come with the inputs, or one that the network does not know.
        ModelError: the network gives no logits, or a layer is not called or reads no tensor.
    """
    labels: list[Tensor] = []

    def inputs() -> Iterator[Example]:
        for example, classes in labelled(data, split, BATCH, seed=seed):
            labels.append(classes.cpu())
            yield example

    rows = Rows(model, [*layers, ""], side="input", form=pool).all(inputs(), most)
    scores, missing = rows.pop(""), [name for name in layers if name not in rows]
    if missing:
        raise ModelError(
            f"Features are what layers read, but {missing[0]} is not called: name another layer."
        )
    check_logits(scores)
    answers = torch.cat(labels)[: len(scores)]
    if int(answers.min()) < 0 or int(answers.max()) >= scores.shape[1]:
        raise DataError(
            f"Labels must be from 0 to {scores.shape[1] - 1}, the classes of the network, but "
            f"{int(answers.min())} to {int(answers.max())} came."
        )
    kept = {name: matrix[:most] for name, matrix in rows.items()}
    return Features(kept, scores[:most], answers[:most])


@dataclass(frozen=True, eq=False)
class Answers:
    """What classifiers say of the same samples in one space.

    Args:
        hull: class of the nearest hull, (samples,).
        centroid: class of the nearest mean.
        nearest: class of the nearest training sample.
        five: class of most of the five nearest, of the nearest of them where they are equal.
        several: which samples are inside of more than one hull.
    """

    hull: Tensor
    centroid: Tensor
    nearest: Tensor
    five: Tensor
    several: Tensor


def answers(
    hulls: Hulls, training: Tensor, labels: Tensor, queries: Tensor, scores: Tensor
) -> Answers:
    """Ask all classifiers about queries.

    Args:
        hulls: made of the training features.
        training: (samples, features).
        labels: of these.
        queries: (queries, features).
        scores: of the network for the queries, which decides inside of several hulls.
    """
    index, inside = hulls.predict(queries)
    known = scores[:, hulls.classes].double().masked_fill(~inside, -torch.inf)
    several = inside.sum(1) > 1
    index = torch.where(several, known.argmax(1), index)
    entered, asked = hulls.space.enter(training), hulls.space.enter(queries)
    centroid = torch.cdist(asked, hulls.means).argmin(1)
    near = torch.cat([_neighbours(entered, part) for part in asked.split(CHUNK)])
    votes = labels[near]
    return Answers(
        hulls.classes[index],
        hulls.classes[centroid],
        votes[:, 0],
        _most(votes),
        several,
    )


def _neighbours(training: Tensor, queries: Tensor) -> Tensor:
    count = min(5, len(training))
    return torch.cdist(queries, training).topk(count, dim=1, largest=False).indices


def _most(votes: Tensor) -> Tensor:
    """Return the most frequent label of each row; of several the one that comes first."""
    counts = (votes[:, :, None] == votes[:, None, :]).sum(2)
    return votes.gather(1, counts.argmax(1, keepdim=True))[:, 0]


def share(which: Tensor) -> float:
    """Return the share of what is true."""
    return float(which.double().mean())


def chance(one: Tensor, other: Tensor) -> float:
    """Return how likely one is right so much more often than the other by chance (McNemar).

    Exact and one-sided: of the samples on which they differ, each is right on half.

    Args:
        one: which samples it labels rightly.
        other: the same of the other.
    """
    gained, lost = int((one & ~other).sum()), int((other & ~one).sum())
    if not gained + lost:
        return 1.0
    return float(binomtest(gained, gained + lost, alternative="greater").pvalue)


def figure(rows: Sequence[Mapping[str, Any]], network: float) -> Curves:
    """Return what is to be drawn of the accuracies at every layer and of the network."""
    kinds = {"hull": "hulls", "centroid": "means", "nearest": "nearest sample"}
    lines = {
        name: [(float(at), row[kind]) for at, row in enumerate(rows, 1)]
        for kind, name in kinds.items()
    }
    lines["network"] = [(1.0, network), (float(len(rows)), network)]
    named = ", ".join(f"{at} {row['layer']}" for at, row in enumerate(rows, 1))
    caption = (
        f"Share of samples labelled rightly from what each layer reads ({named}). Where hulls are "
        "above the network, the layers behind have lost what the features still hold."
    )
    return Curves("Layers", caption, lines, "layer", "accuracy")
