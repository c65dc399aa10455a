"""What scores promise, on a network that has learned digits: without any training after the cut."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam

from pliant.data import Data, load
from pliant.edits import replay
from pliant.families.prune.judge import accuracy
from pliant.families.prune.scores import Groups, importance, weakest
from pliant.registry import build
from pliant.run import start
from pliant.surgery.batchnorm import recalibrate
from pliant.surgery.prove import edits_of

SEEDS = (0, 1, 2)
SCORES = (
    "discriminant_information(search='none', samples=512, start=1.0)",
    "dynamic_channel_propagation(samples=512)",
    "majority_voting(samples=512, start=1.0)",
    "hfp(samples=256, start=1.0)",
    "group_fisher(samples=256, passes=1, start=1.0)",
    "sspruning(samples=512, start=1.0)",
)


@cache
def digits() -> Data:
    return load("digits")


@cache
def learned(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 24, 3, bias=False), nn.BatchNorm2d(24), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(96, 10)),
    )
    optimizer = Adam(model.parameters(), 3e-3)
    for epoch in range(5):
        for images, labels in digits().batches("train", 64, seed=seed, epoch=epoch, shuffle=True):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return model.eval()


@cache
def scored(spec: str, seed: int) -> tuple[Groups, dict[str, Tensor]]:
    model = copy.deepcopy(learned(seed))
    method: Any = build(spec)
    run = start(model, method, data=digits(), steps=1, seed=seed)
    groups = method.groups(run)
    return groups, method.scores(run, groups)


def left(seed: int, groups: Groups, scores: dict[str, Tensor], share: float) -> float:
    """The accuracy without a share of every group, the least first; batch norms re-estimated."""
    model = copy.deepcopy(learned(seed))
    gone = {name: weakest(own, round(share * len(own))).tolist() for name, own in scores.items()}
    replay(model, edits_of(model, groups, gone))
    recalibrate(model, digits().calibration(512, batch=128, seed=seed))
    return accuracy(model, digits().batches("val", 256)) or 0.0


def mean(spec: str, share: float, how: Callable[[Tensor], Tensor] = lambda s: s) -> float:
    found = []
    for seed in SEEDS:
        groups, scores = scored(spec, seed)
        found.append(left(seed, groups, {n: how(s.double()) for n, s in scores.items()}, share))
    return sum(found) / len(found)


@cache
def by_chance(share: float) -> float:
    """The mean of three draws for each network."""
    groups, scores = scored(SCORES[0], 0)
    found = []
    for seed in SEEDS:
        noise = torch.Generator().manual_seed(seed)
        for _ in range(3):
            drawn = {n: torch.rand(len(s), generator=noise) for n, s in scores.items()}
            found.append(left(seed, groups, drawn, share))
    return sum(found) / len(found)


@cache
def by_norm(share: float) -> float:
    found = []
    for seed in SEEDS:
        groups, _ = scored(SCORES[0], seed)
        norms = {g.name: importance(learned(seed), g, order=1) for g in groups}
        found.append(left(seed, groups, norms, share))
    return sum(found) / len(found)


@pytest.mark.slow  # three networks learn digits
@pytest.mark.parametrize("spec", SCORES)
def test_scores_are_better_than_chance_and_than_their_reverse(spec: str) -> None:
    own, reverse = mean(spec, 0.5), mean(spec, 0.5, lambda scores: -scores)
    assert own > by_chance(0.5) > reverse, (own, by_chance(0.5), reverse)


@pytest.mark.slow
@pytest.mark.parametrize("spec", [s for s in SCORES if s.startswith(("disc", "hfp", "group"))])
def test_scores_from_data_are_no_worse_than_norms(spec: str) -> None:
    assert mean(spec, 0.5) > by_norm(0.5) - 0.02, (mean(spec, 0.5), by_norm(0.5))
