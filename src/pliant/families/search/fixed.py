"""Operations that are put into a network of cells by hand: where they can stand, which ones pay."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Literal

from pliant.cost import LayerCost, module_cost
from pliant.edits import Insert
from pliant.nn.cells import Cell, CellNetwork
from pliant.run import Run

Fixed = Literal["se", "cbam", "eca", "res3"]
Point = Literal["stem", "cells", "reductions", "nodes"]
Candidate = tuple[Fixed, Point]
MENU: tuple[Candidate, ...] = tuple(
    (op, point)
    for op in ("se", "cbam", "eca", "res3")
    for point in ("stem", "cells", "reductions", "nodes")
)


def places(network: CellNetwork, point: Point) -> list[str]:
    """Name the rows of a network into which operations of a point go."""
    if point == "stem":
        return ["stem"]
    found = []
    for number, cell in enumerate(network.cells):
        assert isinstance(cell, Cell)
        if point == "nodes":
            found += [f"cells.{number}.nodes.{node}" for node in range(len(cell.nodes))]
        elif point == "cells" or cell.reduction:
            found.append(f"cells.{number}.after")
    return found


def insertions(run: Run, op: Fixed, point: Point, reduction: int) -> dict[Insert, LayerCost]:
    """Return the edits that put an operation at all places of a point, and what is there now.

    Args:
        run: whose network is made of cells.
        op: the name of the operation.
        point: where it stands.
        reduction: channels for each hidden feature of a gate, where it has such.
    """
    assert isinstance(run.model, CellNetwork)
    whole, found = module_cost(run.model, run.example, ""), {}
    for name in places(run.model, point):
        row = whole
        for child in name.split("."):
            row = dict(row.parts)[child]
        spec = {"channels": row.output[0]}
        if op in ("se", "cbam"):
            spec["reduction"] = reduction
        found[Insert(name, op, spec, seed=run.seed)] = row
    return found


def select(
    score: Callable[[tuple[Candidate, ...]], float],
    growth: Callable[[tuple[Candidate, ...]], float],
    base: Sequence[float],
    *,
    menu: Sequence[Candidate] = MENU,
    rounds: int = 3,
    most: float = 0.1,
    dear: float = 1.0,
) -> tuple[Candidate, ...]:
    """Choose operations one after the other, each the best that adds more than chance does.

    Score them on samples that are in neither the training nor the test split.

    Args:
        score: trains the network with some of the menu for a while, from the same weights, and
            returns its accuracy.
        growth: returns by which share of the parameters some of the menu makes it larger.
        base: accuracies of the network without any, for several seeds: twice their standard
            deviation is what an operation must add at least.
        menu: to choose from.
        rounds: operations at most.
        most: growth at most.
        dear: mu, by how much growth lessens what an operation adds.

    Returns:
        What was chosen, in order; nothing if nothing adds enough.
    """
    chosen: tuple[Candidate, ...] = ()
    reached, chance = statistics.mean(base), 2 * statistics.stdev(base)
    for _ in range(rounds):
        tried = [(*chosen, one) for one in menu if one not in chosen]
        scores = {each: score(each) for each in tried if growth(each) <= most}
        worth = {each: (s - reached) / (1 + dear * growth(each)) for each, s in scores.items()}
        if not worth:
            break
        best = max(worth, key=worth.__getitem__)
        if scores[best] - reached <= chance:
            break
        chosen, reached = best, scores[best]
    return chosen
