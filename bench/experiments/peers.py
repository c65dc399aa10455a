"""Pliant beside its peers: one checkpoint, the same epochs, the same measured milliseconds."""

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from torch import nn

from bench import tasks
from bench.claim import claim
from bench.compress import scored
from bench.experiments import Cell, Cells, Table, pick
from bench.peers import LEFT_OUT, PEERS, VERSIONS, widest
from pliant.budget import Budget
from pliant.data import Data, Train
from pliant.drivers.loop import fit
from pliant.latency import Target, compare
from pliant.method import Method
from pliant.registry import build
from pliant.run import start

Settings = Mapping[str, Any]
Watch = Callable[[dict[str, Any]], None]
DENSE = "dense"
SLACK = 1.03  # a rival may take this much more than the time asked: the noise of one measurement


def cells(settings: Settings) -> list[Cell]:
    """List every rival on every task."""
    rows = []
    for task in settings["tasks"]:
        shared = tasks.plan({**settings, "task": task})
        train = asdict(Train(**settings["train"], epochs=settings["epochs"]))
        plan = {**shared, "train": train, "target": settings["target"], "share": settings["share"]}
        for rival in (DENSE, *settings["methods"], *PEERS):
            how = settings["methods"].get(rival, rival)
            own = {"tries": settings["tries"], "version": VERSIONS.get(rival, "")}
            rows.append(Cell({"task": task, "rival": rival}, {**plan, "how": how, **own}))
    return rows


def measure(cell: Cell, watch: Watch) -> dict[str, Any]:
    """Make one rival as fast as asked, train it, and measure it beside the dense network."""
    plan, rival = cell.plan, cell.key["rival"]
    dense, data = tasks.base(plan, watch), tasks.data_of(plan)
    target, train = Target.parse(plan["target"]), Train(**plan["train"])
    began, extra = time.monotonic(), {}
    if rival == DENSE:
        model = _trained(copy.deepcopy(dense), Method(), None, data, train, None, watch)
    elif rival in PEERS:
        extra["knob"], small = _as_fast(dense, rival, plan, data, target)
        extra["seconds_to_compress"] = round(time.monotonic() - began, 1)
        model = _trained(small, Method(), None, data, train, None, watch)
    else:
        budget = Budget.parse(f"latency={plan['share']:.0%}")
        method = build(plan["how"])
        model = _trained(copy.deepcopy(dense), method, budget, data, train, target, watch)
    seconds = round(time.monotonic() - began, 1)
    return {**scored(model, data), **extra, "seconds": seconds, **_times(dense, model, data, plan)}


def claims(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Say who is the most accurate among those that are as fast as asked."""
    rows = []
    for task in settings["tasks"]:
        found = {c["key"]["rival"]: c["values"] for c in pick(cells, task=task)}
        own = [found[name]["accuracy"] for name in settings["methods"] if found.get(name)]
        others = [found[name]["accuracy"] for name in PEERS if found.get(name)]
        lead = 100 * (max(own) - max(others)) if own and others else None
        text = f"{task}: at equal milliseconds Pliant is more accurate than the best peer, by"
        rows.append(claim(text, lead, ">", 0, "points"))
        slow = [v["share"] for name, v in found.items() if name != DENSE and v]
        most = max(slow) / settings["share"] if slow else None
        text = f"{task}: every rival takes the time asked: the slowest over it"
        rows.append(claim(text, most, "<=", 1.05, "x"))
    return rows


def summary(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Give what was measured, a row per rival."""
    return [{**c["key"], **c["values"]} for c in cells if c["values"]]


def tables(settings: Settings, cells: Cells) -> list[Table]:
    """Give one table per task, and the peers that could not be run."""
    head = ["rival", "accuracy, %", "parameters", "MACs", "bytes", "onnxruntime, ms"]
    head += ["torch, ms", "seconds to compress", "seconds in all"]
    found = []
    for task in settings["tasks"]:
        rows = [_row(cell) for cell in pick(cells, task=task)]
        found.append(Table(f"{task}, {settings['target']}", head, rows))
    left = [[name, reason] for name, reason in LEFT_OUT.items()]
    return [*found, Table("Left out", ["peer", "why"], left)]


# ---------------------------------------------------------------- one rival


def _as_fast(
    dense: nn.Module, rival: str, plan: Mapping[str, Any], data: Data, target: Target
) -> tuple[float, nn.Module]:
    def fits(candidate: nn.Module) -> bool:
        return _share(dense, candidate, data, target) <= plan["share"] * SLACK

    return widest(lambda share: PEERS[rival](dense, data, share), fits, plan["tries"])


def _share(dense: nn.Module, other: nn.Module, data: Data, target: Target) -> float:
    return 1 / compare(dense, other, data.example(), target).speedup


def _trained(
    model: nn.Module,
    method: Method,
    budget: Budget | None,
    data: Data,
    train: Train,
    target: Target | None,
    watch: Watch,
) -> nn.Module:
    steps = train.steps(data.steps(train.batch))
    run = start(model, method, budget, data=data, steps=steps, target=target)
    fit(run, data, train, watch=watch)
    run.finish(strict=False)
    return run.model


def _times(
    dense: nn.Module, model: nn.Module, data: Data, plan: Mapping[str, Any]
) -> dict[str, float]:
    """Milliseconds on the target and in PyTorch, each beside the dense network in one run."""
    target = Target.parse(plan["target"])
    torch = Target("torch", threads=target.threads, batch=target.batch)
    there, here = (compare(dense, model, data.example(), place) for place in (target, torch))
    return {
        "ms": round(there.b.median_ms, 4),
        "dense_ms": round(there.a.median_ms, 4),
        "share": round(1 / there.speedup, 4),
        "torch_ms": round(here.b.median_ms, 4),
        "torch_share": round(1 / here.speedup, 4),
    }


def _row(cell: Mapping[str, Any]) -> list[str]:
    name, v = cell["key"]["rival"], cell["values"]
    if not v:
        return [name, cell.get("refused", "not measured"), *[""] * 7]
    return [
        name,
        f"{100 * v['accuracy']:.2f}",
        f"{v['params']:,}",
        f"{v['macs']:,}",
        f"{v['bytes']:,}",
        f"{v['ms']:.3g} ({v['share']:.0%} of {v['dense_ms']:.3g})",
        f"{v['torch_ms']:.3g} ({v['torch_share']:.0%})",
        str(v.get("seconds_to_compress", "")),
        f"{v['seconds']:,.0f}",
    ]
