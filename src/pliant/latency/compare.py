"""Measures networks so that a noisy machine cannot fool: interleaved, with spread and verdict."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from pliant.cost import Example
from pliant.latency.runtimes import BLOCK, Sampler
from pliant.latency.target import SECONDS, Target, Where, as_target

Verdict = Literal["faster", "not distinguishable", "slower"]

ROUNDS = (9, 301)  # of measuring each in turn: fewest, and most within two seconds
PASSES, TURN = 5, 0.05  # in a row, at most, within about so many seconds
OWN_ROUNDS = 3  # with a function of the user's: a phone is slow and quiet
OWN_SURE = 8  # of comparing two networks with it: the fewest that have an interval
SURE = 1.36  # ranks by sqrt(n) around a median: the normal 1.29 of 99 % fails for some small n
TICK = 1e-9  # seconds that no clock resolves
BUILDS = 3  # of each network, where its time depends on where in memory it lies
SAME = 0.01  # as much can differ between more builds than were measured


@dataclass(frozen=True)
class Timing:
    """How long one inference takes.

    Attributes:
        median_ms: the middle one of all samples, in milliseconds.
        spread_ms: half the distance between their quartiles.
        repeats: how many samples there were.
    """

    median_ms: float
    spread_ms: float
    repeats: int

    def __str__(self) -> str:
        return f"{self.median_ms:.3g} ± {self.spread_ms:.2g} ms"

    def scaled(self, ms: float) -> Timing:
        """Return the same with another middle, and a spread in proportion."""
        return Timing(ms, ms * self.spread_ms / self.median_ms, self.repeats)


@dataclass(frozen=True)
class Comparison:
    """Two networks measured in turn.

    Attributes:
        a: times of the first.
        b: times of the second.
        speedup: how many times faster the second is: the median of the ratios of each round, and
            of the pairs of builds.
        low: lower end of the interval that holds the true median at 99 % for every pair of
            builds; 0 where fewer than eight rounds have none.
        high: upper end; infinite where there is none.
    """

    a: Timing
    b: Timing
    speedup: float
    low: float
    high: float

    @property
    def verdict(self) -> Verdict:
        """Whether the second is faster than the first, as far as the spread allows to say."""
        if self.low > 1 and self.speedup > 1 + SAME:
            return "faster"
        if self.high < 1 and self.speedup < 1 / (1 + SAME):
            return "slower"
        return "not distinguishable"


def measure(model: nn.Module, example: Example | Tensor, target: Where) -> Timing:
    """Measure one inference of a network.

    Args:
        model: any module; a copy of it runs in eval mode.
        example: inputs of one forward call; rows are repeated up to the target's batch.
        target: where it is to run: a `Target`, text such as ``"torch,threads=2"``, or a function.

    Raises:
        MethodError: the target is none.
        ModelError: the network cannot be run there, or a function's seconds make no sense.
    """
    place = as_target(target)
    return timing(interleaved([place.sampler(model, example)], place)[0])


def compare(a: nn.Module, b: nn.Module, example: Example | Tensor, target: Where) -> Comparison:
    """Measure two networks in turn, so that whatever else the machine does falls on both.

    Those that take less than a millisecond are built three times each, since their time depends
    on where in memory they lie.

    Raises:
        MethodError: the target is none.
        ModelError: one of them cannot be run there, or a function's seconds make no sense.
    """
    place = as_target(target)
    first, second = (place.samplers(model, example, BUILDS) for model in (a, b))
    rows = interleaved([*first, *second], place, own=OWN_SURE)
    return of_builds(rows[: len(first)], rows[len(first) :])


def interleaved(
    samplers: Sequence[Sampler],
    target: Target,
    *,
    seconds: float | None = None,
    least: int = ROUNDS[0],
    own: int = OWN_ROUNDS,
) -> list[list[float]]:
    """Take samples of all in turn, every second round in the other order.

    A sample is the fastest of a few passes in a row.

    Args:
        samplers: what to measure.
        target: where it runs; a function of the user's is called once for a sample.
        seconds: that all of it takes about; the target's if not given.
        least: rounds that are made however long they take.
        own: rounds with a function of the user's, whatever the other two say.

    Returns:
        One row of seconds for each sampler, a value per round.
    """
    tries = 1 if target.once else PASSES
    # These warm up, and are thrown away.
    first = [min(_sample(each) for _ in range(tries)) for each in samplers]
    passes = [min(tries, _passes(each)) for each in first]
    rows: list[list[float]] = [[] for _ in samplers]
    turn = list(enumerate(samplers))
    costs = [max(time, 1.5 * BLOCK) * count for time, count in zip(first, passes, strict=True)]
    rounds = own if target.once else _rounds(sum(costs), seconds or target.seconds, least)
    for _ in range(rounds):
        for index, each in turn:
            rows[index].append(min(_sample(each) for _ in range(passes[index])))
        turn.reverse()
    return rows


def timing(seconds: Sequence[float]) -> Timing:
    """Sum samples up."""
    rows = sorted(seconds)
    low, high = rows[len(rows) // 4], rows[(3 * len(rows) - 1) // 4]
    return Timing(1000 * statistics.median(rows), 500 * (high - low), len(rows))


def quiet(seconds: Sequence[float]) -> float:
    """Return the time on a quiet machine: a low quantile, since others only ever add to it."""
    return sorted(seconds)[len(seconds) // 10]


def compared(a: Sequence[float], b: Sequence[float]) -> Comparison:
    """Compare the samples of the same rounds."""
    ratios = sorted(one / other for one, other in zip(a, b, strict=True))
    edge = math.floor(len(ratios) / 2 - SURE * math.sqrt(len(ratios)))
    low, high = (ratios[edge], ratios[-1 - edge]) if edge >= 0 else (0.0, math.inf)
    return Comparison(timing(a), timing(b), statistics.median(ratios), low, high)


def of_builds(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> Comparison:
    """Compare two networks by the samples of every build of both, taken in the same rounds.

    The interval holds those of all pairs of builds.
    """
    pairs = [compared(one, other) for one, other in itertools.product(a, b)]
    return Comparison(
        a=timing([statistics.median(turn) for turn in zip(*a, strict=True)]),
        b=timing([statistics.median(turn) for turn in zip(*b, strict=True)]),
        speedup=statistics.median(pair.speedup for pair in pairs),
        low=min(pair.low for pair in pairs),
        high=max(pair.high for pair in pairs),
    )


def _rounds(cost: float, seconds: float, least: int) -> int:
    most = max(ROUNDS[1], round(ROUNDS[1] * seconds / SECONDS))
    return min(most, max(least, round(seconds / cost)))


def _passes(seconds: float) -> int:
    """How many passes in a row make one sample, of which the fastest counts.

    On a loaded machine the scheduler interrupts a pass of some milliseconds more often than a
    shorter one, and a comparison of both would flatter the shorter.
    """
    return max(1, min(PASSES, int(TURN / seconds)))


def _sample(each: Sampler) -> float:
    return max(each(), TICK)
