"""The modes of what linear layers read: channels, height and width before it was flattened."""

from __future__ import annotations

import math

from torch import Tensor, nn

from pliant.cost import call
from pliant.observe.order import order
from pliant.observe.watch import capture
from pliant.run import Run


def modes_of(run: Run) -> dict[str, tuple[int, ...]]:
    """Return the modes of the input of every Linear, two or more, whose product it is.

    What comes from an ``nn.Flatten`` keeps its modes, those of size 1 left out; the rest is
    divided in two as evenly as can be.

    Args:
        run: of the network.
    """
    run.unwrap()  # which brings linear layers to light
    linear = {n: m for n, m in run.model.named_modules() if type(m) is nn.Linear}
    flat = _flattened(run, list(linear))
    return {
        name: shape if math.prod(shape) == layer.in_features else _halves(layer.in_features)
        for name, layer in linear.items()
        for shape in (flat.get(name, ()),)
    }


def _flattened(run: Run, names: list[str]) -> dict[str, tuple[int, ...]]:
    """Return the modes, those of size 1 left out, of what a layer reads from an ``nn.Flatten``."""
    flat = [name for name, part in run.model.named_modules() if isinstance(part, nn.Flatten)]
    shapes: dict[str, tuple[int, ...]] = {}

    def see(name: str, given: Tensor, output: Tensor) -> None:
        shapes[name] = tuple(size for size in given.shape[1:] if size > 1)

    with capture(run.model, flat, see):
        call(run.model, run.example)
    reads = order(run.model, run.example, [*names, *flat]).reads if flat else {}
    found = {name: shapes.get(reads.get(name, ""), ()) for name in names}
    return {name: shape for name, shape in found.items() if 2 <= len(shape) <= 8}


def _halves(count: int) -> tuple[int, int]:
    """Divide a number in two factors, as even as can be."""
    side = next(s for s in range(math.isqrt(count), 0, -1) if count % s == 0)
    return side, count // side
