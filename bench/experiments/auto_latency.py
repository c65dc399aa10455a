"""`pliant auto` in milliseconds: beside the fastest network of every single method."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

import pliant
from bench.experiments import Cell, Cells, Table
from bench.experiments.auto import AUTO, Settings, Watch, at_most, of_networks, summary
from bench.fleet import trained
from pliant.api.within import silent
from pliant.errors import PliantError
from pliant.latency import compare

__all__ = ["cells", "claims", "measure", "summary", "tables"]


def cells(settings: Settings) -> list[Cell]:
    """List one measurement for every network: auto and all single methods."""
    return of_networks(settings, "drop", "target", "singles", "probes", "epochs")


def measure(cell: Cell, watch: Watch) -> dict[str, Any]:
    """Search the fastest network within the drop by auto and by each method, and time them."""
    plan, seed = cell.plan, cell.key["seed"]
    model, data, task = trained(cell.key["network"], seed, plan["epochs"])
    asked: dict[str, Any] = {"task": task, "seed": seed, "target": plan["target"]}
    asked |= {"drop": plan["drop"], "probes": plan["probes"]}
    searches: dict[str, Callable[[], pliant.Result]] = {AUTO: partial(_auto, model, data, asked)}
    for spec in plan["singles"]:
        searches[spec] = partial(pliant.smallest, model, data, spec, axis="latency", **asked)
    rows, made = dict[str, dict[str, Any]](), dict[str, nn.Module]()
    for name, search in searches.items():
        began = time.monotonic()
        try:
            with silent():
                result = search()
        except PliantError as error:
            rows[name] = {"refused": str(error)}
            continue
        made[name] = result.model
        rows[name] = _row(result) | {"seconds": time.monotonic() - began}
    if AUTO not in made:  # as bad as can be, if a single method found what auto did not
        return {"rivals": rows, "slower": float("inf") if made else None}
    example, target = data.example_for(model), plan["target"]
    for name in made.keys() - {AUTO}:
        rows[name]["ratio"] = compare(made[AUTO], made[name], example, target).speedup
    rows[AUTO]["faster"] = compare(model, made[AUTO], example, target).speedup
    slowest = max((row["ratio"] for row in rows.values() if "ratio" in row), default=None)
    return {"rivals": rows, "slower": slowest}


def claims(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Say for every network how much slower auto's is than the fastest of a single method."""
    text = "milliseconds of auto's network over those of the best single method's"
    return at_most(settings, cells, "slower", text, "x")


def tables(settings: Settings, cells: Cells) -> list[Table]:
    """Give one row per network, seed and search."""
    head = ["network", "seed", "search", "lost on the test split, points", "auto's ms over its"]
    head += ["seconds of search"]
    rows = []
    for found in summary(settings, cells):
        for name, row in found["rivals"].items():
            first = [found["network"], str(found["seed"]), name]
            if "refused" in row:
                rows.append([*first, "nothing within the drop", "–", "–"])
                continue
            ratio = f"{row['ratio']:.2f}" if "ratio" in row else "–"
            said = f"{name}: {row['chosen']}, {row['faster']:.2f} x" if name == AUTO else name
            rows.append([*first[:2], said, f"{row['lost']:.2f}", ratio, f"{row['seconds']:.0f}"])
    drop = settings["drop"]
    return [Table(f"The fastest network that loses {drop:g} points at most", head, rows)]


def _auto(model: nn.Module, data: Any, asked: Mapping[str, Any]) -> pliant.Result:
    rest = {name: value for name, value in asked.items() if name != "drop"}
    return pliant.auto(model, data, pliant.Budget(drop=asked["drop"]), goal="latency", **rest)


def _row(result: pliant.Result) -> dict[str, Any]:
    report = result.report
    chosen = next(row for row in report.tried if row.get("chosen"))
    lost = None if report.verdict is None else report.verdict.lost
    return {"lost": lost, "params": report.after.params, "chosen": chosen.get("plan", "")}
