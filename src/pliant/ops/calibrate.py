"""Looks at what layers read and give on a few inputs, to place the levels of their rounding."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pliant.cost import Example, call
from pliant.math.quantize import best_range
from pliant.ops.capture import capture
from pliant.ops.layers import Factorizable
from pliant.ops.quantized import applied

KEPT = 2**12  # values of one batch that the search for a range looks at


@dataclass
class Sample:
    """Some of the values that passed a place, and the least and largest of all."""

    values: list[Tensor] = field(default_factory=list)
    low: float = 0.0
    high: float = 0.0

    def add(self, seen: Tensor) -> None:
        """Keep evenly spaced ones of these values."""
        flat = seen.detach().flatten()
        step = len(flat) // KEPT | 1  # odd, to meet every column of an image
        self.values.append(flat[::step].float().clone())
        self.low = min(self.low, float(flat.min()))
        self.high = max(self.high, float(flat.max()))

    def range(self, bits: int) -> tuple[float, int]:
        """Return scale and zero point of the best range for these values."""
        return best_range(torch.cat(self.values), self.low, self.high, bits)


@dataclass(frozen=True)
class Flow:
    """What passed a layer: its input and its output."""

    input: Sample = field(default_factory=Sample)
    output: Sample = field(default_factory=Sample)


def observe(model: nn.Module, layers: Iterable[str], batches: Iterable[Example]) -> dict[str, Flow]:
    """Return what passes the layers that are called, in the order of their first calls."""
    found: dict[str, Flow] = {}

    def see(name: str, inputs: Tensor, output: Tensor) -> None:
        flow = found.setdefault(name, Flow())
        flow.input.add(inputs)
        flow.output.add(output)

    with capture(model, layers, see):
        for batch in batches:
            call(model, batch)
    return found


def unread(model: nn.Module, layers: Iterable[str], example: Example) -> list[str]:
    """Name the layers whose output no other of the layers reads, as it is or after a ReLU.

    An integer runtime needs a scale for the output of exactly these: what the others give is
    rounded by the layer that reads it. Outputs are recognised by their values.
    """
    said: list[tuple[str, Tensor]] = []
    read: set[str] = set()
    before: list[str] = []

    def see(name: str, inputs: Tensor, output: Tensor) -> None:
        read.update(giver for giver, given in said if _passed_on(given, inputs))
        said.append((name, output))
        before.append(name)

    with capture(model, layers, see):
        call(model, example)
    return [name for name in dict.fromkeys(before) if name not in read]


def _passed_on(given: Tensor, inputs: Tensor) -> bool:
    if given.shape != inputs.shape:
        return False
    return any(
        torch.equal(inputs, passed) for passed in (given, given.relu(), given.clamp(0.0, 6.0))
    )


def output_errors(
    model: nn.Module,
    layers: Mapping[str, Factorizable],
    weights: Mapping[str, Mapping[int, Tensor]],
    batch: Example,
) -> dict[str, dict[int, float]]:
    """Return how far outputs move if a layer had other weights, relative to their own energy.

    Args:
        model: gives the inputs of every layer.
        layers: the layers.
        weights: for each of them the weights to try, by a key.
        batch: inputs of one forward call.

    Returns:
        The squared error over the squared output, for every layer that is called and every key.
    """
    found: dict[str, dict[int, float]] = {}

    def see(name: str, inputs: Tensor, output: Tensor) -> None:
        layer = layers[name]
        wanted = applied(layer, type(layer), inputs, layer.weight, None)
        energy = float(wanted.square().sum()) or 1.0
        for key, weight in weights[name].items():
            gap = applied(layer, type(layer), inputs, layer.weight - weight, None)
            row = found.setdefault(name, {})
            row[key] = row.get(key, 0.0) + float(gap.square().sum()) / energy

    with capture(model, layers, see):
        call(model, batch)
    return found
