"""Calibration only: factorize a trained network without labels and without training."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from bench import tasks
from bench.claim import judged
from bench.compress import described, scored
from bench.experiments import Cell, Cells, Table, by_seed, paired, values
from bench.stats import mean, plus_minus, spread
from pliant.budget import Budget
from pliant.compose import resolve
from pliant.registry import construct, plain
from pliant.run import start

Settings = Mapping[str, Any]
DENSE = "dense"


def cells(settings: Settings) -> list[Cell]:
    """List all measurements: task by task, the dense network first."""
    rows = []
    for task in settings["tasks"]:
        shared = tasks.plan({**settings, "task": task})
        rows.append(Cell({"task": task, "rival": DENSE}, shared))
        rows += [
            Cell(
                {"task": task, "rival": name, "budget": budget, "seed": seed},
                {**shared, "budget": {"params": budget}, "method": plain(resolve(spec))},
            )
            for seed in settings["seeds"]
            for budget in settings["budgets"]
            for name, spec in settings["rivals"].items()
        ]
    return rows


def measure(cell: Cell, watch: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Factorize once and score; the seconds are those of the method alone."""
    plan = cell.plan
    model, data = tasks.base(plan, watch), tasks.data_of(plan)
    if cell.key["rival"] == DENSE:
        return scored(model, data)
    method, budget = construct(**plan["method"]), Budget(**plan["budget"])
    began = time.monotonic()
    run = start(model, method, budget, data=data, seed=cell.key["seed"])
    run.finish()
    seconds = time.monotonic() - began
    return {**scored(model, data), "layers": described(run.edits), "seconds": round(seconds, 2)}


def claims(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Say how far all levers together stay from the dense network, and that all are needed."""
    asked = settings["claims"]
    rows = [
        _gap(cells, task, asked["champion"], float(budget), most)
        for task, gaps in asked["gap_to_dense"].items()
        for budget, most in gaps.items()
    ]
    return rows + [
        _lead(cells, task, asked["champion"], lever, budget)
        for task in settings["tasks"]
        for budget in settings["budgets"]
        for lever in settings["rivals"]
        if lever != asked["champion"]
    ]


def summary(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Give mean and standard deviation over the seeds, a row per task, rival and budget."""
    keys = list(
        dict.fromkeys(tuple(c["key"].get(k) for k in ("task", "rival", "budget")) for c in cells)
    )
    rows = []
    for task, rival, budget in keys:
        row: dict[str, Any] = {"task": task, "rival": rival, "budget": budget}
        for name in ("accuracy", "params", "macs", "seconds"):
            found = _of(cells, name, task, rival, budget)
            if found:
                row[name] = {"mean": mean(found), "sd": spread(found), "seeds": len(found)}
        rows.append(row)
    return rows


def tables(settings: Settings, cells: Cells) -> list[Table]:
    """Give one table of accuracies per task, with the seconds of each rival."""
    return [_table(settings, cells, task) for task in settings["tasks"]]


def _of(cells: Cells, name: str, task: str, rival: str, budget: float | None) -> list[float]:
    key = {"task": task, "rival": rival}
    return values(cells, name, **(key if rival == DENSE else key | {"budget": budget}))


def _gap(cells: Cells, task: str, champion: str, budget: float, most: float) -> dict[str, Any]:
    dense = by_seed(cells, "accuracy", task=task, rival=DENSE)
    own = by_seed(cells, "accuracy", task=task, rival=champion, budget=budget)
    text = f"{task} at {budget:.0%} of the parameters, untrained, is within {most} of dense"
    return judged(text, [-gap for gap in paired(own, dense, 100)], "<=", most, "points")


def _lead(cells: Cells, task: str, champion: str, lever: str, budget: float) -> dict[str, Any]:
    own, other = (
        by_seed(cells, "accuracy", task=task, rival=name, budget=budget)
        for name in (champion, lever)
    )
    text = f"{task} at {budget:.0%}: {champion} beats {lever} alone"
    return judged(text, paired(own, other, 100), ">", 0, "points")


def _table(settings: Settings, cells: Cells, task: str) -> Table:
    budgets = settings["budgets"]
    head = ["levers", "method", *(f"{budget:.0%} of params" for budget in budgets), "seconds"]
    rows = []
    for name, spec in settings["rivals"].items():
        accuracies = [
            plus_minus([100 * v for v in _of(cells, "accuracy", task, name, budget)])
            for budget in budgets
        ]
        spent = [v for budget in budgets for v in _of(cells, "seconds", task, name, budget)]
        rows.append([name, f"`{spec}`", *accuracies, f"{mean(spent):.1f}" if spent else ""])
    dense = plus_minus([100 * v for v in _of(cells, "accuracy", task, DENSE, None)])
    rows.append([DENSE, "", *[dense] * len(budgets), ""])
    return Table(f"{task}, accuracy in %, no training", head, rows)
