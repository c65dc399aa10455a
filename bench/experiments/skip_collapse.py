"""A case in which first-order DARTS fills its cells with skip connections, and what eDARTS does."""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from bench.claim import judged
from bench.experiments import Cell, Cells, Table, by_seed, paired, pick, values
from bench.small import method_of, seeded
from bench.stats import mean, plus_minus, spread
from pliant.data import Train, load
from pliant.drivers.loop import fit
from pliant.families.search.bilevel import halves
from pliant.nn.genotype import DARTS_V2_WIRING, Genotype
from pliant.nn.operations import NONE, SKIP
from pliant.run import start
from pliant.zoo.darts import DENSE, supernet

Settings = Mapping[str, Any]


def cells(settings: Settings) -> list[Cell]:
    """List all searches, all of the first seed first."""
    shared = {name: settings[name] for name in ("images", "network", "ops", "train")}
    return [
        Cell({"rival": name, "seed": seed}, {**shared, **rival})
        for seed in settings["seeds"]
        for name, rival in settings["rivals"].items()
    ]


def measure(cell: Cell, watch: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Search once, and count skip connections after every epoch."""
    plan, seed = cell.plan, cell.key["seed"]
    data = halves(load("digits").subset(train=plan["images"]), seed=seed)
    dense = plan["wiring"] == "dense"
    wiring, ops = (DENSE, (NONE, *plan["ops"])) if dense else (DARTS_V2_WIRING, plan["ops"])
    model = seeded(seed, lambda: supernet(wiring, ops, inputs=1, **plan["network"]))
    train, began = Train(**plan["train"]), time.monotonic()
    steps = train.steps(data.steps(train.batch))
    run = start(model, method_of(plan["spec"]), data=data, steps=steps, seed=seed)
    fit(run, replace(data, val=None, test=None), train, watch=watch)
    found = [Genotype.from_plain(row["genotype"]) for row in run.log if "genotype" in row]
    both = [cell.count(SKIP) + cell.count(SKIP, reduction=True) for cell in found]
    return {
        "skips": found[-1].count(SKIP),
        "both": both[-1],
        "first": both[0],
        "history": both,
        "genotype": found[-1].plain(),
        "seconds": round(time.monotonic() - began, 2),
    }


def claims(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Say that DARTS collapses here, that eDARTS does not, and what the dropout does."""
    chance = 16 / len(settings["ops"])
    one, other, without = (
        {name: by_seed(cells, name, rival=rival) for name in ("skips", "both", "first")}
        for rival in ("edarts", "DARTS", "edarts, no dropout of skips")
    )
    more = paired(other["both"], other["first"])
    beyond = [value - chance for value in other["both"].values()]
    fewer = paired(one["both"], other["both"])
    return [
        judged("DARTS: skips of both cells beyond those of chance", *(beyond, ">", 0, "skips")),
        judged("DARTS: skips at the end less those of the first epoch", *(more, ">", 0, "skips")),
        judged(
            "eDARTS: skips of the normal cell, no limit set",
            *(list(one["skips"].values()), "<=", 2, "skips"),
        ),
        judged("Skips of both cells: eDARTS less DARTS", *(fewer, "<", 0, "skips")),
        judged(
            "Skips of both cells: eDARTS less the same without dropout of skips",
            *(paired(one["both"], without["both"]), "<", 0, "skips"),
        ),
    ]


def summary(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Give mean and deviation of every search."""
    rows: list[dict[str, Any]] = []
    for name in settings["rivals"]:
        row: dict[str, Any] = {"rival": name}
        for value in ("skips", "both", "first", "seconds"):
            found = values(cells, value, rival=name)
            row[value] = {"mean": mean(found), "sd": spread(found), "seeds": len(found)}
        rows.append(row)
    return rows


def tables(settings: Settings, cells: Cells) -> list[Table]:
    """Give the skips of every search, and how they came."""
    head = ["search", "options", "skips of 8 (normal)", "skips of 16 (both)", "both, over epochs"]
    rows = []
    for name, rival in settings["rivals"].items():
        counts = [plus_minus(values(cells, v, rival=name), 1) for v in ("skips", "both")]
        seen = [cell["values"]["history"] for cell in pick(cells, rival=name)]
        ways = "; ".join(" ".join(map(str, row[:: max(1, len(row) // 8)])) for row in seen)
        rows.append([name, f"`{rival['spec']}`", *counts, ways])
    return [Table("Skip connections after a long search on few samples", head, rows)]
