"""`pliant auto` beside every single method at its own default, on five networks."""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pliant
from bench.claim import judged
from bench.experiments import Cell, Cells, Table, pick, values
from bench.fleet import trained
from pliant.api.within import divided, silent
from pliant.errors import PliantError
from pliant.result import Report

Settings = Mapping[str, Any]
Watch = Callable[[dict[str, Any]], None]
AUTO = "auto"


def cells(settings: Settings) -> list[Cell]:
    """List one measurement for every network: auto and all single methods."""
    return of_networks(settings, "budget", "singles", "probes", "epochs")


def of_networks(settings: Settings, *names: str) -> list[Cell]:
    """List one measurement for every network and seed, with some settings as its plan."""
    plan = {name: settings[name] for name in names}
    seeds, networks = settings["seeds"], settings["networks"]
    return [Cell({"network": n, "seed": seed}, plan) for seed in seeds for n in networks]


def measure(cell: Cell, watch: Watch) -> dict[str, Any]:
    """Compress one network by auto and by each method, to the same budget."""
    plan, seed = cell.plan, cell.key["seed"]
    model, data, task = trained(cell.key["network"], seed, plan["epochs"])
    decide, check = divided(data, seed)
    bounds = pliant.Budget(**plan["budget"])
    asked: dict[str, Any] = {"task": task, "seed": seed}
    with silent():
        began = time.monotonic()
        free = replace(bounds, drop=100.0)
        found = pliant.auto(model, data, free, probes=plan["probes"], **asked)
        rows = {AUTO: _row(found.report) | {"seconds": time.monotonic() - began}}
        rows[AUTO]["chosen"] = next(r["plan"] for r in found.report.tried if r.get("chosen"))
        for spec in plan["singles"]:
            began = time.monotonic()
            try:
                chosen = pliant.compress(model, decide, spec, bounds, **asked).report
                last = pliant.compress(model, check, spec, bounds, **asked).report
            except PliantError as error:
                rows[spec] = {"refused": str(error)}
                continue
            rows[spec] = _row(last) | {"decided": [_lost(chosen), chosen.after.loss]}
            rows[spec]["seconds"] = time.monotonic() - began
    return {"dense": _dense(found.report), "rivals": rows, **_beside(rows)}


def claims(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Say for every network how far auto is behind the best single method."""
    text = "points that auto loses more than the best single method"
    return at_most(settings, cells, "behind", text, "points")


def at_most(
    settings: Settings, cells: Cells, name: str, text: str, unit: str
) -> list[dict[str, Any]]:
    """Compare a value of every network with its bound."""
    most, networks = settings["claims"][name], settings["networks"]
    return [
        judged(f"{network}: {text}", values(cells, name, network=network), "<=", most, unit)
        for network in networks
    ]


def summary(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Give what auto and the best single method lost, and their seconds."""
    return [{**c["key"], **c["values"]} for c in pick(cells)]


def tables(settings: Settings, cells: Cells) -> list[Table]:
    """Give one row per network and seed."""
    head = ["network", "seed", "dense, %", "auto chose", "auto lost, points", "best single"]
    head += ["lost, points", "seconds: auto", "all single methods"]
    rows = []
    for row in summary(settings, cells):
        own, best = row["rivals"][AUTO], row["rivals"].get(row["best"], {})
        others = [each for name, each in row["rivals"].items() if name != AUTO]
        seconds = sum(each.get("seconds", 0.0) for each in others)
        rows.append([
            row["network"], str(row["seed"]), f"{100 * row['dense']:.1f}",
            own["chosen"], f"{own['lost']:.2f}",
            row["best"] or "none", f"{best['lost']:.2f}" if best else "–",
            f"{own['seconds']:.0f}", f"{seconds:.0f}",
        ])  # fmt: skip
    return [Table(f"The same {_said(settings['budget'])} for all", head, rows)]


def _said(budget: Mapping[str, float]) -> str:
    return ", ".join(f"{share:.0%} of the {axis}" for axis, share in budget.items())


def _lost(report: Report) -> float:
    assert report.verdict is not None and report.verdict.lost is not None
    return report.verdict.lost


def _dense(report: Report) -> float:
    return next(iter(report.before.metrics.values()), None) or report.before.accuracy or 0.0


def _row(report: Report) -> dict[str, Any]:
    after = report.after
    return {"lost": _lost(report), "params": after.params, "bytes": after.bytes, "met": report.met}


def _beside(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The single method that lost least where choices are made, and how far auto is behind it."""
    singles = {n: r for n, r in rows.items() if n != AUTO and "refused" not in r}
    best = min(singles, key=lambda name: singles[name]["decided"], default=None)
    behind = None if best is None else rows[AUTO]["lost"] - singles[best]["lost"]
    return {"best": best, "behind": behind}
