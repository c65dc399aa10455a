"""Looks at what layers read and give on a few inputs, to place the levels of their rounding."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pliant.cost import Example, call
from pliant.edits import Quantize
from pliant.math.quantize import Grouping, best_range, best_scales, grouping, rounded
from pliant.nn.quantized import Values, applied
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


# ---------------------------------------------------------------- numbers and choices


def begun(model: nn.Module, edit: Quantize, rule: Grouping, flow: Flow | None = None) -> Values:
    """Return groups, scales and ranges of least squared error for one layer.

    Args:
        model: holds the layer.
        edit: how its numbers shall be written.
        rule: which channels share a scale.
        flow: what passes the layer; None leaves ranges of activations out.
    """
    layer: Any = model.get_submodule(edit.layer)
    index = grouping(layer.weight, edit.groups, rule)
    return Values(
        layer.weight.detach(),
        best_scales(layer.weight, index, edit.bits),
        index,
        None if layer.bias is None else layer.bias.detach(),
        flow.input.range(edit.inputs) if flow and edit.inputs else None,
        flow.output.range(edit.outputs) if flow and edit.outputs else None,
    )


def harm(
    model: nn.Module,
    choices: Mapping[str, Sequence[Quantize]],
    rule: Grouping,
    batch: Example | None = None,
) -> dict[str, list[float]]:
    """Return how much each way to write a layer's weight changes what the layer gives.

    Args:
        model: gives the inputs of every layer.
        choices: ways to write each layer.
        rule: which channels share a scale.
        batch: inputs of one forward call; without them the change of the weight itself counts.

    Returns:
        Squared change over squared size, for every layer and every choice.
    """
    gaps = {
        name: [_gap(model, edit, begun(model, edit, rule)) for edit in edits]
        for name, edits in choices.items()
    }
    if batch is None:
        sizes = {name: _energy(_weight(model, name)) or 1.0 for name in gaps}
        return {name: [_energy(gap) / sizes[name] for gap in row] for name, row in gaps.items()}
    found = {name: [0.0] * len(row) for name, row in gaps.items()}

    def see(name: str, inputs: Tensor, output: Tensor) -> None:
        layer: Any = model.get_submodule(name)
        size = _energy(applied(layer, type(layer), inputs, layer.weight, None)) or 1.0
        for place, gap in enumerate(gaps[name]):
            moved = applied(layer, type(layer), inputs, gap, None)
            found[name][place] += _energy(moved) / size

    with capture(model, gaps, see):
        call(model, batch)
    return found


def _gap(model: nn.Module, edit: Quantize, values: Values) -> Tensor:
    level = rounded(values.weight, values.scales[values.index], edit.bits)
    return _weight(model, edit.layer) - level


def _weight(model: nn.Module, name: str) -> Tensor:
    layer: Any = model.get_submodule(name)
    found: Tensor = layer.weight.detach()
    return found


def _energy(values: Tensor) -> float:
    return float(values.square().sum())
