"""Predicts the latency of factorized networks from single layers, and measures them."""

import random
import statistics
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from bench.claim import claim
from bench.experiments import Cell, Cells, Table, pick, values
from pliant import zoo
from pliant.cost import Example, LayerCost, layer_costs
from pliant.edits import Factor
from pliant.families.lowrank.options import forms_of
from pliant.latency import Target, compare
from pliant.latency.builds import built
from pliant.latency.clock import Clock
from pliant.math.forms import max_ranks
from pliant.nn.layers import Factorizable
from pliant.surgery.select import factorizable

Settings = Mapping[str, Any]
FORMS = ("tucker2", "input", "output", "spatial")
SHARES = (0.125, 0.5)  # of the full ranks, between which a plan draws


def cells(settings: Settings) -> list[Cell]:
    """List every network on every target, once for every plan."""
    return [
        Cell({"target": target, "network": network, "plan": number}, {"shares": SHARES})
        for target in settings["targets"]
        for network in settings["networks"]
        for number in range(settings["plans"])
    ]


def measure(cell: Cell, watch: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Predict one plan, then build it and measure it."""
    key = cell.key
    model = zoo.build(key["network"]).eval()
    example = zoo.NETWORKS[key["network"]].example()
    target = Target.parse(key["target"])
    clock = Clock.start(model, example, target)
    edits = draw(clock, model, key["plan"])
    return {"layers": len(edits), **predicted_and_measured(clock, model, example, edits)}


def predicted_and_measured(
    clock: Clock, model: nn.Module, example: Example, edits: list[Factor]
) -> dict[str, Any]:
    """Return the dense, the predicted and the measured latency of a plan, in milliseconds."""
    costs = layer_costs(model, example)
    predicted = predict(clock, model, edits, costs)
    found = compare(clock.dense, built(model, edits), example, clock.target)
    dense = clock.timing.median_ms
    return {
        "dense": round(dense, 4),
        "predicted": round(predicted, 4),
        "measured": round(dense / found.speedup, 4),
        "error": round(predicted * found.speedup / dense - 1, 4),
        "low": round(dense / found.high, 4),
        "high": round(dense / found.low, 4),
    }


def predict(
    clock: Clock, model: nn.Module, edits: list[Factor], costs: Mapping[str, LayerCost]
) -> float:
    """Predict the milliseconds of a network after edits, without building it."""
    rows = [(edit, costs[edit.layer]) for edit in edits]
    each, rest = clock.outside(model, {edit.layer: cost for edit, cost in rows})
    return rest + sum(
        clock.of_edit(model, edit, cost) + each * edit.predict(cost).params for edit, cost in rows
    )


def draw(clock: Clock, model: nn.Module, seed: int) -> list[Factor]:
    """Draw a form and ranks for every layer."""
    lots = random.Random(seed)
    return [_factor(clock, name, layer, lots) for name, layer in factorizable(model)[0].items()]


def _factor(clock: Clock, name: str, layer: Factorizable, lots: random.Random) -> Factor:
    form = lots.choice(forms_of(layer.weight.shape, FORMS))
    step, share = clock.table.step_for(layer, form), lots.uniform(*SHARES)
    most = max_ranks(layer.weight.shape, form)
    ranks = tuple(min(top, max(1, round(share * top / step)) * step) for top in most)
    return Factor(name, form, ranks)


def claims(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Say how far the worst prediction was off, for each target."""
    rows = []
    for target in settings["targets"]:
        errors = [abs(error) for error in values(cells, "error", target=target)]
        whole = len(errors) == len(settings["networks"]) * settings["plans"]
        text = f"Predicted against measured latency, the worst of all networks on {target}"
        worst = max(errors) if whole else None
        rows.append(claim(text, worst, "<=", settings["claims"]["error"], "of it"))
    return rows


def summary(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Give the median and the largest error of each target."""
    rows = []
    for target in settings["targets"]:
        errors = [abs(error) for error in values(cells, "error", target=target)]
        if errors:
            row = {"median": statistics.median(errors), "largest": max(errors)}
            rows.append({"target": target, "networks": len(errors), **row})
    return rows


def tables(settings: Settings, cells: Cells) -> list[Table]:
    """Give one row per network and target."""
    head = ["network", "layers", "dense, ms", "predicted", "measured", "(99 %)", "off by"]
    return [
        Table(
            f"{target}, batch 1",
            head,
            [_row(cell["key"], cell["values"]) for cell in pick(cells, target=target)],
        )
        for target in settings["targets"]
    ]


def _row(key: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    times = [f"{found[name]:.3g}" for name in ("dense", "predicted", "measured")]
    spread = f"{found['low']:.3g} to {found['high']:.3g}"
    return [key["network"], str(found["layers"]), *times, spread, f"{found['error']:+.1%}"]
