"""FT-DARTS: puts fixed operations into the network that a search has found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from pliant.cost import LayerCost
from pliant.edits import Insert
from pliant.errors import BudgetError, MethodError
from pliant.families.search.fixed import Fixed, Point, insertions
from pliant.method import Method
from pliant.nn.cells import CellNetwork
from pliant.registry import In, Paper, register
from pliant.run import Run


@register(
    "fine_tuned_darts",
    paper=Paper(
        "Fine-Tuning DARTS for Image Classification",
        "M. S. Tanveer, M. U. K. Khan, C.-M. Kyung",
        "ICPR",
        2020,
        "https://arxiv.org/abs/2006.09042",
    ),
)
@dataclass(frozen=True)
class FineTunedDARTS(Method):
    """Adds operations that no search weighs to a network of cells, and trains all of it.

    They take no part in the choice among candidates, so what the search approximates does not
    touch them. Each begins as next to nothing: a gate multiplies all features by one number just
    below 1, a residual adds zeros. The network gets a little larger. Give it what ``edarts`` has
    found, ``chain("edarts", "fine_tuned_darts")``, or a published cell such as
    ``zoo.build("darts-v2")``.

    *Measured* (bench ``search-family``: CIFAR-10 of 16 x 16 pixels, a published cell, six
    epochs, three seeds): 38.6 ± 0.3 % beside 38.2 ± 1.2 % of the cell as it was, and 40.0 ± 1.1 %
    of the cell with more channels, which has 1.16 times the parameters and 1.45 times the products.
    So its gain is not beyond doubt, and it trailed the wider cell; a forward pass took 0.091 ms
    beside 0.079 ms in onnxruntime, and 0.149 ms of the wider one.

    *Departs from the paper*: which operations it adds, and where, is not known here; the menu,
    the places and the default are ours. `families.search.fixed.select` chooses from the menu by
    trainings of yours. Operations that change how maps are pooled cannot begin as nothing, and
    are left out.
    """

    op: Fixed = "se"  # a gate over channels, two kinds of attention, or a depthwise residual
    point: Point = "cells"  # behind the stem, every cell, those that reduce, or every node
    reduction: Annotated[int, In(1)] = 32  # r, channels for each hidden feature of a gate
    growth: Annotated[float, In(0)] = 0.1  # of the parameters, at most

    def refuse(self, run: Run) -> None:
        if not isinstance(run.model, CellNetwork):
            raise MethodError(
                "fine_tuned_darts adds operations to a network of cells, not to a "
                f"{type(run.model).__name__}: begin with pliant.zoo.build('darts-v2')."
            )
        added = self._added(insertions(run, self.op, self.point, self.reduction))
        allowed = self.growth * run.cost.params
        if added > allowed:
            raise BudgetError(
                f"fine_tuned_darts adds {added:,} parameters here, but growth={self.growth} allows "
                f"{allowed:,.0f}: take a larger reduction, fewer places or another operation."
            )

    def prepare(self, run: Run) -> None:
        for layer in run.layers:
            run.keep(layer, "it stays as the search has found it")
        edits = insertions(run, self.op, self.point, self.reduction)
        run.note(added=self._added(edits))
        run.apply(*edits)

    def _added(self, edits: Mapping[Insert, LayerCost]) -> int:
        """Count the parameters that come."""
        return sum(edit.predict(row).params - row.params for edit, row in edits.items())
