"""What a penalty in training is worth to ranks: strengths, spaces and ways to read them off.

One training under a penalty is searched once and then factorized in every way, from the same
weights: only what happens before differs between penalties, only what happens after between ways.
Strengths are compared on images that are kept out of the training; the test images are looked at
for the tables.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from bench.claim import claim, judged
from bench.compress import compress
from bench.experiments import Cell, Cells, Table, fourway, paired, pick
from bench.small import seeded
from bench.stats import mean, plus_minus
from bench.tasks import get
from pliant import zoo
from pliant.compose import resolve
from pliant.data import Data, Train
from pliant.drivers.loop import evaluate
from pliant.errors import BudgetError
from pliant.math.rank import energy_rank
from pliant.observe.spectra import spectra

Settings = Mapping[str, Any]
NONE = "none"
ENERGY = 0.95  # at which ranks of the followed layer are given


def cells(settings: Settings) -> list[Cell]:
    """List the trainings, all penalties of one seed side by side."""
    kept = ("task", "train", "epochs", "search", "validation", "budgets", "ways", "follow")
    shared = {name: settings[name] for name in kept} | {"images": settings.get("images", {})}
    rows = []
    for seed in settings["seeds"]:
        for name, spec in settings["penalties"].items():
            ways = settings["ways"] | (settings["beside"] if name == NONE else {})
            plan = {**shared, "spec": spec, "ways": ways}
            rows.append(Cell({"penalty": name, "seed": seed}, plan))
    return rows


def measure(cell: Cell, watch: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Train under one penalty, then factorize a copy in every way and fine-tune it."""
    plan, seed = cell.plan, cell.key["seed"]
    data = _data(plan)
    model = seeded(seed, lambda: zoo.build(get(plan["task"]).network))
    train, moment = Train(**plan["train"], epochs=plan["epochs"]), fourway.Moment()
    method = fourway.Attached(resolve(plan["spec"].format(search=plan["search"])), moment)
    fourway.until_stopped(model, method, None, data, train, seed, watch)
    dense = moment.dense
    assert dense is not None
    tail = fourway.rest(train, data, moment.step, cell.key["penalty"])
    rows = []
    for way, spec in plan["ways"].items():
        for budget in plan["budgets"]:
            smaller, limit = copy.deepcopy(dense), {"params": budget}
            row = {"way": way, "budget": budget}
            try:
                found = compress(smaller, data, resolve(spec), limit, tail, seed=seed, watch=watch)
            except BudgetError as error:
                rows.append(row | {"refused": str(error)})
                continue
            kept = ("accuracy", "accuracy_before", "params", "layers", "seconds")
            row |= {name: found[name] for name in kept}
            rows.append(row | {"validation": evaluate(smaller, data, "val").accuracy})
    followed = spectra(dense.get_submodule(plan["follow"]).weight)  # type: ignore[arg-type]
    place = min(21, *(len(sigma) for sigma in followed.values())) - 1
    return {
        "rows": rows,
        "dense": evaluate(dense, data, "test").accuracy,
        "dense_validation": evaluate(dense, data, "val").accuracy,
        "ranks": {side: energy_rank(sigma, ENERGY) for side, sigma in followed.items()},
        "tail": max(float(sigma[place] / sigma[0]) for sigma in followed.values()),
        "step": moment.step,
    }


