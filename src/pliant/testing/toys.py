"""Tiny networks with data: built in milliseconds, and hard in the ways that real ones are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pliant.cost import Example
from pliant.data import Data
from pliant.nn.genotype import Genotype
from pliant.nn.mobile import MobileNetwork, Space, Stage
from pliant.zoo.darts import evaluation, supernet
from pliant.zoo.staged import StagedResNet

CLASSES = 4


@dataclass(frozen=True, eq=False)
class Toy:
    """A network, and data to train it on: noise, unless some is given.

    Args:
        name: what it stands for.
        build: makes the network; seeded by ``model``.
        shape: of one input.
        samples: in the training split; validation has half as many.
        given: data instead of noise; then ``shape`` and ``samples`` are not read.
    """

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = ()
    samples: int = 16
    given: Data | None = None

    def model(self, seed: int = 0) -> nn.Module:
        """Build the network, the same one for the same seed; the random state stays as it is."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self.build()

    def inputs(self, count: int) -> Example:
        """Return inputs of one forward call, the same ones every time."""
        return (self._noise(count),) if self.given is None else self.given.example(count)

    def data(self) -> Data:
        """Return labelled samples in training and validation splits."""
        if self.given is not None:
            return self.given
        train, val = self.samples, self.samples // 2
        inputs, labels = self._noise(train + val), torch.arange(train + val) % CLASSES
        splits = (inputs[:train], labels[:train]), (inputs[train:], labels[train:])
        return Data(*splits, classes=CLASSES, name=f"{self.name} noise")

    def _noise(self, count: int) -> Tensor:
        return torch.randn(count, *self.shape, generator=torch.Generator().manual_seed(0))


class _Residual(nn.Module):
    """Two branches that meet: what changes the channels of one breaks the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.branch = nn.Sequential(
            *(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
            *(nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(12)),
        )
        self.shortcut = nn.Conv2d(8, 12, 1, stride=2, bias=False)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.norm(self.stem(images)).relu()
        hidden = (self.branch(hidden) + self.shortcut(hidden)).relu()
        return self.head(hidden.mean((2, 3)))


class _Shared(nn.Module):
    """One layer called twice, and two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.first = nn.Conv2d(8, 8, 1)
        self.second = nn.Conv2d(8, 8, 1)
        self.second.weight = self.first.weight
        self.head = nn.Linear(8, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.twice(self.twice(self.stem(images)).relu()).relu()
        hidden = self.second(self.first(hidden).relu()).relu()
        return self.head(hidden.mean((2, 3)))


class _Transformer(nn.Module):
    """One block, and a token that the model owns without a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(0.1 * torch.randn(1, 1, 16))
        self.embed = nn.Linear(6, 16)
        self.block = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.1, batch_first=True)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        hidden = torch.cat([self.token.expand(len(words), -1, -1), self.embed(words)], dim=1)
        return self.head(self.block(hidden)[:, 0])


class _Single(nn.Module):
    """One convolution, three modules deep."""

    def __init__(self) -> None:
        super().__init__()
        self.outer = nn.Sequential(nn.Sequential(nn.Conv2d(8, CLASSES, 3, padding=1)))

    def forward(self, images: Tensor) -> Tensor:
        return self.outer(images).mean((2, 3))


def _plain() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Dropout(0.1)),
        *(nn.Conv2d(12, 12, 3, dilation=2, padding="same"), nn.ReLU(inplace=True)),
        *(nn.Conv2d(12, 16, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES)),
    )


def _grouped() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU6(inplace=True)),
        *(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.Conv2d(8, 12, 1)),
        *(nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1, groups=3), nn.ReLU(), nn.Conv2d(12, 12, 3)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, CLASSES)),
    )


def _bare() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Conv2d(8, 12, 3), nn.ReLU(inplace=True)),
        *(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, CLASSES)),
    )


def _signal() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv1d(2, 8, 5, stride=2, padding=2), nn.BatchNorm1d(8), nn.ReLU()),
        *(nn.Conv1d(8, 12, 3, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(12, CLASSES)),
    )


def _volume() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv3d(2, 6, 3, padding=1), nn.BatchNorm3d(6), nn.ReLU()),
        *(nn.Conv3d(6, 8, (1, 3, 3), padding=(0, 1, 1), stride=(1, 2, 2)), nn.ReLU()),
        *(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, CLASSES)),
    )


def _linear() -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(12, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.1)),
        *(nn.Linear(24, 24), nn.LayerNorm(24), nn.GELU(), nn.Linear(24, CLASSES)),
    )


def _supernet() -> nn.Module:
    wiring, operations = ((0, 1),), ("skip_connect", "sep_conv_3x3")
    return supernet(wiring, operations, cells=3, channels=2, classes=CLASSES)


def _cells() -> nn.Module:
    cell = Genotype.of((("sep_conv_3x3", 0), ("skip_connect", 1)))
    return evaluation(cell, cells=3, channels=2, classes=CLASSES)


def _mobile() -> nn.Module:
    ops = ("mbconv_k3_e1", "mbconv_k5_e2", "skip_connect")
    stages = (Stage(4, 2, 1, ops), Stage(8, 2, 2, ops))
    return MobileNetwork(Space(3, 4, (3, 3), (1, 1), stages, head=8), CLASSES)


def _staged() -> nn.Module:
    return StagedResNet((1, 2), (4, 6), CLASSES)


TOYS: dict[str, Toy] = {
    toy.name: toy
    for toy in (
        Toy("plain", _plain, (3, 6, 6), samples=32),
        Toy("residual", _Residual, (3, 6, 6)),
        Toy("grouped", _grouped, (3, 6, 6)),
        Toy("shared", _Shared, (3, 6, 6)),
        Toy("bare", _bare, (3, 6, 6)),
        Toy("signal", _signal, (2, 16)),
        Toy("volume", _volume, (2, 3, 4, 4)),
        Toy("linear", _linear, (12,)),
        Toy("transformer", _Transformer, (5, 6)),
        Toy("single", _Single, (8, 4, 4)),
    )
}
"""All toys by name; the first one stands for ordinary networks and gets the thorough checks."""

SPECIAL: dict[str, Toy] = {
    toy.name: toy
    for toy in (
        Toy("supernet", _supernet, (3, 6, 6)),
        Toy("cells", _cells, (3, 6, 6)),
        Toy("mobile", _mobile, (3, 6, 6)),
        Toy("staged", _staged, (3, 6, 6)),
    )
}
"""Networks for methods that refuse ordinary ones, such as those that choose operations."""
