"""Layers that replace convolutions beside them: accuracy, what is counted, and milliseconds."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bench.claim import claim, judged
from bench.compress import Values, scored
from bench.data import SMALL
from bench.experiments import Cell, Cells, Table, by_seed, paired, pick, values
from bench.small import cnn, method_of, seeded
from bench.stats import mean, median, plus_minus, spread
from pliant.cost import cost
from pliant.data import Data, Train
from pliant.drivers.loop import epochs_of, fit
from pliant.edits import Swap
from pliant.families.layers.operations import of_convolution, operations
from pliant.latency import Target, compare
from pliant.method import Method
from pliant.run import Run, start

Settings = Mapping[str, Any]
Watch = Callable[[dict[str, Any]], None]
FIXED = "fixed shifts"
KINDS = ("multiplications", "additions", "maxima", "exponentials", "logarithms")
LIBRARIES = ("onnxruntime",)


def cells(settings: Settings) -> list[Cell]:
    """List all trainings, all of the first seed first, and then single layers."""
    shared = {name: settings[name] for name in ("images", "train")}
    rows = []
    for seed in settings["seeds"]:
        for name, rival in settings["rivals"].items():
            key = {"study": "trained", "rival": name, "seed": seed}
            plan = {**shared, "widths": settings["widths"], **rival}
            plan["train"] = {**settings["train"], **rival.get("train", {})}
            rows.append(Cell(key, plan))
    layer = settings["layer"]
    plan = {name: layer[name] for name in ("channels", "size", "seconds")}
    for repetition in range(layer["repetitions"]):
        for name, spec in layer["specs"].items():
            for runtime in layer["runtimes"]:
                key = {"study": "layer", "rival": name, "runtime": runtime}
                more = {"linear": True} if name in layer.get("linear", ()) else {}
                rows.append(Cell(key | {"repetition": repetition}, {**plan, "spec": spec, **more}))
    return rows


def measure(cell: Cell, watch: Watch) -> Values:
    """Train a small network, or count and time one layer beside the convolution."""
    return _layer(cell) if cell.key["study"] == "layer" else _trained(cell, watch)


def claims(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Compare trainings by the seeds that they share, and layers by what was counted and timed."""
    rows = []
    for asked in settings["claims"]["trained"]:
        own, other = (
            by_seed(cells, "accuracy", study="trained", rival=asked[who])
            for who in ("own", "other")
        )
        found = paired(own, other, 100)
        rows.append(judged(asked["text"], found, asked["how"], asked["target"], "points"))
    for asked in settings["claims"]["layer"]:
        where = {"runtime": asked["runtime"]} if "runtime" in asked else {}
        found = values(cells, asked["value"], study="layer", rival=asked["own"], **where)
        row = (asked["text"], median(found), asked["how"], asked["target"], asked["unit"])
        rows.append(claim(*row))
    return rows


