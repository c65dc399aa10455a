"""One elastic training beside as many separate compressions as it has sizes."""

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench import tasks
from bench.claim import claim, judged
from bench.compress import compress, scored
from bench.experiments import Cell, Cells, Table, by_seed, paired, pick, values
from bench.stats import mean, plus_minus
from pliant import load, zoo
from pliant.budget import Budget
from pliant.compose import resolve
from pliant.data import Data, Train
from pliant.drivers.loop import fit
from pliant.files import artifact
from pliant.registry import construct, plain
from pliant.run import start

Settings = Mapping[str, Any]
Watch = Callable[[dict[str, Any]], None]
BASE = "base"
TAUGHT = "elastic, taught"
PAIRS = {"elastic": "apart", TAUGHT: "apart, taught"}  # one training, and eight


def cells(settings: Settings) -> list[Cell]:
    """List the dense network, the elastic ones and the separate ones."""
    shared, train = tasks.plan(settings), Train(epochs=settings["epochs"], **settings["train"])
    rows = [Cell({"rival": BASE}, shared)]
    for name, times in _trainings(settings).items():
        spec = f"elastic(sizes={settings['sizes']}, smallest={settings['smallest']}"
        spec += ', learn_from="dense")' if name != "elastic" else ")"
        own = replace(train, epochs=times * train.epochs)
        plan = {**shared, "train": asdict(own), "method": plain(resolve(spec))}
        plan |= {"budget": settings["budget"], "budgets": budgets(settings)}
        rows += [Cell({"rival": name, "seed": seed}, plan) for seed in _seeds(settings, name)]
    for apart, name, times in _separate(settings):
        distill = settings["distill"] if name != "elastic" else 0.0
        own = replace(train, epochs=times * train.epochs, distill=distill)
        plan = {**shared, "train": asdict(own), "method": plain(resolve(settings["rival"]))}
        rows += [
            Cell({"rival": apart, "budget": budget, "seed": seed}, {**plan, "budget": budget})
            for seed in _seeds(settings, name)
            for budget in budgets(settings)
        ]
    return rows


def _trainings(settings: Settings) -> dict[str, int]:
    """Name the elastic trainings, and how many times as long as a separate one each is."""
    longer = {_long(TAUGHT, times): times for times in settings["longer"]}
    return {**dict.fromkeys(PAIRS, 1), **longer}


def _separate(settings: Settings) -> list[tuple[str, str, int]]:
    """Name the separate networks, the training that they stand beside, and how long they train."""
    rows = [(apart, name, 1) for name, apart in PAIRS.items()]
    longer = [(_long(PAIRS[TAUGHT], times), times) for times in settings["apart_longer"]]
    return rows + [(apart, _long(TAUGHT, times), times) for apart, times in longer]


def _long(name: str, times: int) -> str:
    return f"{name}, {times} x as long"


def _seeds(settings: Settings, name: str) -> list[int]:
    """Those of a pair; a longer training has the first only."""
    return list(settings["seeds"].get(name, settings["seeds"][TAUGHT][:1]))


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
    if "budget" in cell.key:
        budget, teacher = {"params": plan["budget"]}, tasks.base(plan) if train.distill else None
        return compress(model, data, method, budget, train, seed=seed, teacher=teacher, watch=watch)
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
    for name, apart in _beside(settings):
        for budget in budgets(settings):
            one = _by_seed(cells, name, budget, "accuracy")
            others = _apart(settings, cells, name, apart)
            gaps = paired(by_seed(others, "accuracy", budget=budget), one, 100)
            text = f"{name}: at {budget:.0%} of the parameters behind one trained {apart} by"
            rows.append(judged(text, gaps, "<=", asked["gap"], "points"))
    for name in PAIRS:
        for kind, what in (("steps", "optimizer steps"), ("seconds", "seconds")):
            text = f"{name}: share of the {what} of {settings['sizes']} trainings that one takes"
            rows.append(claim(text, _spent(settings, cells, name, kind), "<=", asked[kind], "x"))
    return rows


def summary(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Give mean accuracies by size."""
    rows = []
    for budget in budgets(settings):
        row: dict[str, Any] = {"budget": budget}
        for name in _trainings(settings):
            row[name] = mean(_elastic(cells, name, budget, "accuracy"))
        for apart, *_ in _separate(settings):
            row[apart] = mean(values(cells, "accuracy", rival=apart, budget=budget))
        rows.append(row)
    return rows


def tables(settings: Settings, cells: Cells) -> list[Table]:
    """Give the curves."""
    head = ["parameters allowed", "elastic: parameters", "accuracy, %", "load, ms"]
    head += ["apart: parameters", "accuracy, %"]
    dense = plus_minus([100 * each for each in values(cells, "accuracy", rival=BASE)])
    found = []
    for name, apart in _beside(settings):
        others = _apart(settings, cells, name, apart)
        rows = [_row(cells, name, others, budget) for budget in budgets(settings)]
        took = mean(values(cells, "seconds", rival=name)) or 0
        each = mean(values(others, "seconds")) or 0
        title = f"{name}: one training {took:.0f} s, each {apart} {each:.0f} s"
        found.append(Table(f"{title} (dense: {dense})", head, rows))
    return found


def _row(cells: Cells, name: str, apart: Cells, budget: float) -> list[str]:
    return [
        f"{budget:.0%}",
        f"{mean(_elastic(cells, name, budget, 'params')) or 0:,.0f}",
        plus_minus([100 * each for each in _elastic(cells, name, budget, "accuracy")]),
        f"{mean(_elastic(cells, name, budget, 'load_ms')) or 0:.0f}",
        f"{mean(values(apart, 'params', budget=budget)) or 0:,.0f}",
        plus_minus([100 * each for each in values(apart, "accuracy", budget=budget)]),
    ]


def _beside(settings: Settings) -> list[tuple[str, str]]:
    """Put the short separate networks beside each elastic training, and the long ones too."""
    rows = [(name, PAIRS.get(name, PAIRS[TAUGHT])) for name in _trainings(settings)]
    return rows + [(name, apart) for apart, name, times in _separate(settings) if times > 1]


def _apart(settings: Settings, cells: Cells, name: str, apart: str) -> Cells:
    """Pick separate networks beside an elastic one, of its own seeds."""
    seeds = _seeds(settings, name)
    return [c for c in pick(cells, rival=apart) if c["key"]["seed"] in seeds]


def _elastic(cells: Cells, name: str, budget: float, what: str) -> list[float]:
    return list(_by_seed(cells, name, budget, what).values())


def _by_seed(cells: Cells, name: str, budget: float, what: str) -> dict[int, float]:
    return {
        cell["key"]["seed"]: row[what]
        for cell in pick(cells, rival=name)
        for row in cell["values"]["sizes"]
        if row["budget"] == budget
    }


def _spent(settings: Settings, cells: Cells, name: str, kind: str) -> float | None:
    one, others = (values(cells, kind, rival=rival) for rival in (name, PAIRS[name]))
    whole = len(others) == settings["sizes"] * len(_seeds(settings, name))
    return sum(one) / sum(others) if one and whole else None
