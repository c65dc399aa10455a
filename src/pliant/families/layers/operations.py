"""What layers do for one sample, where they trade multiplications for something else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from pliant.cost import Example, call
from pliant.observe.watch import capture


@runtime_checkable
class Counted(Protocol):
    """A layer that says what it does."""

    def operations(self, outputs: int, inputs: int) -> dict[str, int]:
        """Count by kinds of operations, from the numbers that it gives and reads."""


def operations(model: nn.Module, example: Example) -> dict[str, int]:
    """Sum what the layers that say so do for one sample, by kinds of operations.

    Args:
        model: any module.
        example: inputs of one forward call; layers see its first rows as they come.
    """
    layers = {name: part for name, part in model.named_modules() if isinstance(part, Counted)}
    found: Counter[str] = Counter()

    def see(name: str, given: Tensor, output: Tensor) -> None:
        found.update(layers[name].operations(output[0].numel(), given[0].numel()))

    with capture(model, layers, see):
        call(model, example)
    return dict(found)


def of_convolution(outputs: int, taps: int) -> dict[str, int]:
    """Count what a convolution does: a product and a sum for each tap of each output."""
    return {"multiplications": outputs * taps, "additions": outputs * taps}


def gates(done: Mapping[str, int], table: Mapping[str, float]) -> float:
    """Return what operations take in logic gates.

    Args:
        done: operations by kind, as `operations` counts them.
        table: gates of one unit of each kind, which are those of a certain hardware and number
            format.

    >>> gates({"multiplications": 2, "additions": 3}, {"multiplications": 10, "additions": 1})
    23
    """
    return sum(count * table[kind] for kind, count in done.items() if count)
