"""Chooses how each layer is written: the same for all, or so that a budget of bytes is met."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pliant.budget import Option
from pliant.edits import Edit, Pack, Quantize
from pliant.edits.pack import flat
from pliant.edits.quantize import MOST
from pliant.errors import nothing_for
from pliant.families.quantize.layers import Layers
from pliant.math.quantize import Grouping
from pliant.nn import kinds
from pliant.nn.several import shapes_of
from pliant.observe.ranges import unread
from pliant.run import Run

CHOICES = (8, 4, 3, 2)  # bits among which a budget chooses
RANGE = 8  # bytes of a scale and a zero point

Choices = Mapping[str, Sequence[Edit]]


@dataclass(frozen=True)
class Written:
    """How the numbers of a network are to be written.

    Args:
        bits: of a weight, without a budget.
        activations: bits of what layers read; 0 leaves it in floating point.
        ends: bits of both in the first and the last layer that read numbers.
        rows: bits of the rows of tables; 0 leaves them alone.
        groups: scales of a layer; 0 is one for every channel.
        grouping: which channels share one.
        integer: whether what sums read is rounded too.
    """

    bits: int
    activations: int
    ends: int
    rows: int
    groups: int
    grouping: Grouping
    integer: bool

    def ways(self, run: Run, layers: Layers) -> dict[str, list[Edit]]:
        """Return the ways to write each layer that is not tied to one before it.

        Raises:
            ModelError: there is no layer that packing makes smaller.
        """
        bits = CHOICES if run.limits() else (self.bits,)
        found: dict[str, list[Edit]] = {}
        reasons = dict(layers.reasons)
        sums = unread(run.model, layers.reading, run.example)[:-1] if self.integer else []
        for name, layer in (layers.single | layers.several).items():
            table = kinds.kind_of(layer) in kinds.TABLE
            if table and not self.rows:
                reasons[name] = "rows of tables were to stay in floating point: see rows"
            elif name in layers.several:
                own = (self.rows,) if table and not run.limits() else bits
                found[name] = [self._several(name, layer, width) for width in own]
            elif name not in layers.tied:
                own = (self.rows or self.ends,) if name not in layers.reading else bits
                own = (self.ends,) if name in self._ends(layers) else own
                own = bits if run.limits() and name not in layers.reading else own
                found[name] = [self._single(name, layer, w, layers, sums) for w in own]
        return smaller(run, found, reasons)

    def plan(
        self, run: Run, layers: Layers, ways: Choices, scores: Mapping[str, Sequence[float]]
    ) -> dict[str, Edit]:
        """Take a way for each layer, then those that are tied in the way of their source.

        Args:
            run: has the budget.
            layers: of its network.
            ways: to write each layer.
            scores: how much each way changes what the layer gives; none where nothing is chosen.

        Raises:
            BudgetError: no choice meets the budget.
        """
        extra: dict[str, int] = {}
        for name, source in layers.tied.items():
            extra[source] = extra.get(source, 0) + RANGE * (self._inputs(name, layers) > 0)
        plan = spent(run, ways, scores, extra)
        for name, source in layers.tied.items():
            first = plan.get(source)
            if isinstance(first, Quantize):
                plan[name] = replace(
                    first, layer=name, inputs=self._inputs(name, layers), outputs=0, source=source
                )
            else:
                run.keep(name, f"its weight is tied to {source}, which is not packed")
        return plan

    def _single(
        self, name: str, layer: Any, bits: int, layers: Layers, sums: Sequence[str]
    ) -> Quantize:
        channels = len(kinds.to_rows(layer, layer.weight))
        groups = min(self.groups or channels, channels)
        indexed = self.grouping != "contiguous" and 1 < groups < channels
        outputs = MOST if name in sums else 0
        return Quantize(name, bits, groups, indexed, self._inputs(name, layers), outputs)

    def _several(self, name: str, layer: Any, bits: int) -> Pack:
        shapes = tuple(flat(shapes_of(layer)))
        return Pack(name, bits, self.groups, self.grouping != "contiguous", shapes)

    def _inputs(self, name: str, layers: Layers) -> int:
        """Bits of what a layer reads."""
        if not self.activations or name not in layers.reading:
            return 0
        return self.ends if name in self._ends(layers) else self.activations

    def _ends(self, layers: Layers) -> tuple[str, ...]:
        return (layers.reading[0], layers.reading[-1]) if layers.reading else ()


def smaller(run: Run, ways: Choices, reasons: dict[str, str]) -> dict[str, list[Edit]]:
    """Keep the ways to write a layer that make it smaller, and record why others are left alone.

    Args:
        run: counts, and keeps the reasons.
        ways: of every layer, in order.
        reasons: why other layers stay; added to.

    Raises:
        ModelError: no layer is left.
    """
    costs, found = run.planner.rows(), {}
    for name, edits in ways.items():
        if fit := [e for e in edits if e.predict(costs[name]).bytes < costs[name].bytes]:
            found[name] = fit
        else:
            reasons[name] = "packed it would take more bytes"
    run.keep_all(reasons)
    if not found:
        needs = "a convolution, a Linear, an Embedding, a recurrent layer or attention"
        raise nothing_for(f"layer to quantize: it needs {needs}", reasons)
    return found


def spent(
    run: Run, ways: Choices, scores: Mapping[str, Sequence[float]], extra: Mapping[str, int]
) -> dict[str, Edit]:
    """Take the only way of each layer, or spend the budget where it does least harm.

    Args:
        run: has the budget.
        ways: to write each layer.
        scores: how much each way changes what the layer gives.
        extra: bytes that a layer brings with it, whichever way is taken.

    Raises:
        BudgetError: no choice meets the budget.
    """
    if not run.limits():
        return {name: edits[0] for name, edits in ways.items()}
    costs, options = run.planner.rows(), {}
    for name, edits in ways.items():
        predicted = [edit.predict(costs[name]) for edit in edits]
        whole = [replace(row, bytes=row.bytes + extra.get(name, 0)) for row in predicted]
        options[name] = [Option(*row) for row in zip(scores[name], whole, edits, strict=True)]
    return {edit.layer: edit for edit in run.planner.allocate(options, rule="sum")}
