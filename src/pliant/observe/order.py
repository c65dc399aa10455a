"""In which order a network calls its layers, and which of them reads which."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from pliant.cost import Example, call
from pliant.observe.watch import capture


@dataclass(frozen=True)
class Order:
    """What one forward pass did.

    Args:
        called: the layers that were called, in the order of their first calls.
        reads: for every one of them the layer whose output it reads directly, at every call;
            "" where something stands between, or where that differs from call to call.
    """

    called: tuple[str, ...]
    reads: dict[str, str]


def order(model: nn.Module, example: Example, layers: Sequence[str]) -> Order:
    """Follow one forward pass through layers that read one tensor and return one.

    An activation that works in place stands between two layers as any other does.
    """
    made: list[tuple[str, Tensor, int]] = []  # held, so that no tensor takes another's place
    reads: dict[str, str] = {}

    def see(name: str, given: Tensor, output: Tensor) -> None:
        source = next((n for n, t, at in made if t is given and at == t._version), "")
        reads[name] = source if reads.get(name, source) == source else ""
        made.append((name, output, output._version))

    with capture(model, layers, see):
        call(model, example)
    return Order(tuple(reads), reads)


def called_by(model: nn.Module, layers: Iterable[str], batches: Iterable[Example]) -> set[str]:
    """Return the layers that forward passes call with at least one row."""
    found: set[str] = set()

    def see(name: str, inputs: Tensor | None, output: Tensor) -> None:
        if inputs is None or inputs.numel():
            found.add(name)

    with capture(model, layers, see):
        for batch in batches:
            call(model, batch)
    return found
