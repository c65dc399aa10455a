"""How far apart activations hold the classes, and what each channel adds to that.

The discriminant information of features X (a row per sample) and one-hot labels Y, both centred,
is tr[(X'X + r I)^-1 X'Y Y'X]: the scatter between classes over the scatter of all. It equals
|Y|^2 less the least ridge regression error of Y on X, so no added feature lowers it. With
G = XX' + r I it is |Y|^2 - r tr(Y'G^-1 Y), which needs a matrix of samples by samples only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pliant.cost import Example, call
from pliant.data import Data, unpack
from pliant.errors import DataError, ModelError
from pliant.families.prune.scores import Groups
from pliant.observe.watch import capture

Pool = Literal["auto", "never", "always"]
Labelled = tuple[Example, Tensor]

NUMBERS = 1 << 22  # of activations that are held in float64 at once
SATURATED = 0.99  # share of |Y|^2 above which features tell all samples apart, whatever they are


def one_hot(labels: Tensor) -> Tensor:
    """Return the labels of a batch as centred one-hot rows, (samples, classes there) float64."""
    rows = torch.eye(int(labels.max()) + 1, dtype=torch.float64)[labels.cpu().long()]
    rows = rows[:, rows.any(0)]
    return rows - rows.mean(0)


@dataclass
class Discriminant:
    """The discriminant information of the activations of one batch.

    Args:
        features: (samples, channels, positions), of any floating type.
        targets: centred one-hot labels, (samples, classes).
        ridge: r, above zero; in units of the mean energy of a sample if ``relative``.
        relative: whether the ridge follows the scale of the features.
    """

    features: Tensor
    targets: Tensor
    ridge: float
    relative: bool = False
    rho: float = field(init=False)

    def __post_init__(self) -> None:
        count = len(self.features)
        gram = torch.zeros(count, count, dtype=torch.float64)
        for part in self._parts():
            gram += part.flatten(1) @ part.flatten(1).T
        scale = float(gram.trace()) / count if self.relative else 1.0
        self.rho = max(self.ridge * scale, 1e-12)
        self.gram = gram + self.rho * torch.eye(count, dtype=torch.float64)
        self.solved = _solve(self.gram, self.targets)  # G^-1 Y

    @property
    def value(self) -> float:
        """The information itself, from 0 to |Y|^2."""
        return float(self.targets.square().sum() - self.rho * (self.targets * self.solved).sum())

    @property
    def share(self) -> float:
        """The part of |Y|^2 that is reached: near 1 the features tell any labels apart."""
        return self.value / float(self.targets.square().sum())

    def slopes(self) -> Tensor:
        """Return by how much tr(Y'G^-1 Y) falls with a factor on each channel, (channels,)."""
        return torch.cat([self._through(p).square().sum((1, 2)) for p in self._parts()]) * 2

    def losses(self) -> Tensor:
        """Return by how much the information falls without each channel, (channels,)."""
        whole, found = (self.targets * self.solved).sum(), []
        for part in self._parts():
            for channel in part.unbind(1):
                without = _solve(self.gram - channel @ channel.T, self.targets)
                found.append(self.rho * ((self.targets * without).sum() - whole))
        return torch.stack(found).clamp_min(0)

    def _through(self, part: Tensor) -> Tensor:
        return torch.einsum("bcp,bk->cpk", part, self.solved)

    def _parts(self) -> Iterator[Tensor]:
        """Yield some channels at a time, centred over the batch, in float64."""
        each = max(1, NUMBERS // max(1, self.features[:, :1].numel()))
        for part in self.features.split(each, 1):
            part = part.cpu().double()
            yield part - part.mean(0)


def _solve(gram: Tensor, targets: Tensor) -> Tensor:
    return torch.cholesky_solve(targets, torch.linalg.cholesky(gram))


@dataclass(frozen=True)
class Scorer:
    """What channels add to the separation of classes, summed over batches.

    Args:
        ridge: see `Discriminant`.
        relative: see `Discriminant`.
        exact: score by the loss without a channel, not by the slope of a factor on it.
        pool: whether positions are averaged first: "auto" does where a layer is saturated.
    """

    ridge: float = 1e-3
    relative: bool = True
    exact: bool = False
    pool: Pool = "auto"

    def scores(
        self, model: nn.Module, groups: Groups, batches: Sequence[Labelled]
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return the score of every unit by group, and the share that each layer reaches.

        Scores of a layer are in units of their mean; those of layers whose channels meet in a
        sum are added. Layers are looked at behind their weights, before norm and nonlinearity.

        Raises:
            ModelError: a layer is not called sample by sample.
        """
        layers = list(dict.fromkeys(slot[0] for group in groups for slot in group.makers))
        sums, shares, pooled = dict[str, Tensor](), dict[str, float](), dict[str, bool]()
        for example, labels in batches:
            targets = one_hot(labels)

            def see(name: str, given: Tensor, output: Tensor, targets: Tensor = targets) -> None:
                features = _features(model.get_submodule(name), name, output, len(targets))
                found = self._measure(features, targets, pooled.get(name))
                pooled.setdefault(name, found.features.shape[2] < features.shape[2])
                own = found.losses() if self.exact else found.slopes()
                sums[name] = sums.get(name, 0) + own
                shares[name] = shares.get(name, 0.0) + found.share / len(batches)

            with capture(model, layers, see):
                call(model, example)
        return {group.name: _of_units(group, sums) for group in groups}, shares

    def _measure(self, features: Tensor, targets: Tensor, pooled: bool | None) -> Discriminant:
        pool = self.pool == "always" if pooled is None else pooled
        mean = features.mean(2, keepdim=True) if pool else features
        found = Discriminant(mean, targets, self.ridge, self.relative)
        full = pooled is None and self.pool == "auto" and features.shape[2] > 1
        if full and found.share > SATURATED:
            return self._measure(features, targets, True)
        return found


def _features(layer: Any, name: str, output: Tensor, count: int) -> Tensor:
    """Bring what a layer gives into the form (samples, channels, positions)."""
    if len(output) != count:
        raise ModelError(
            f"{name} must give a row for each of {count} samples to be compared with their labels, "
            f"but gives {len(output)}: leave it out by exclude=({name!r},)."
        )
    map_ = output.movedim(-1, 1) if isinstance(layer, nn.Linear) else output
    return map_.float().flatten(2) if map_.dim() > 2 else map_.float().unsqueeze(2)


def _of_units(group: Any, sums: dict[str, Tensor]) -> Tensor:
    total = torch.zeros(len(group.units), dtype=torch.float64)
    for slot in group.makers:
        if slot[0] in sums:
            own = sums[slot[0]]
            total += (own / own.mean().clamp_min(1e-30))[group.rows(slot)].sum(1)
    return total


def labelled(data: Data, samples: int, batch: int, seed: int) -> list[Labelled]:
    """Return training samples with their classes, in batches of two classes or more.

    Raises:
        DataError: labels are not one class for each sample, or all batches are of one class.
    """
    found, seen = list[Labelled](), 0
    for item in data.batches("train", batch, seed=seed, shuffle=True):
        example, labels = unpack(item)
        if not isinstance(labels, Tensor) or labels.dim() != 1 or labels.is_floating_point():
            raise DataError(
                "discriminant_information needs one class for each sample, as whole numbers, but "
                "labels are something else: take group_fisher, which needs none."
            )
        seen += len(labels)
        if len(labels.unique()) > 1:
            found.append((example, labels))
        if seen >= samples:
            break
    if not found:
        raise DataError(
            "discriminant_information separates classes, but every batch holds a single one: "
            "shuffle the training data, or give data of two classes or more."
        )
    return found
