"""Looks at what layers read and give on a few inputs: samples of values, and their extremes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pliant.cost import Example, call
from pliant.observe.watch import capture

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

    def kept(self) -> Tensor:
        """Return the values that were kept."""
        return torch.cat(self.values)


@dataclass(frozen=True)
class Flow:
    """What passed a layer: its input and its output."""

    input: Sample = field(default_factory=Sample)
    output: Sample = field(default_factory=Sample)


def observe(model: nn.Module, layers: Iterable[str], batches: Iterable[Example]) -> dict[str, Flow]:
    """Return what passes the layers that are called, in the order of their first calls."""
    found: dict[str, Flow] = {}

    def see(name: str, inputs: Tensor, output: Tensor) -> None:
        if not inputs.numel():  # an expert to which nothing was routed
            return
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
