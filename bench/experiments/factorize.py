"""Tucker-2 of every convolution of large networks, beside TensorLy at the same ranks."""

import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from bench.claim import claim
from bench.experiments import Cell, Cells, Table, pick
from pliant import zoo
from pliant.errors import require
from pliant.math.tucker import tucker2

Settings = Mapping[str, Any]
LIBRARIES = ("tensorly",)
RANDOM, DECAYING = "random", "decaying"


def cells(settings: Settings) -> list[Cell]:
    """List every convolution of every network, with every kind of kernel."""
    rows = []
    for network in settings["networks"]:
        convs = _convs(network)[: settings.get("layers")]
        for kind in settings["kernels"]:
            for layer, shape in convs:
                ranks = [_rank(shape[1], settings["rank"]), _rank(shape[0], settings["rank"])]
                plan = {"shape": shape, "ranks": ranks, "repetitions": settings["repetitions"]}
                rows.append(Cell({"network": network, "kernels": kind, "layer": layer}, plan))
    return rows


def measure(cell: Cell, watch: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Factorize one kernel by both, in turn; the median time of each and the error of each."""
    plan = cell.plan
    weight = kernel(plan["shape"], cell.key["kernels"])
    rivals: dict[str, Callable[..., Tensor]] = {"pliant": _pliant, "tensorly": _tensorly}
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    errors: dict[str, float] = {}
    _tensorly(weight[:4, :4], [2, 2])  # imports and set-up are nobody's time
    for _ in range(plan["repetitions"]):
        for name, factorize in rivals.items():
            began = time.perf_counter()
            made = factorize(weight, plan["ranks"])
            seconds[name].append(time.perf_counter() - began)
            errors[name] = _error(weight, made)
    return {
        **{f"seconds_{name}": statistics.median(row) for name, row in seconds.items()},
        **{f"error_{name}": value for name, value in errors.items()},
    }


def claims(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Say how errors and times compare, for each network and kind of kernel."""
    asked, rows = settings["claims"], []
    for row in summary(settings, cells):
        name = f"all convolutions of {row['network']} ({row['kernels']} kernels)"
        whole = row.get("layers") == row["wanted"]
        text = f"Error over TensorLy's, the largest ratio of {name}"
        ratio = row["error_ratio"]["largest"] if whole else None
        rows.append(claim(text, ratio, "<=", asked["error"], "x"))
        times = row["times_faster"] if whole else None
        rows.append(claim(f"Times faster than TensorLy, {name}", times, ">=", asked["faster"], "x"))
    return rows


def summary(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Give total seconds and the ratio of errors, a row per network and kind of kernel."""
    rows = []
    for network in settings["networks"]:
        for kind in settings["kernels"]:
            found = [c["values"] for c in pick(cells, network=network, kernels=kind)]
            wanted = len(_convs(network)[: settings.get("layers")])
            row: dict[str, Any] = {"network": network, "kernels": kind, "wanted": wanted}
            rows.append(row | (_totals(found) if found else {}))
    return rows


def tables(settings: Settings, cells: Cells) -> list[Table]:
    """Give one row per network and kind of kernel."""
    head = ["network", "kernels", "layers", "Pliant, s", "TensorLy, s", "times faster"]
    head += ["error over TensorLy's: median", "largest"]
    rows = []
    for row in summary(settings, cells):
        if "layers" not in row:
            continue
        ratio = row["error_ratio"]
        rows.append(
            [
                row["network"],
                row["kernels"],
                str(row["layers"]),
                f"{row['seconds_pliant']:.2f}",
                f"{row['seconds_tensorly']:.2f}",
                f"{row['times_faster']:.1f}",
                f"{ratio['median']:.5f}",
                f"{ratio['largest']:.5f}",
            ]
        )
    title = f"Tucker-2 at {settings['rank']:.0%} of the channels, sums of medians over layers"
    return [Table(title, head, rows)]


def kernel(shape: list[int], kind: str) -> Tensor:
    """Make a kernel: as initialised, or with channel spectra that fall as those of trained ones.

    A decaying kernel has random channel directions on both sides, the i-th weighted by
    1/sqrt(i).
    """
    random = torch.Generator().manual_seed(math.prod(shape))
    weight = torch.randn(shape, generator=random) / math.sqrt(math.prod(shape[1:]))
    if kind == RANDOM:
        return weight
    for axis in (0, 1):
        directions = torch.linalg.qr(torch.randn(shape[axis], shape[axis], generator=random))[0]
        fall = torch.arange(1, shape[axis] + 1).rsqrt()
        weight = torch.tensordot(directions * fall, weight, dims=([1], [axis])).movedim(0, axis)
    return weight.contiguous()


def _totals(found: list[dict[str, Any]]) -> dict[str, Any]:
    ours = sum(values["seconds_pliant"] for values in found)
    theirs = sum(values["seconds_tensorly"] for values in found)
    ratios = [v["error_pliant"] / v["error_tensorly"] for v in found if v["error_tensorly"]]
    return {
        "layers": len(found),
        "seconds_pliant": ours,
        "seconds_tensorly": theirs,
        "times_faster": theirs / ours,
        "error_ratio": {"median": statistics.median(ratios), "largest": max(ratios)},
    }


@cache
def _convs(network: str) -> list[tuple[str, list[int]]]:
    model = zoo.build(network)
    return [
        (name, list(module.weight.shape))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    ]


def _rank(channels: int, share: float) -> int:
    return max(1, math.ceil(channels * share))


def _pliant(weight: Tensor, ranks: list[int]) -> Tensor:
    a_in, core, a_out = tucker2(weight, *ranks)
    return torch.einsum("rs,qruv,tq->tsuv", a_in, core, a_out)


def _tensorly(weight: Tensor, ranks: list[int]) -> Tensor:
    tensorly = require("tensorly", "dev")
    tensorly.set_backend("pytorch")
    partial = require("tensorly.decomposition", "dev").partial_tucker
    with warnings.catch_warnings(action="ignore"):  # of unfoldings with fewer columns than rows
        (core, (a_out, a_in)), _ = partial(weight, rank=ranks[::-1], modes=[0, 1], init="svd")
    return torch.einsum("sr,qruv,tq->tsuv", a_in, core, a_out)


def _error(weight: Tensor, made: Tensor) -> float:
    """Relative error, computed in float64."""
    dense = weight.double()
    return float((dense - made.double()).norm() / dense.norm())
