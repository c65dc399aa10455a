"""A drop that is searched for: is the smallest network within it on samples that had no part?"""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

import pliant
from bench import tasks
from bench.claim import claim
from bench.data import part
from bench.experiments import Cell, Cells, Table, pick, values
from bench.stats import mean, plus_minus
from pliant import zoo
from pliant.api.within import silent
from pliant.data import Data

Settings = Mapping[str, Any]
Watch = Callable[[dict[str, Any]], None]


def cells(settings: Settings) -> list[Cell]:
    """List one search for every network and seed."""
    shared = {name: settings[name] for name in ("method", "drop", "probes", "split")}
    rows = []
    for network in settings["networks"]:
        plan = {**tasks.plan({**settings, **network}), **shared}
        rows += [Cell({"network": plan["network"], "seed": s}, plan) for s in settings["seeds"]]
    return rows


def measure(cell: Cell, watch: Watch) -> dict[str, Any]:
    """Search the smallest network within the drop, then make the next smaller one."""
    plan, seed = cell.plan, cell.key["seed"]
    model, data = _dense(plan, watch), _divided(tasks.data_of(plan), plan["split"], seed)
    began = time.monotonic()
    with silent():
        found = pliant.smallest(
            model, data, plan["method"], plan["drop"], probes=plan["probes"], seed=seed
        )
        took = time.monotonic() - began
        rows = found.report.tried
        chosen = next(row for row in rows if row.get("chosen"))
        below = [row for row in rows if row["share"] < chosen["share"]]
        smaller = max(below, key=lambda row: row["share"], default=None)
        unseen = None if smaller is None else _lost(model, data, plan, smaller["share"], seed)
    verdict = found.report.verdict
    assert verdict is not None
    return {
        "share": chosen["share"],
        "chosen_lost": chosen["lost"],
        "lost": verdict.lost,
        "inside": bool(verdict.lost is not None and verdict.lost <= plan["drop"]),
        "sure": bool(chosen.get("within")),
        "smaller_share": smaller and smaller["share"],
        "smaller_inside": bool(smaller and smaller.get("within")),
        "smaller_lost": unseen,
        "search_seconds": took,
    }


def claims(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Count the networks that stay within the drop, and the next smaller ones that do not."""
    asked, seeds = settings["claims"], len(settings["seeds"])
    wanted = seeds * len(settings["networks"])
    inside, smaller = values(cells, "inside"), values(cells, "smaller_inside")
    whole = len(cells) == wanted  # where no size was within the drop, none was returned
    drop = f"{settings['drop']:g} points"
    return [
        claim(
            f"Networks that lose at most {drop} on the untouched split, of {wanted}",
            sum(inside) if whole else None, ">=", asked["inside"], "networks",
        ),
        claim(
            f"Next smaller sizes that pass where the choice is made, of {wanted}",
            sum(smaller) if whole else None, "<=", asked["smaller"], "networks",
        ),
    ]  # fmt: skip


def summary(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Give counts and means for every network."""
    rows = []
    for network in dict.fromkeys(cell["key"]["network"] for cell in cells):
        names = ("share", "chosen_lost", "lost", "smaller_lost", "search_seconds")
        row: dict[str, Any] = {"network": network, "runs": len(pick(cells, network=network))}
        row |= {name: mean(values(cells, name, network=network)) for name in names}
        rows.append(row | {"inside": sum(values(cells, "inside", network=network))})
    return rows


def tables(settings: Settings, cells: Cells) -> list[Table]:
    """Give one row per network."""
    head = ["network", "within the drop", "parameters kept, %", "lost where chosen, points"]
    head += ["lost on the untouched split", "next smaller size, the same", "seconds of a search"]
    rows = []
    for row in summary(settings, cells):
        name = row["network"]
        shares = [100 * share for share in values(cells, "share", network=name)]
        cell = [name, f"{row['inside']} of {row['runs']}", plus_minus(shares, 1)]
        for key in ("chosen_lost", "lost", "smaller_lost"):
            cell.append(plus_minus(values(cells, key, network=name)))
        rows.append([*cell, f"{row['search_seconds'] or 0:.0f}"])
    title = f"The smallest network that loses at most {settings['drop']:g} points"
    return [Table(title, head, rows)]


def _dense(plan: Mapping[str, Any], watch: Watch) -> nn.Module:
    """The checkpoint as it came, or trained here where the plan has epochs for that."""
    if plan["prepare"]["epochs"]:
        return tasks.base(plan, watch)
    return zoo.build(plan["network"], weights=part("pretrained") / plan["weights"])


def _divided(data: Data, split: Mapping[str, int], seed: int) -> Data:
    """Draw what calibrates, what decides and what checks: other samples for every seed."""
    random = torch.Generator().manual_seed(seed)
    test, train = data.source("test"), data.source("train")
    order = torch.randperm(len(test), generator=random)  # type: ignore[arg-type]
    rows = torch.randperm(len(train), generator=random)[: split["train"]]  # type: ignore[arg-type]
    first = split["val"]
    return replace(
        data,
        train=train.take(rows),  # type: ignore[union-attr]
        val=test.take(order[:first]),  # type: ignore[union-attr]
        test=test.take(order[first : first + split["test"]]),  # type: ignore[union-attr]
    )


def _lost(
    model: nn.Module, data: Data, plan: Mapping[str, Any], share: float, seed: int
) -> float | None:
    """What a network of a size loses on the untouched split."""
    made = pliant.compress(
        model, data, plan["method"], pliant.Budget(params=share), seed=seed, strict=False
    )
    return made.report.verdict and made.report.verdict.lost