def claims(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Say what the penalty is worth, in each space at its chosen strength, and beside EVBMF."""
    asked, rows = settings["claims"], []
    for family in settings["families"]:
        name = chosen(settings, cells, family)
        for way in settings["ways"]:
            for budget in settings["budgets"]:
                for column, when in (("accuracy_before", "before"), ("accuracy", "after")):
                    text = f"{family} leads {NONE} at {budget:.0%}, {way}, {when} fine-tuning"
                    own = _of(cells, column, name, way, budget)
                    other = _of(cells, column, NONE, way, budget)
                    rows.append(judged(text, paired(own, other, 100), ">", 0, "points"))
    first = settings["families"][0]
    name = chosen(settings, cells, first)
    for rival in settings["beside"]:
        for way in settings["ways"]:
            for budget in settings["budgets"]:
                text = f"{first} leads {rival} at {budget:.0%}, {way}, after fine-tuning"
                own = _of(cells, "accuracy", name, way, budget)
                other = _of(cells, "accuracy", NONE, rival, budget)
                rows.append(judged(text, paired(own, other, 100), ">", 0, "points"))
    tails = [cell["values"]["tail"] for cell in pick(cells, penalty=asked["paper"])]
    text = f"{asked['paper']}: the 21st singular value of {settings['follow']} over the first"
    rows.append(claim(text, max(tails, default=None), "<=", asked["tail"], "x"))
    return rows


def summary(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Give means over seeds, and which strength validation images chose."""
    rows: list[dict[str, Any]] = [
        {"family": family, "chosen": chosen(settings, cells, family)}
        for family in settings["families"]
    ]
    for name in settings["penalties"]:
        for way in (*settings["ways"], *settings["beside"]):
            for budget in settings["budgets"]:
                row: dict[str, Any] = {"penalty": name, "way": way, "budget": budget}
                for column in ("accuracy_before", "accuracy", "validation", "params"):
                    row[column] = mean(list(_of(cells, column, name, way, budget).values()))
                if row["accuracy"] is not None:
                    rows.append(row)
    return rows


def tables(settings: Settings, cells: Cells) -> list[Table]:
    """Give accuracies after and before fine-tuning, on validation images, and the spectrum."""
    titles = {
        "accuracy": "Accuracy at the end, %",
        "accuracy_before": "Accuracy right after factorizing, %",
        "validation": "Accuracy at the end on validation images, by which strengths are chosen, %",
    }
    found = [_table(settings, cells, column, title) for column, title in titles.items()]
    return [*found, _spectrum(settings, cells)]


def chosen(settings: Settings, cells: Cells, family: str) -> str:
    """Return the strength with the best mean accuracy on validation images, over ways and budgets.

    The first one where nothing is measured.
    """
    names = [name for name in settings["penalties"] if name.startswith(family)]

    def score(name: str) -> float:
        found = [
            row["validation"]
            for cell in pick(cells, penalty=name)
            for row in cell["values"]["rows"]
            if row["way"] in settings["ways"] and "refused" not in row
        ]
        return mean(found) or 0.0

    return max(names, key=score)


def _data(plan: Mapping[str, Any]) -> Data:
    """The digits of the task, some of the training images kept out of the training."""
    data: Any = get(plan["task"]).data()
    count = plan["validation"]
    parts = [tuple(part[s] for part in data.train) for s in (slice(-count), slice(-count, None))]
    found = replace(data, train=parts[0], val=parts[1])
    images = plan["images"]
    return found.subset(train=images.get("train"), test=images.get("test")) if images else found


def _of(cells: Cells, column: str, penalty: str, way: str, budget: float) -> dict[int, float]:
    return {
        cell["key"]["seed"]: row[column]
        for cell in pick(cells, penalty=penalty)
        for row in cell["values"]["rows"]
        if row["way"] == way and row["budget"] == budget and row.get(column) is not None
    }


def _table(settings: Settings, cells: Cells, column: str, title: str) -> Table:
    pairs = [(way, budget) for way in settings["ways"] for budget in settings["budgets"]]
    rows = [
        [name, *(_written(cells, column, name, way, budget) for way, budget in pairs)]
        for name in settings["penalties"]
    ]
    for way in settings["beside"]:
        shown = [_written(cells, column, NONE, way, budget) for budget in settings["budgets"]]
        rows.append([way, *shown, *[""] * (len(pairs) - len(shown))])
    return Table(title, ["penalty", *(f"{way}, {budget:.0%}" for way, budget in pairs)], rows)


def _written(cells: Cells, column: str, penalty: str, way: str, budget: float) -> str:
    found = _of(cells, column, penalty, way, budget).values()
    refused = any(
        "refused" in row and row["way"] == way and row["budget"] == budget
        for cell in pick(cells, penalty=penalty)
        for row in cell["values"]["rows"]
    )
    return "refused" if refused else plus_minus([100 * value for value in found])


def _spectrum(settings: Settings, cells: Cells) -> Table:
    rows = []
    for name in settings["penalties"]:
        found = [cell["values"] for cell in pick(cells, penalty=name)]
        dense = plus_minus([100 * row["dense"] for row in found])
        ranks = [
            plus_minus([float(row["ranks"][side]) for row in found], 1) for side in ("in", "out")
        ]
        tail = plus_minus([row["tail"] for row in found], 4)
        rows.append([name, dense, *ranks, tail])
    layer = settings["follow"]
    head = ["penalty", "dense accuracy, %", "ranks of inputs", "of outputs", "21st over first"]
    return Table(f"The end of the search: {layer} at p = {ENERGY:g}", head, rows)
