"""Space-time tensors: linear layers become sums of outer products over the modes of their input."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from torch import Tensor, nn

from pliant.cost import call
from pliant.edits import Swap
from pliant.errors import ModelError
from pliant.method import Method
from pliant.nn.tensors import CPLinear
from pliant.observe.order import order
from pliant.observe.watch import capture
from pliant.registry import In, Paper, register
from pliant.run import Run


@register(
    "space_time_tensor",
    paper=Paper(
        "Space-Time Domain Tensor Neural Networks: An Application on Human Pose Classification",
        "K. Makantasis, A. Voulodimos, A. Doulamis, N. Doulamis, N. Bakalos",
        "ICPR",
        2020,
        "https://arxiv.org/abs/2004.08153",
    ),
)
@dataclass(frozen=True)
class SpaceTimeTensor(Method):
    """Makes the weights of linear layers sums of a few outer products, one factor for each mode.

    What a flattened map or sequence goes into keeps its modes, such as channels, height and width;
    other inputs are divided in two as evenly as can be. Factors begin near to the weight, at the
    nearest where there are two modes. That saves parameters and not multiply-accumulates; with
    ``fold="macs"`` a layer is multiplied out at the end where it takes fewer so. What would not
    become smaller is left alone. The whole network for sequences is ``pliant.zoo.build("stdtnn")``.

    *Departs from the paper*: it is a network there, and no way to change one. All weights train
    together; the released code of a sister method trains one factor after the other.

    >>> SpaceTimeTensor(rank=4).fold
    'params'
    """

    rank: Annotated[int, In(1, 4096)] = 1  # R, outer products of each output
    # what is kept at the end: factors, which have fewer weights, or what takes fewer products
    fold: Literal["params", "macs"] = "params"
    only: tuple[str, ...] = ()  # name patterns of the layers to take
    exclude: tuple[str, ...] = ()  # name patterns of the layers to leave alone

    def prepare(self, run: Run) -> None:
        """Put the factors in."""
        layers, reasons = run.readable(self.only, self.exclude)
        modes = _flattened(run, [name for name, layer in layers.items() if _linear(layer)])
        swaps = []
        for name, layer in layers.items():
            shape = modes.get(name) or _halves(layer)
            if reason := _obstacle(layer, shape, self.rank):
                reasons[name] = reason
            else:
                spec = {"shape": shape, "rank": self.rank}
                swaps.append(Swap(name, "cp", spec, run.seed))
        if not swaps:
            raise ModelError(
                "space_time_tensor needs linear layers that become smaller as outer products, but "
                "the model has none that it may take: see rank, only and exclude."
            )
        for name, reason in reasons.items():
            run.keep(name, reason)
        run.apply(*swaps)
        run.state["layers"] = [swap.layer for swap in swaps]

    def finalize(self, run: Run) -> None:
        """Multiply out what takes fewer products so."""
        for name in run.state["layers"] if self.fold == "macs" else ():
            layer = run.model.get_submodule(name)
            if isinstance(layer, CPLinear):
                spec = {"bias": layer.bias is not None}
                row = run.planner.rows()[name]
                edit = Swap(name, "cp_dense", spec)
                if edit.predict(row).macs < row.macs:
                    run.apply(edit)


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
    return {
        name: shape
        for name, shape in found.items()
        if 2 <= len(shape) <= 8 and math.prod(shape) == run.model.get_submodule(name).in_features
    }


def _halves(layer: Any) -> tuple[int, ...]:
    """Divide what a layer reads in two, as evenly as can be."""
    count = layer.in_features if _linear(layer) else 1
    side = next(s for s in range(math.isqrt(count), 0, -1) if count % s == 0)
    return side, count // side


def _linear(layer: Any) -> bool:
    return type(layer) is nn.Linear


def _obstacle(layer: Any, shape: tuple[int, ...], rank: int) -> str:
    """Say why a layer is left alone; nothing if it is not."""
    if not _linear(layer):
        return "not a Linear"
    if rank * sum(shape) >= layer.in_features:
        return "outer products would have as many weights"
    return ""
