"""Compresses small networks for milliseconds and for size, and looks whether any got slower."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from bench.claim import claim
from bench.experiments import Cell, Cells, Table, pick
from pliant import zoo
from pliant.api import compress
from pliant.latency import Target

Settings = Mapping[str, Any]


def cells(settings: Settings) -> list[Cell]:
    """List every network at every budget on every target."""
    return [
        Cell({"target": target, "network": network, "budget": budget}, plan)
        for plan in [{"method": settings["method"]}]
        for target in settings["targets"]
        for network in settings["networks"]
        for budget in settings["budgets"]
    ]


def measure(cell: Cell, watch: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Compress one network; a refusal is kept as such."""
    key = cell.key
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = zoo.build(key["network"])
    example, target = zoo.NETWORKS[key["network"]].example(), Target.parse(key["target"])
    result = compress(
        model, None, cell.plan["method"], key["budget"], target=target, example=example
    )
    report = result.report
    timed = [row for row in report.layers if "latency" in row.before]
    return {
        "before": round(report.before.latency_ms or 0, 4),
        "after": round(report.after.latency_ms or 0, 4),
        "verdict": report.target["verdict"],
        "times_faster": [round(value, 4) for value in report.target["times_faster"]],
        "params": round(report.after.params / report.before.params, 4),
        "factorized": len(result.edits),
        "left_alone": sum(row.form == "dense" for row in timed),
        "measured_slower": sum("measured" in row.reason for row in timed),
    }


def claims(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Count networks that came out slower although milliseconds were asked for."""
    rows, wanted = [], len(settings["networks"]) * len(_timed(settings))
    for target in settings["targets"]:
        found = [cell for cell in cells if _is_timed(cell) and cell["key"]["target"] == target]
        slower = [c for c in found if c.get("values", {}).get("verdict") == "slower"]
        text = f"Networks slower than dense of {wanted} with a latency budget on {target}"
        count = len(slower) if len(found) == wanted else None
        rows.append(claim(text, count, "<=", settings["claims"]["slower"], "networks"))
    return rows


def summary(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Count verdicts and refusals, a row per target and budget."""
    rows = []
    for target in settings["targets"]:
        for budget in settings["budgets"]:
            asked = [
                c for c in cells if (c["key"]["target"], c["key"]["budget"]) == (target, budget)
            ]
            words = [c.get("values", {}).get("verdict", "refused") for c in asked]
            counts = {word: words.count(word) for word in sorted(set(words))}
            rows.append({"target": target, "budget": budget, **counts})
    return rows


def tables(settings: Settings, cells: Cells) -> list[Table]:
    """Give one table per target: times the speed of the dense network, for every budget."""
    head = ["network", "dense, ms", *settings["budgets"]]
    return [
        Table(
            f"{target}, batch 1: times the speed of the dense network (layers left alone)",
            head,
            [_row(settings, cells, target, network) for network in settings["networks"]],
        )
        for target in settings["targets"]
    ]


def _row(settings: Settings, cells: Cells, target: str, network: str) -> list[str]:
    found = pick(cells, target=target, network=network)
    dense = f"{found[0]['values']['before']:.3g}" if found else ""
    return [network, dense, *(_cell(found, budget) for budget in settings["budgets"])]


def _cell(found: Cells, budget: str) -> str:
    rows = pick(found, budget=budget)
    if not rows:
        return "refused"
    values = rows[0]["values"]
    speed = f"{values['times_faster'][1]:.2f}"
    mark = f"**{speed}, slower**" if values["verdict"] == "slower" else speed
    return f"{mark} ({values['left_alone']})"


def _timed(settings: Settings) -> list[str]:
    return [budget for budget in settings["budgets"] if budget.startswith("latency")]


def _is_timed(cell: Mapping[str, Any]) -> bool:
    return str(cell["key"]["budget"]).startswith("latency")
