"""Ranks searched in training beside those read off once, at equal parameters and equal epochs.

The rivals of `bench.experiments.lowrank`, in another order: the dense control comes last, and the
claims name several champions.
"""

from collections.abc import Callable, Mapping
from typing import Any

from bench.experiments import Cell, Cells, Table, lowrank, pick
from bench.experiments.lowrank import DENSE

Settings = Mapping[str, Any]
SHOWN = 8  # moments of a training in the table of ranks


def cells(settings: Settings) -> list[Cell]:
    """List all measurements, all of the first seed first, the dense control behind its rivals."""
    rows = lowrank.cells(settings)
    return sorted(rows, key=lambda row: (row.key.get("seed", -1), row.key["rival"] == DENSE))


def measure(cell: Cell, watch: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Measure one cell."""
    return lowrank.measure(cell, watch)


def claims(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Compare each champion with its rivals, and with the dense control."""
    rows: dict[str, dict[str, Any]] = {}
    for asked in settings["claims"]:
        for row in lowrank.claims({**settings, "claims": asked}, cells):
            rows[row["claim"]] = row  # that all have equal parameters is said once
    return list(rows.values())


def summary(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Give mean and standard deviation over the seeds, a row per rival and budget."""
    return lowrank.summary(settings, cells)


def tables(settings: Settings, cells: Cells) -> list[Table]:
    """Give accuracies, sizes and seconds, and the ranks of the first seed as training went on."""
    found = lowrank.tables(settings, cells)
    first = settings["seeds"][0]
    for budget in settings["budgets"]:
        for rival in settings["followed"]:
            for cell in pick(cells, rival=rival, budget=budget, seed=first):
                found.append(_ranks(f"{rival} at {budget:.0%}, seed {first}", cell["values"]))
    return found


def _ranks(title: str, values: Mapping[str, Any]) -> Table:
    """Ranks layer by layer at some of the moments at which they were noted."""
    rows = values["ranks"]
    kept = rows[:: max(1, -(-len(rows) // SHOWN))]
    if rows and kept[-1] is not rows[-1]:
        kept = [*kept, rows[-1]]
    layers = list(dict.fromkeys(name for row in kept for name in row["ranks"]))
    head = ["layer", *(f"step {row['step']}" for row in kept), "in the end"]
    body = [
        [name, *(_written(row["ranks"].get(name)) for row in kept), values["layers"].get(name, "")]
        for name in layers
    ]
    return Table(f"Ranks of {title}", head, body)


def _written(ranks: list[Any] | None) -> str:
    return "dense" if ranks is None else " ".join(map(str, ranks))
