"""One elastic training beside as many separate compressions as it has sizes."""

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import tasks
from bench.claim import claim
from bench.compress import compress, scored
from bench.experiments import Cell, Cells, Table, pick, values
from bench.stats import mean, plus_minus
from pliant import artifact, load, zoo
from pliant.budget import Budget
from pliant.compose import resolve
from pliant.data import Data, Train
from pliant.drivers.loop import fit
from pliant.registry import construct, plain
from pliant.run import start

Settings = Mapping[str, Any]
Watch = Callable[[dict[str, Any]], None]
BASE, ELASTIC, APART = "base", "elastic", "apart"


def cells(settings: Settings) -> list[Cell]:
    """List the dense network, the elastic one and the separate ones."""
    shared = tasks.plan(settings)
    train = asdict(Train(epochs=settings["epochs"], **settings["train"]))
    spec = f"elastic(sizes={settings['sizes']}, smallest={settings['smallest']})"
    rows = [Cell({"rival": BASE}, shared)]
    for seed in settings["seeds"]:
        plan = {**shared, "train": train, "budget": settings["budget"]}
        method = {"method": plain(resolve(spec)), "budgets": budgets(settings)}
        rows.append(Cell({"rival": ELASTIC, "seed": seed}, {**plan, **method}))
        for budget in budgets(settings):
            key = {"rival": APART, "budget": budget, "seed": seed}
            own = {"method": plain(resolve(settings["rival"])), "budget": budget}
            rows.append(Cell(key, {**plan, **own}))
    return rows


def budgets(settings: Settings) -> list[float]:
    """Give the shares of the parameters, from the largest."""
    largest, count = settings["budget"], settings["sizes"]
    fall = (1 - settings["smallest"]) / (count - 1)
    return [round(largest * (1 - fall * step), 4) for step in range(count)]


def measure(cell: Cell, watch: Watch) -> dict[str, Any]:
    """Measure one cell."""
    plan = cell.plan
    model, data = tasks.base(plan, watch), tasks.data_of(plan)
    if cell.key["rival"] == BASE:
        return scored(model, data)
    train, method = Train(**plan["train"]), construct(**plan["method"])
    seed = cell.key["seed"]
    if cell.key["rival"] == APART:
        budget = {"params": plan["budget"]}
        return compress(model, data, method, budget, train, seed=seed, watch=watch)
    began = time.monotonic()
    steps = train.steps(data.steps(train.batch))
    run = start(model, method, Budget(params=plan["budget"]), data=data, steps=steps, seed=seed)
    fit(run, data, train, watch=watch)
    run.finish()
    seconds = round(time.monotonic() - began, 2)
    with tempfile.TemporaryDirectory() as folder:
        path = artifact.save(Path(folder) / "elastic.pliant", run.model, run.edits)
        found = [_cut(path, plan, share, data) for share in plan["budgets"]]
        size = path.stat().st_size
    return {"sizes": found, "steps": steps, "seconds": seconds, "file_bytes": size}


def _cut(path: Path, plan: Mapping[str, Any], share: float, data: Data) -> dict[str, Any]:
    """Load a size and score it."""
    began = time.monotonic()
    model = load(path, lambda: zoo.build(plan["network"]), at=share)
    took = round(1000 * (time.monotonic() - began), 1)
    return {"budget": share, **scored(model, data), "load_ms": took}


def claims(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Say how far each size is behind its own training, and what all of them cost."""
    asked, rows = settings["claims"], []
    for budget in budgets(settings):
        one, other = _accuracies(settings, cells, budget)
        gap = 100 * (other - one) if one is not None and other is not None else None
        text = f"At {budget:.0%} of the parameters, elastic is behind a training of its own by"
        rows.append(claim(text, gap, "<=", asked["gap"], "points"))
    for name, what in (("steps", "optimizer steps"), ("seconds", "seconds")):
        spent = _spent(settings, cells, name)
        text = f"Share of the {what} of {settings['sizes']} trainings that one elastic one takes"
        rows.append(claim(text, spent, "<=", asked[name], "x"))
    return rows


def summary(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Give mean accuracies by size."""
    rows = []
    for budget in budgets(settings):
        one, other = _accuracies(settings, cells, budget)
        rows.append({"budget": budget, ELASTIC: one, APART: other})
    return rows


def tables(settings: Settings, cells: Cells) -> list[Table]:
    """Give the curve of both."""
    head = ["parameters allowed", "elastic: parameters", "accuracy, %", "load, ms"]
    head += ["apart: parameters", "accuracy, %"]
    rows = []
    for budget in budgets(settings):
        sizes, apart = _sizes(cells, budget), {"rival": APART, "budget": budget}
        rows.append(
            [
                f"{budget:.0%}",
                f"{mean([row['params'] for row in sizes]) or 0:,.0f}",
                plus_minus([100 * row["accuracy"] for row in sizes]),
                f"{mean([row['load_ms'] for row in sizes]) or 0:.0f}",
                f"{mean(values(cells, 'params', **apart)) or 0:,.0f}",
                plus_minus([100 * each for each in values(cells, "accuracy", **apart)]),
            ]
        )
    dense = plus_minus([100 * each for each in values(cells, "accuracy", rival=BASE)])
    took = [mean(values(cells, "seconds", rival=rival)) or 0 for rival in (ELASTIC, APART)]
    title = f"Dense: {dense}; one elastic training {took[0]:.0f} s, each of the others"
    return [Table(f"{title} {took[1]:.0f} s", head, rows)]


def _sizes(cells: Cells, budget: float) -> list[dict[str, Any]]:
    found = [cell["values"]["sizes"] for cell in pick(cells, rival=ELASTIC)]
    return [row for rows in found for row in rows if row["budget"] == budget]


def _accuracies(
    settings: Settings, cells: Cells, budget: float
) -> tuple[float | None, float | None]:
    one = mean([row["accuracy"] for row in _sizes(cells, budget)])
    return one, mean(values(cells, "accuracy", rival=APART, budget=budget))


def _spent(settings: Settings, cells: Cells, name: str) -> float | None:
    one = values(cells, name, rival=ELASTIC)
    others = values(cells, name, rival=APART)
    whole = len(others) == settings["sizes"] * len(settings["seeds"])
    return sum(one) / sum(others) if one and whole else None
