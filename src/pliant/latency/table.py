"""What layers cost in milliseconds: measured when first asked for, and kept on disk."""

from __future__ import annotations

import itertools
import json
import math
import os
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pliant.codecs.container import replacing
from pliant.errors import OutputError
from pliant.latency.compare import interleaved, quiet
from pliant.latency.target import Target
from pliant.math.alone import forked
from pliant.math.forms import form_params, max_ranks
from pliant.nn.factorized import factorized
from pliant.nn.layers import Factorizable

VERSION = 2  # of what times mean: those of another one are not read
STEPS = (1, 2, 4, 8, 16)  # multiples to which ranks may be rounded up
LEAST = 0.05  # of a measured time is the layer's own, however much a call costs
FREE = 0.01  # rounding up to a step may cost this share of the time
PROBE = range(17, 49)  # ranks at which the steps of a target are looked for
POINTS = {1: 4, 2: 3}  # ranks measured on each axis, by the number of axes
GROUP_SECONDS, GROUP_ROUNDS = 0.5, 15  # for all points of one form together, at least


@dataclass
class LatencyTable:
    """Times of layers on one target, each measured once.

    A layer is known by its signature: kind, shapes, stride, padding and so on, its input and the
    batch. Times of a factorized layer are measured at a few ranks and interpolated between; a
    time that was measured at the very ranks goes first. All points of one form are measured in
    turn with the dense layer, and kept as shares of its time: those hold however the machine is
    loaded, also beside what another run has measured.

    What was measured before is taken only when it is asked for: what a run plans depends on what
    the run itself has asked so far, not on what others have left in the file.

    Args:
        target: where they were measured.
        path: the file, or None to keep them in memory.
        times: those that this run has asked for: milliseconds of layers, and of what replaces one
            the share of its time.
        past: those that were measured before it.
    """

    target: Target
    path: Path | None = None
    times: dict[str, float] = field(default_factory=dict)
    past: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, target: Target) -> LatencyTable:
        """Open the table of a target in the user's cache folder; a damaged file counts as empty.

        A table belongs to one fingerprint: another machine, version or number of threads has
        another file.
        """
        if target.function is not None and not target.runtime:
            return cls(target)
        path = cache_folder() / "latency" / f"{target.digest()}.json"
        return cls(target, path, past=_read(path))

    def time(self, layer: nn.Module, shape: Sequence[int]) -> float:
        """Return the milliseconds of a layer on inputs of this shape, batch axis included."""
        key = signature(layer, shape)
        if key not in self.times:
            self._measure(layer, shape, {})
        return self.times[key]

    def replaced(self, layer: nn.Module, other: nn.Module, shape: Sequence[int]) -> float:
        """Return the milliseconds of what would replace a layer, measured in turn with it."""
        dense = signature(layer, shape)
        key = f"{dense} as {signature(other, shape)}"
        if key not in self.times:
            self._measure(layer, shape, {key: other})
        return self.times[key] * self.times[dense]

    def exact(
        self, layer: Factorizable, shape: Sequence[int], form: str, ranks: Sequence[int]
    ) -> float:
        """Return the milliseconds of a factorized layer, measured at these very ranks."""
        dense = signature(layer, shape)
        key = _factored(dense, form, ranks)
        if key not in self.times:
            self._measure(layer, shape, {key: factorized(layer, form, ranks)})
        return self.times[key] * self.times[dense]

    def factor(
        self, layer: Factorizable, shape: Sequence[int], form: str, ranks: Sequence[int]
    ) -> float:
        """Return the milliseconds of a factorized layer, interpolated where it was not measured."""
        dense = signature(layer, shape)
        if (share := self.times.get(_factored(dense, form, ranks))) is not None:
            return share * self.times[dense]
        axes = self._axes(layer, form)
        keys = {point: _factored(dense, form, point) for point in itertools.product(*axes)}
        missing = {
            key: factorized(layer, form, point)
            for point, key in keys.items()
            if key not in self.times
        }
        if missing:
            self._measure(layer, shape, missing)
        shares = {point: self.times[key] for point, key in keys.items()}
        return _between(axes, ranks, shares) * self.times[dense]

    def step(self) -> int:
        """Return the multiple to which ranks can be rounded up at no cost, found by measuring."""
        shape = (self.target.batch, 64, 16, 16)
        with forked():
            dense = nn.Conv2d(64, 64, 3, padding=1, bias=False)
        name = signature(dense, shape)
        keys = {rank: _factored(name, "tucker2", (rank, rank)) for rank in PROBE}
        missing = {
            key: factorized(dense, "tucker2", (rank, rank))
            for rank, key in keys.items()
            if key not in self.times
        }
        if missing:
            self._measure(dense, shape, missing)
        return _step({rank: self.times[key] for rank, key in keys.items()})

    def step_for(self, layer: Factorizable, form: str) -> int:
        """Return the step for one layer: a small one keeps at least four ranks to choose from."""
        return self.step_within(min(max_ranks(layer.weight.shape, form)))

    def step_within(self, most: int) -> int:
        """Return the step for so many ranks or channels: it leaves at least four to choose from."""
        return min(self.step(), 1 << max(0, (most // 4).bit_length() - 1))

    def _axes(self, layer: Factorizable, form: str) -> list[list[int]]:
        """Ranks to measure at, from one step to where the form would cost as much as the layer."""
        shape, step = tuple(layer.weight.shape), self.step_for(layer, form)
        most = max_ranks(shape, form)
        if len(most) == 1:
            each = form_params(shape, form, (1,))
            most = (min(most[0], max(1, math.prod(shape) // each)),)
        return [_spread(step, top, POINTS[len(most)]) for top in most]

    def _measure(
        self, layer: nn.Module, shape: Sequence[int], others: Mapping[str, nn.Module]
    ) -> None:
        """Measure a layer and what may replace it in turn, as shares of the layer's own time.

        What was measured before, by this run or another, is not measured again.
        """
        name = signature(layer, shape)
        self.times = {k: self.past[k] for k in (name, *others) if k in self.past} | self.times
        others = {key: module for key, module in others.items() if key not in self.times}
        if name in self.times and not others:
            return
        inputs = (torch.empty(tuple(shape)).uniform_(-1, 1, generator=torch.Generator()),)
        modules = [layer, *others.values()]
        samplers = [self.target.layer_sampler(module, inputs) for module in modules]
        rows = interleaved(samplers, self.target, seconds=GROUP_SECONDS, least=GROUP_ROUNDS)
        first, *found = self._without_calls(map(quiet, rows), inputs)
        self.times.setdefault(name, 1000 * first)
        self.times |= {key: each / first for key, each in zip(others, found, strict=True)}
        self._write()

    def _without_calls(self, seconds: Iterable[float], inputs: tuple[Tensor, ...]) -> list[float]:
        """Take off what one call of a user's function costs by itself; other targets repeat."""
        if not self.target.once:
            return list(seconds)
        (nothing,) = interleaved([self.target.layer_sampler(nn.Identity(), inputs)], self.target)
        return [max(each - quiet(nothing), LEAST * each) for each in seconds]

    def _write(self) -> None:
        """Replace the file by one with what it held and what is new; without a disk, go on."""
        if self.path is None:
            return
        self.past = _read(self.path) | self.past | self.times
        held = {
            "version": VERSION,
            "fingerprint": self.target.fingerprint(),
            "times": dict(sorted(self.past.items())),
        }
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as file:
                file.write_text(json.dumps(held, indent=1), encoding="utf-8")
        except (OSError, OutputError):
            self.path = None  # times stay in memory


def cache_folder() -> Path:
    """Return the user's cache folder."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(given) if given else Path.home() / ".cache") / "pliant"


def signature(layer: nn.Module, shape: Sequence[int]) -> str:
    """Describe a layer and its input, so that equal ones cost the same."""
    leaves = [module for module in layer.modules() if next(module.children(), None) is None]
    return " > ".join(map(_leaf, leaves)) + f" on {'x'.join(map(str, shape))}"


def _leaf(module: nn.Module) -> str:
    """PyTorch's own layers print their sizes; of others the tensors say them."""
    if type(module).__module__.startswith("torch.nn"):
        return repr(module)
    tensors = (*module.parameters(), *module.buffers())
    return f"{module!r} of {[(tuple(t.shape), str(t.dtype)) for t in tensors]}"


def _factored(dense: str, form: str, ranks: Sequence[int]) -> str:
    return f"{dense} as {form} {'/'.join(map(str, ranks))}"


def input_shape(layer: nn.Module, cost: Any, batch: int) -> tuple[int, ...]:
    """Return the shape that a layer reads at a batch, from its cost for one sample.

    Where a layer sees several rows of one sample (windows of an image), its MACs tell how many.
    """
    weight: Tensor | None = getattr(layer, "weight", None)
    if weight is None or not cost.input:
        return (batch, *cost.input)
    places = math.prod(cost.output[:-1] if weight.dim() == 2 else cost.output[1:])
    one = weight.numel() * places * max(cost.calls, 1)
    return (batch * max(1, round(cost.macs / one)) if one else batch, *cost.input)


def _spread(low: int, high: int, points: int) -> list[int]:
    """Spread multiples of ``low`` up to ``high`` evenly on a logarithmic scale."""
    if high <= low:
        return [max(1, high)]
    ratio = (high / low) ** (1 / (points - 1))
    found = [low * max(1, round(ratio**i)) for i in range(points - 1)]
    return sorted({*(rank for rank in found if rank < high), high})


def _between(
    axes: Sequence[Sequence[int]],
    ranks: Sequence[int],
    times: dict[tuple[int, ...], float],
) -> float:
    """Interpolate linearly on every axis: exact for a cost that grows with each rank."""
    total = 0.0
    for corner in itertools.product(*map(_neighbours, axes, ranks)):
        share = math.prod(weight for _, weight in corner)
        total += share * times[tuple(rank for rank, _ in corner)]
    return total


def _neighbours(axis: Sequence[int], rank: int) -> Iterator[tuple[int, float]]:
    """The measured ranks on both sides, with their shares; outside, the nearest one."""
    above = next((i for i, each in enumerate(axis) if each >= rank), len(axis) - 1)
    below = max(0, above - 1)
    if axis[above] <= rank or above == below:
        yield axis[above], 1.0
        return
    share = (rank - axis[below]) / (axis[above] - axis[below])
    share = max(0.0, share)
    yield axis[below], 1 - share
    yield axis[above], share


def _step(times: dict[int, float]) -> int:
    """The largest step to which rounding a rank up costs next to nothing."""

    def price(step: int) -> float:
        ups = [(rank, math.ceil(rank / step) * step) for rank in times]
        return statistics.mean(times[up] / times[rank] for rank, up in ups if up in times)

    prices = {step: price(step) for step in STEPS}
    return max(step for step in STEPS if prices[step] <= min(prices.values()) + FREE)


def _read(path: Path) -> dict[str, float]:
    """Read a file of times; one that is missing, damaged or of another version is empty."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        if held["version"] != VERSION:
            return {}
        return {
            str(key): float(value)
            for key, value in held["times"].items()
            if isinstance(value, int | float) and math.isfinite(value) and value > 0
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}
