"""How much leaves each group, by trial: networks are cut on a copy and asked for their accuracy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pliant.budget import Limits
from pliant.cost import Example, call, evaluating
from pliant.data import Data, unpack
from pliant.errors import DataError
from pliant.families.prune.allocate import Goal, after, allocate, counted, savings
from pliant.families.prune.channels import silenced
from pliant.families.prune.ranking import Unit, by_group, ranking
from pliant.families.prune.scores import Groups, Scores, weakest
from pliant.observe.outputs import logits
from pliant.run import Run
from pliant.surgery.prove import Leaving, edits_of

Weights = Mapping[str, float]
"""How much each group is to keep, in proportion to the others."""


@dataclass(frozen=True)
class Trials:
    """Ways to divide one goal among groups whose units have an order of their own.

    Args:
        run: its network stays as it is; milliseconds are taken to fall as multiply-accumulates.
        groups: of channels.
        scores: of their units; within a group the least leave first.
        goal: how far to go.
        held: validation samples that judge.
    """

    run: Run
    groups: Groups
    scores: Scores
    goal: Goal
    held: Sequence[tuple[Example, Tensor]]

    def ranked(self, weights: Weights) -> list[Unit]:
        """Order units so that whatever leaves, groups keep shares in proportion to weights.

        The unit of rank r among n leaves when the share kept falls below (n - r) / n. Groups that
        are whole, or at their floor, are left out of the proportion.
        """
        levels = {}
        for name, values in self.scores.items():
            count = len(values)
            kept = torch.arange(count, 0, -1, dtype=torch.float64) / count
            levels[name] = torch.empty(count, dtype=torch.float64)
            levels[name][weakest(values, count)] = -kept / weights[name]
        return ranking(levels, "global", self.run.state["floors"])

    def leaving(self, weights: Weights) -> Leaving:
        """Return the units that leave by the goal, milliseconds counted."""
        goal = replace(self.goal, limits=counted(self.run, self.goal.limits))
        return allocate(self.run, self.groups, self.ranked(weights), goal)

    def reward(self, leaving: Leaving) -> float:
        """Return the accuracy without some units, batch norms re-estimated, on a copy."""
        model = silenced(self.run, edits_of(self.run.model, self.groups, leaving))
        right = total = 0
        with evaluating(model), torch.no_grad():
            for example, labels in self.held:
                guess = logits(call(model, example)).argmax(1).cpu()
                right, total = right + int((guess == labels.cpu()).sum()), total + len(labels)
        return right / total


@dataclass(frozen=True)
class Policy:
    """Policy gradient: logits of the groups are drawn about a mean that moves with the reward.

    Args:
        updates: of the mean.
        draws: logits tried for one update.
        spread: standard deviation of the draws.
        lr: of the mean.
    """

    updates: int
    draws: int
    spread: float = 0.3
    lr: float = 0.05

    def search(self, trials: Trials, generator: torch.Generator) -> list[Unit]:
        """Return the ranking of the best weights that were tried, equal ones among them."""
        names = list(trials.scores)
        mean = torch.zeros(len(names), dtype=torch.float64)
        even = dict.fromkeys(names, 1.0)
        best, found = trials.reward(trials.leaving(even)), even
        first = average = best
        for _ in range(self.updates):
            noise = torch.randn(self.draws, len(names), generator=generator, dtype=torch.float64)
            rewards = []
            for logit in mean + self.spread * noise:
                shares = logit.softmax(0) * len(names)
                weights = dict(zip(names, shares.tolist(), strict=True))
                rewards.append(trials.reward(trials.leaving(weights)))
                if rewards[-1] > best:
                    best, found = rewards[-1], weights
            mean = mean + self.lr * direction(torch.tensor(rewards), noise, average, self.spread)
            average = 0.5 * average + 0.5 * sum(rewards) / len(rewards)
        trials.run.note(reward=best, reward_of_equal_shares=first)
        return trials.ranked(found)


def direction(rewards: Tensor, noise: Tensor, baseline: float, spread: float) -> Tensor:
    """Return the policy gradient by the mean of Gaussian draws, in units of the rewards' spread.

    Args:
        rewards: of the draws, (draws,).
        noise: the draws in standard deviations from the mean, (draws, groups).
        baseline: what is expected.
        spread: standard deviation of the draws.
    """
    better = (rewards.double() - baseline) / rewards.double().std(correction=0).clamp_min(1e-3)
    return (better[:, None] * noise).mean(0) / spread


@dataclass(frozen=True)
class Greedy:
    """Steps that save alike: each is taken in the group where it costs the least accuracy.

    Args:
        steps: on the way to the goal; each tries every group once.
        most: share of a group that may leave.
    """

    steps: int
    most: float = 0.9

    def search(self, trials: Trials) -> list[Unit]:
        """Return the units in the order in which the steps took them, all others behind."""
        run, spare, gone = trials.run, self._spare(trials), list[Unit]()
        limits = counted(run, trials.goal.limits)
        part = self._part(trials, limits)
        while not _arrived(trials, gone, limits):
            saved = savings(run, trials.groups, gone, tuple(limits))
            steps = [
                units[: math.ceil(part / saved[name] - 1e-9)]
                for name, units in spare.items()
                if units
            ]
            if not steps:
                break
            rewards = [trials.reward(by_group([*gone, *step])) for step in steps]
            chosen = steps[rewards.index(max(rewards))]
            gone += chosen
            del spare[chosen[0].group][: len(chosen)]
        return _numbered(trials, gone)

    def _spare(self, trials: Trials) -> dict[str, list[Unit]]:
        """The units of each group that may leave, in their order."""
        found: dict[str, list[Unit]] = {name: [] for name in trials.scores}
        for unit in trials.ranked(dict.fromkeys(found, 1.0)):
            found[unit.group].append(unit)
        sizes = {name: len(values) for name, values in trials.scores.items()}
        return {name: units[: int(self.most * sizes[name])] for name, units in found.items()}

    def _part(self, trials: Trials, limits: Limits) -> float:
        """What one step saves, in the units of `savings`."""
        now = trials.run.planner.now()
        gap = sum(max(0.0, 1 - bound / getattr(now, axis)) for axis, bound in limits.items())
        units = sum(map(len, trials.scores.values()))
        return (gap if limits else trials.goal.ratio * units) / self.steps


def _arrived(trials: Trials, gone: Sequence[Unit], limits: Limits) -> bool:
    """Say whether the goal is reached without some units."""
    if not limits:
        total = sum(map(len, trials.scores.values()))
        return len(gone) >= math.floor(trials.goal.ratio * total + 1e-9)
    run = trials.run
    edits = edits_of(run.model, trials.groups, by_group(gone))
    left = after(run.planner.now(), run.planner.rows(), edits)
    return all(getattr(left, axis) <= bound for axis, bound in limits.items())


def _numbered(trials: Trials, first: Sequence[Unit]) -> list[Unit]:
    """Order some units before all others, by the share that leaves with each."""
    known = {(unit.group, unit.index) for unit in first}
    even = trials.ranked(dict.fromkeys(trials.scores, 1.0))
    order = [*first, *(unit for unit in even if (unit.group, unit.index) not in known)]
    total = sum(map(len, trials.scores.values()))
    return [replace(unit, level=(i + 1) / total) for i, unit in enumerate(order)]


def held_out(data: Data, samples: int, batch: int) -> list[tuple[Example, Tensor]]:
    """Return validation samples that judge what is tried.

    Raises:
        DataError: there are none.
    """
    if not data.has("val"):
        raise DataError(
            "Widths are searched for on validation samples, apart from those that train, but there "
            'are none: give Data(train, val), or search="none".'
        )
    found, seen = [], 0
    for item in data.batches("val", batch):
        example, labels = unpack(item)
        found.append((example, labels))
        seen += len(labels)
        if seen >= samples:
            break
    return found
