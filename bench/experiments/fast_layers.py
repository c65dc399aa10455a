"""Measures single factorized layers against their dense kernels, before and after the choice."""

import statistics
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from bench.claim import claim
from bench.experiments import Cell, Cells, Table, pick, values
from bench.experiments.factorize import DECAYING, kernel
from bench.stats import median
from pliant.budget import Option
from pliant.cost import LayerCost, layer_costs
from pliant.edits import Factor
from pliant.families.lowrank.losses import losses
from pliant.families.lowrank.options import options
from pliant.latency import LatencyTable, Target
from pliant.latency.compare import compared, interleaved
from pliant.math.forms import compose, decompose, forms_for, max_ranks, relative_error
from pliant.nn.factorized import factorized

Settings = Mapping[str, Any]
KINDS = ("error", "macs", "speed", "efficiency")
FORMS = ("tucker2", "input", "output", "spatial")


def cells(settings: Settings) -> list[Cell]:
    """List every layer at every batch on every target."""
    shared = {"share": settings["share"], "finalists": settings["finalists"]}
    return [
        Cell({"target": target, "layer": name_of(layer), "batch": batch}, {**layer, **shared})
        for target in settings["targets"]
        for layer in settings["layers"]
        for batch in layer["batches"]
        if batch in settings["targets"][target]
    ]


def measure(cell: Cell, watch: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Choose among all that loses no more than plain Tucker-2, and measure both in turn."""
    plan, batch = cell.plan, cell.key["batch"]
    target = Target.parse(f"{cell.key['target']},batch={batch}")
    table, layer = table_of(target), _layer(plan)
    shape = (batch, layer.in_channels, plan["input"], plan["input"])
    cost = layer_costs(nn.Sequential(layer), (torch.zeros(1, *shape[1:]),))["0"]
    before = plain_edit(layer, plan["share"])
    lost = loss_of(layer.weight, before)
    rows = candidates(table, layer, cost, lost, shape)[: plan["finalists"]]
    edits = [before, *(row.edit for row in rows)]
    modules = [layer, *(factorized(layer, edit.form, edit.ranks) for edit in edits)]
    samplers = [target.layer_sampler(module, (torch.ones(shape),)) for module in modules]
    times = interleaved(samplers, target)
    best = min(range(2, len(times)), key=lambda i: statistics.median(times[i]), default=1)
    return {
        "dense": round(1000 * statistics.median(times[0]), 4),
        "step": table.step(),
        "loss": round(lost, 4),
        **_side("before", before, layer, cost, times[0], times[1]),
        **_side("after", edits[best - 1], layer, cost, times[0], times[best]),
    }


def _side(
    name: str,
    edit: Factor,
    layer: nn.Conv2d,
    cost: LayerCost,
    dense: list[float],
    row: list[float],
) -> dict[str, Any]:
    speed, ratio = compared(dense, row).speedup, cost.macs / edit.predict(cost).macs
    return {
        f"{name}_form": f"{edit.form} {'/'.join(map(str, edit.ranks))}",
        f"{name}_error": round(error_of(layer.weight, edit), 4),
        f"{name}_macs": round(ratio, 3),
        f"{name}_speed": round(speed, 3),
        f"{name}_efficiency": round(speed / ratio, 3),
    }


def candidates(
    table: LatencyTable, layer: nn.Conv2d, cost: LayerCost, lost: float, shape: tuple[int, ...]
) -> list[Option]:
    """Everything that loses no more, the fastest first as far as the table knows."""
    steps = {form: table.step_for(layer, form) for form in forms_for(layer.weight.shape)}
    rows = options("0", layer.weight, cost, allowed=FORMS, steps=steps)
    good = [row for row in rows if row.edit is not None and row.score <= lost + 1e-6]
    return sorted(good, key=lambda r: table.factor(layer, shape, r.edit.form, r.edit.ranks))


def plain_edit(layer: nn.Conv2d, share: float) -> Factor:
    shape = layer.weight.shape
    form = "svd" if shape[2:].numel() == 1 else "tucker2"
    return Factor("0", form, tuple(max(1, round(share * top)) for top in max_ranks(shape, form)))


def loss_of(weight: Tensor, edit: Factor) -> float:
    """The share of energy lost, as `pliant.families.lowrank.options.options` scores it."""
    return losses(weight, (edit.form,))[edit.form].at([edit.ranks])[0]


def error_of(weight: Tensor, edit: Factor) -> float:
    """Return the squared error of a form, relative to the kernel's energy."""
    kernels = decompose(weight.detach(), edit.form, edit.ranks)
    return relative_error(weight.detach(), compose(kernels, edit.form))


@cache
def table_of(target: Target) -> LatencyTable:
    """One table per target and process; nothing measured elsewhere enters."""
    return LatencyTable(target)


def _layer(plan: Mapping[str, Any]) -> nn.Conv2d:
    out, channels, size, _ = plan["kernel"]
    layer = nn.Conv2d(
        channels, out, size, stride=plan.get("stride", 1), padding=size // 2, bias=False
    )
    with torch.no_grad():
        layer.weight.copy_(kernel(plan["kernel"], DECAYING))
    return layer


def name_of(layer: Mapping[str, Any]) -> str:
    """Name a layer by its network, kernel and input."""
    size = "×".join(map(str, layer["kernel"]))
    stride = f" stride {layer['stride']}" if "stride" in layer else ""
    return f"{layer['of']} {size}{stride} at {layer['input']}"


def claims(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Say how efficient the chosen layers are where there are channels enough."""
    asked, rows = settings["claims"], []
    for target in settings["targets"]:
        wide = [name_of(row) for row in settings["layers"] if min(row["kernel"][:2]) >= 128]
        found = [
            value
            for name in wide
            for value in values(cells, "after_efficiency", target=target, layer=name)
        ]
        text = f"Efficiency of the chosen layers with {asked['channels']} channels and more"
        for word, value in (("median", median(found)), ("least", min(found, default=None))):
            rows.append(claim(f"{text}, {word} on {target}", value, ">=", asked["efficiency"], "x"))
    return rows


def summary(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Give medians of speed-up and efficiency, before and after, for each target."""
    rows = []
    for target in settings["targets"]:
        row: dict[str, Any] = {"target": target, "step": values(cells, "step", target=target)}
        for side in ("before", "after"):
            for kind in ("speed", "efficiency"):
                row[f"{side}_{kind}"] = median(values(cells, f"{side}_{kind}", target=target))
        rows.append(row)
    return rows


def tables(settings: Settings, cells: Cells) -> list[Table]:
    """Give one row per layer and batch: dense milliseconds, then both sides."""
    side = ["error", "MACs", "speed", "efficiency"]
    head = ["layer", "batch", "dense, ms", "before", *side, "after", *side]
    return [
        Table(
            f"{target}: before is plain Tucker-2 or SVD, after the measured choice",
            head,
            [_row(cell["key"], cell["values"]) for cell in pick(cells, target=target)],
        )
        for target in settings["targets"]
    ]


def _row(key: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    row = [key["layer"], str(key["batch"]), f"{found['dense']:.3g}"]
    for side in ("before", "after"):
        row.append(found[f"{side}_form"])
        row += [f"{found[f'{side}_{kind}']:.2f}" for kind in KINDS]
    return row