def summary(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Give accuracies and costs of the networks, and the times of the layers."""
    rows: list[dict[str, Any]] = []
    for name in settings["rivals"]:
        found = values(cells, "accuracy", study="trained", rival=name)
        row = {"mean": mean(found), "sd": spread(found), "seeds": len(found)}
        costs = {n: mean(values(cells, n, study="trained", rival=name)) for n in ("params", "macs")}
        rows.append({"rival": name, "accuracy": row, **costs})
    for name in settings["layer"]["specs"]:
        for runtime in settings["layer"]["runtimes"]:
            key = {"study": "layer", "rival": name, "runtime": runtime}
            times = {n: median(values(cells, n, **key)) for n in ("dense_ms", "ms", "ratio")}
            rows.append({"layer": name, "runtime": runtime, **times})
    return rows


def tables(settings: Settings, cells: Cells) -> list[Table]:
    """Give the networks, what single layers do, and how long they take."""
    head = ["network", "method", "widths", "accuracy, %", "parameters", "MACs", "training, s"]
    rows = []
    for name, rival in settings["rivals"].items():
        key = {"study": "trained", "rival": name}
        found = [100 * value for value in values(cells, "accuracy", **key)]
        counts = [_count(mean(values(cells, n, **key))) for n in ("params", "macs")]
        widths = ", ".join(map(str, rival.get("widths", settings["widths"])))
        took = f"{mean(values(cells, 'training_seconds', **key)) or 0:.0f}"
        spec = f"`{rival['spec']}`" if rival["spec"] not in ("", FIXED) else rival["spec"]
        rows.append([name, spec, widths, plus_minus(found), *counts, took])
    names = settings["layer"]["specs"]
    counted = [[name, *_counts(cells, name)] for name in names]
    timed = [[name, *_times(settings, cells, name)] for name in names]
    runtimes = settings["layer"]["runtimes"]
    heads = [f"{runtime}: {what}" for runtime in runtimes for what in ("ms, convolution", "x")]
    return [
        Table(settings.get("networks", "Networks, on digits of 14 x 14 pixels"), head, rows),
        Table("One layer, counted", ["layer", "bytes", "parameters", "MACs", *KINDS], counted),
        Table("One layer, timed beside the convolution", ["layer", *heads], timed),
    ]


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _counts(cells: Cells, name: str) -> list[str]:
    found = [cell["values"] for cell in pick(cells, study="layer", rival=name)]
    keys = ("bytes", "params", "macs", *KINDS)
    return [_count(found[0].get(key) if found else None) for key in keys]


def _times(settings: Settings, cells: Cells, name: str) -> list[str]:
    row = []
    for runtime in settings["layer"]["runtimes"]:
        key = {"study": "layer", "rival": name, "runtime": runtime}
        times = [median(values(cells, n, **key)) for n in ("ms", "dense_ms")]
        ratios = values(cells, "ratio", **key)
        row.append(" beside ".join("–" if t is None else f"{t:.3f}" for t in times))
        row.append(f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios else "–")
    return row


# ---------------------------------------------------------------- the studies


def _trained(cell: Cell, watch: Watch) -> Values:
    plan, seed = cell.plan, cell.key["seed"]
    source, train = SMALL[plan.get("data", "digits")], Train(**plan["train"])
    data = source.load(plan["images"])
    model = seeded(seed, lambda: cnn(source.channels, plan["widths"]))
    if "before" in plan:
        _train(model, Method(), data, Train(**{**plan["train"], **plan["before"]}), seed)
    method = FixedShifts() if plan["spec"] == FIXED else method_of(plan["spec"])
    run = _train(model, method, data, train, seed, watch)
    took = sum(row.get("seconds", 0.0) for row in run.log)
    return scored(model, data) | {"training_seconds": round(took, 2)}


def _train(
    model: nn.Module,
    method: Method,
    data: Data,
    train: Train,
    seed: int,
    watch: Watch | None = None,
) -> Run:
    steps = epochs_of(method, data, train, seed=seed).steps
    run = start(model, method, data=data, steps=steps, seed=seed)
    fit(run, data, train, watch=watch)
    run.finish()
    return run


def _layer(cell: Cell) -> Values:
    """Fold one convolution behind a rectifier, count it, and time it beside the convolution."""
    plan, size = cell.plan, cell.plan["size"]
    build = _flat if plan.get("linear") else _one
    dense, folded = (seeded(0, lambda: build(plan["channels"], size)) for _ in range(2))
    example = (torch.randn(1, plan["channels"], size, size, generator=torch.Generator()),)
    start(folded, method_of(plan["spec"]), example=example).finish()
    target = Target(cell.key["runtime"], threads=1, seconds=plan["seconds"])
    found, costs, before = (
        compare(dense, folded, example, target),
        *(cost(model, example) for model in (folded, dense)),
    )
    done = operations(folded, example) or _products(costs.macs)
    return {
        "dense_ms": round(found.a.median_ms, 4),
        "ms": round(found.b.median_ms, 4),
        "ratio": round(1 / found.speedup, 4),
        "verdict": found.verdict,
        "bytes": costs.bytes,
        "params": costs.params,
        "macs": costs.macs,
        "fewer_macs": round(before.macs / costs.macs, 4) if costs.macs else None,
        **{kind: done.get(kind, 0) for kind in KINDS},
    }


def _products(macs: int) -> dict[str, int]:
    """Count a layer that says nothing of its own: a product and a sum in every MAC."""
    return of_convolution(macs, 1)


def _one(channels: int, size: int) -> nn.Sequential:
    return nn.Sequential(nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1))


def _flat(channels: int, size: int) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * size**2, channels))


@dataclass(frozen=True)
class FixedShifts(Method):
    """Gives every input channel a tap before the training, one after the other, and keeps it."""

    def prepare(self, run: Run) -> None:
        """Put the shifts in; the first convolution stays."""
        names = [n for n, layer in run.model.named_modules() if isinstance(layer, nn.Conv2d)][1:]
        spec = {"shared": True, "temperature": 1.0, "magnitude": False}
        run.apply(*(Swap(name, "shift_attention", spec, run.seed) for name in names))
        for name in names:
            layer: Any = run.model.get_submodule(name)
            taps = torch.arange(layer.inputs) % layer.attention.shape[2]
            with torch.no_grad():
                layer.attention.copy_(torch.eye(layer.attention.shape[2])[taps][None])
        run.apply(*(Swap(name, "shift", {"shared": True}) for name in names))
