"""Nearest convex hull: where a network's features know more than the network says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pliant.data import Data, unpack
from pliant.errors import DataError, MethodError
from pliant.families.analyze.features import (
    Features,
    Pool,
    answers,
    chance,
    features,
    figure,
    layers_of,
    share,
)
from pliant.families.analyze.hulls import Normalize, Sampling, fit
from pliant.families.analyze.inputs import shown
from pliant.registry import Paper, register
from pliant.result import Finding

SIGNIFICANT = 0.05  # over all layers together


@register(
    "convex_hull_classifier",
    paper=Paper(
        "Nearest Neighbor Classification Based on Activation Space of Convolutional Neural Network",
        "X. Ju, S. Shao, H. Long, W. Wang",
        "ICPR",
        2020,
    ),
    verb="analyze",
)
@dataclass(frozen=True)
class ConvexHullClassifier:
    """Labels samples by the convex hulls of what layers read, and compares with the network.

    Every class is the convex hull of its training features at a layer, and a sample belongs to the
    nearest. Where hulls of an inner layer are right more often than the network itself, the layers
    from there on fit the training samples and not the others: the network is overfitted there.
    Samples inside of several hulls go to the one of these that the network prefers.

    The values are ``gain`` (accuracy of hulls minus that of the network, at the layer where it is
    greatest), ``network`` and ``trained`` (its accuracy on the samples looked at and on those the
    hulls are made of) and ``labels``, from the hulls of the last layer. Rows are the layers: the
    accuracies of hulls, of means (``centroid``) and of one and five neighbours, the ``gain``, how
    likely it is by chance (``p``, McNemar's exact test), and the share inside of ``several``
    hulls. Hulls are made of the training split; the test split is looked at, or validation.

    *Departs from the paper*, of which the abstract and a preprint by two of its authors
    (arXiv 1904.01399) could be read: the solver, the nearest-points sampling and the rule for
    several hulls complete it.

    >>> ConvexHullClassifier(rows=200).sampling
    'query-local'
    """

    layers: tuple[str, ...] = ()  # whose inputs are the features; four of them if none is named
    pool: Pool = "mean"  # of maps over their positions, or all their numbers
    sampling: Sampling = "query-local"  # which points of a class are used where there are more
    rows: int = 500  # m, most points of a class that a sample is held against
    normalize: Normalize = "none"  # features before hulls are made of them
    components: int | None = None  # principal ones to keep; 256 of more than 512 features if None
    correct_only: bool = False  # hulls of training samples that the network labels rightly
    samples: int = 5000  # most training samples
    queries: int = 1000  # most samples that are labelled

    def analyze(self, model: nn.Module, data: Data, generator: torch.Generator) -> Finding:
        """Make hulls of training features at every layer, and label the others by them."""
        self._check(data)
        split = shown(data)
        seed = int(torch.randint(2**31, (1,), generator=generator))
        example = unpack(next(iter(data.batches(split, 2))))[0]
        layers = layers_of(model, example, self.layers)
        trained = features(
            model, data, "train", layers, pool=self.pool, most=self.samples, seed=seed
        )
        asked = features(model, data, split, layers, pool=self.pool, most=self.queries, seed=seed)
        kept = self._kept(trained, asked)
        found = [self._row(name, trained.of(kept), asked, generator) for name in layers]
        return _finding([row for row, _ in found], found[-1][1], trained, asked)

    def _check(self, data: Data) -> None:
        counts = (self.rows, self.samples, self.queries, self.components)
        if any(count is not None and count < 1 for count in counts):
            raise MethodError(
                "convex_hull_classifier: rows, samples, queries and components must be 1 or more, "
                f"but {self.rows}, {self.samples}, {self.queries} and {self.components} came."
            )
        if not data.has("train") or not (data.has("test") or data.has("val")):
            raise DataError(
                "Hulls are made of a training split and asked about another, so both must be "
                "there: give a Data(train=..., test=...)."
            )

    def _kept(self, trained: Features, asked: Features) -> Tensor:
        """Return the training samples that hulls are made of, and check that all classes occur."""
        kept = trained.right if self.correct_only else torch.ones_like(trained.right)
        missing = set(asked.labels.tolist()) - set(trained.labels[kept].tolist())
        if missing:
            raise DataError(
                f"Every class that is looked at needs a training sample"
                f"{' labelled rightly' if self.correct_only else ''}, but class {min(missing)} has "
                "none: raise samples, or give more of them."
            )
        return kept

    def _row(
        self, name: str, trained: Features, asked: Features, generator: torch.Generator
    ) -> tuple[dict[str, Any], Tensor]:
        training, labels = trained.layers[name], trained.labels
        hulls = fit(
            training, labels, sampling=self.sampling, rows=self.rows, normalize=self.normalize,
            components=self.components, generator=generator,
        )  # fmt: skip
        said = answers(hulls, training, labels, asked.layers[name], asked.scores)
        row: dict[str, Any] = {"layer": name, "features": training.shape[1]}
        for kind in ("hull", "centroid", "nearest", "five"):
            row[kind] = share(getattr(said, kind) == asked.labels)
        row["gain"] = row["hull"] - share(asked.right)
        row["p"] = chance(said.hull == asked.labels, asked.right)
        return row | {"several": share(said.several)}, said.hull


def _finding(
    rows: list[dict[str, Any]], labels: Tensor, trained: Features, asked: Features
) -> Finding:
    network, own = share(asked.right), share(trained.right)
    best = max(rows, key=lambda row: row["gain"])
    sure = best["p"] * len(rows) <= SIGNIFICANT
    said = (
        f"so it is overfitted from {best['layer']} on"
        if sure and best["gain"] > 0
        else "so there is no sign of overfitting beyond chance"
    )
    text = (
        f"Of {len(asked.labels):,} samples the network labels {100 * network:.1f} % rightly, and "
        f"hulls of what {best['layer']} reads {100 * best['hull']:.1f} %, {said}; of "
        f"{len(trained.labels):,} training samples the network labels {100 * own:.1f} % rightly."
    )
    values = {"gain": best["gain"], "network": network, "trained": own, "labels": labels}
    return Finding(values, tuple(rows), text, figures=(figure(rows, network),))
