"""Measures CP rows of three convolutions beside the forms that Pliant chooses from, at equal error.

Kernels are those of a trained network: random ones have no CP structure to find.
"""

import statistics
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

import tensorly
import torch
from tensorly.decomposition import parafac
from torch import Tensor, nn

from bench import tasks
from bench.claim import claim
from bench.experiments import Cell, Cells, Table
from bench.experiments.fast_layers import candidates, error_of, plain_edit, table_of
from bench.stats import median
from pliant.cost import LayerCost, layer_costs
from pliant.edits import Factor
from pliant.latency import Target
from pliant.latency.compare import compared, interleaved
from pliant.nn.factorized import factorized

Settings = Mapping[str, Any]
LIBRARIES = ("tensorly", "onnxruntime")
TRIES = 6  # ranks at which CP is computed: a bisection between these shares of the channels
SHARES = (0.125, 2.0)
SWEEPS = 60


def cells(settings: Settings) -> list[Cell]:
    """List every layer."""
    names = ("share", "finalists", "targets")
    plan = {**tasks.plan(settings), **{name: settings[name] for name in names}}
    return [Cell({"layer": layer}, plan) for layer in settings["layers"]]


def measure(cell: Cell, watch: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Find the CP rank of equal error, then measure it in turn with the choice on each target."""
    plan, name = cell.plan, cell.key["layer"]
    model, data = tasks.base(plan, watch), tasks.data_of(plan)
    layer, cost = model.get_submodule(name), layer_costs(model, data.example())[name]
    assert isinstance(layer, nn.Conv2d)
    before = plain_edit(layer, plan["share"])
    error = error_of(layer.weight, before)
    rank, reached = cp_rank(layer.weight.detach(), error)
    return {
        "kernel": list(layer.weight.shape),
        "error": round(error, 4),
        "cp_rank": rank,
        "cp_error": round(reached, 4),
        "cp_macs": round(cost.macs / cp_macs(layer, rank, cost), 3),
        "times": {text: _timed(text, layer, cost, before, rank, plan) for text in plan["targets"]},
    }


def _timed(
    text: str, layer: nn.Conv2d, cost: LayerCost, before: Factor, rank: int, plan: Settings
) -> dict[str, Any]:
    target = Target.parse(text)
    shape = (target.batch, *cost.input)
    rows = candidates(table_of(target), layer, cost, float("inf"), shape)
    error = error_of(layer.weight, before) + 1e-6
    fast = (row.edit for row in rows if error_of(layer.weight, row.edit) <= error)
    edits = [before, *islice(fast, plan["finalists"])]
    modules = [layer, cp_row(layer, rank)]
    modules += [factorized(layer, edit.form, edit.ranks) for edit in edits]
    times = interleaved([target.layer_sampler(m, (torch.ones(shape),)) for m in modules], target)
    best = min(range(2, len(times)), key=lambda i: statistics.median(times[i]))
    chosen = edits[best - 2]
    return {
        "dense": round(1000 * statistics.median(times[0]), 4),
        "cp_speed": round(compared(times[0], times[1]).speedup, 3),
        "chosen": f"{chosen.form} {'/'.join(map(str, chosen.ranks))}",
        "chosen_error": round(error_of(layer.weight, chosen), 4),
        "chosen_macs": round(cost.macs / chosen.predict(cost).macs, 3),
        "chosen_speed": round(compared(times[0], times[best]).speedup, 3),
    }


def claims(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Say that leaving CP out costs no time anywhere."""
    rows = []
    for target in settings["targets"]:
        found = [row["cp_speed"] / row["chosen_speed"] for row in _times(cells, target)]
        whole = max(found) if len(found) == len(settings["layers"]) else None
        text = f"Speed of CP over that of the chosen form at equal error, the most on {target}"
        rows.append(claim(text, whole, "<=", 1, "x"))
    return rows


def summary(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Give the median speeds of each target."""
    return [
        {"target": target}
        | {
            name: median([row[name] for row in _times(cells, target)])
            for name in ("cp_speed", "chosen_macs", "chosen_speed")
        }
        for target in settings["targets"]
    ]


def tables(settings: Settings, cells: Cells) -> list[Table]:
    """Give one row per layer."""
    head = ["layer", "dense, ms", "error", "CP rank", "error", "MACs", "speed"]
    head += ["chosen", "error", "MACs", "speed"]
    title = "CP beside the chosen form, at the error of Tucker-2 at a quarter"
    return [
        Table(f"{target}: {title}", head, [_row(c, target) for c in cells if c["values"]])
        for target in settings["targets"]
    ]


def _times(cells: Cells, target: str) -> list[dict[str, Any]]:
    return [c["values"]["times"][target] for c in cells if c["values"]]


def _row(cell: Mapping[str, Any], target: str) -> list[str]:
    v, own = cell["values"], cell["values"]["times"][target]
    size = "×".join(map(str, v["kernel"]))
    first = [f"{cell['key']['layer']}, {size}", f"{own['dense']:.3g}", f"{v['error']:.3f}"]
    cp = [f"{v['cp_error']:.3f}", f"{v['cp_macs']:.2f}", f"{own['cp_speed']:.2f}"]
    best = [f"{own['chosen_error']:.3f}", f"{own['chosen_macs']:.2f}", f"{own['chosen_speed']:.2f}"]
    return [*first, str(v["cp_rank"]), *cp, own["chosen"], *best]


# ---------------------------------------------------------------- CP


def cp_rank(weight: Tensor, error: float) -> tuple[int, float]:
    """Return the lowest rank tried at which CP loses no more than ``error``, and what it loses.

    If none of them does, the largest: its error then says by how much it failed.
    """
    low, high = (max(1, round(share * max(weight.shape))) for share in SHARES)
    reached = cp_error(weight, high)
    for _ in range(TRIES if reached <= error else 0):
        middle = round((low * high) ** 0.5)
        if (found := cp_error(weight, middle)) <= error:
            high, reached = middle, found
        else:
            low = middle
    return high, reached


def cp_error(weight: Tensor, rank: int) -> float:
    """Return the squared error of alternating least squares, relative to the kernel's energy."""
    kernel = weight.flatten(2).float()
    with tensorly.backend_context("pytorch"):
        parts = parafac(kernel, rank, n_iter_max=SWEEPS, tol=1e-5, init="random", random_state=0)
        rest = kernel - tensorly.cp_to_tensor(parts)
    return float((rest**2).sum() / (kernel**2).sum())


def cp_row(layer: nn.Conv2d, rank: int) -> nn.Sequential:
    """Build the row of a CP kernel: 1x1, depthwise, 1x1."""
    size, stride, padding = layer.kernel_size, layer.stride, layer.padding
    return nn.Sequential(
        nn.Conv2d(layer.in_channels, rank, 1, bias=False),
        nn.Conv2d(rank, rank, size, stride, padding, groups=rank, bias=False),  # type: ignore[arg-type]
        nn.Conv2d(rank, layer.out_channels, 1, bias=layer.bias is not None),
    )


def cp_macs(layer: nn.Conv2d, rank: int, cost: LayerCost) -> int:
    """Count the multiply-accumulates of that row, counted as for every other network."""
    rows = layer_costs(nn.Sequential(cp_row(layer, rank)), (torch.zeros(1, *cost.input),))
    return sum(row.macs for row in rows.values())
