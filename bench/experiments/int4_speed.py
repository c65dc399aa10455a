"""Milliseconds of products of 4-bit codes: sums of 16 bits beside 32, and beside everyone else.

All take turns in one process and on one thread, so that whatever else the machine does falls on
all alike. It measures one processor and says nothing of another.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from bench.claim import judged
from bench.experiments import Cell, Cells, Table, values
from bench.experiments.int4_gemm import _random
from bench.experiments.int4_rivals import NBITS, TORCH, rivals
from bench.stats import median
from pliant.math.gemm import panels, product
from pliant.math.gemm_loops import WIDTH

Settings = Mapping[str, Any]
LIBRARIES = ("numba", "onnx", "onnxruntime")
SHORT, LONG, PLAIN, FLOAT = "16-bit sums", "32-bit sums", "plain PyTorch", "PyTorch float32"
WARM = 3  # calls that are not timed


def cells(settings: Settings) -> list[Cell]:
    """List every shape, several times."""
    return [
        Cell({"shape": shape, "seed": turn}, {"calls": settings["calls"]})
        for shape in settings["shapes"]
        for turn in range(settings["turns"])
    ]


def measure(cell: Cell, watch: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Time one call of each in turn, many times; medians."""
    torch.set_num_threads(1)
    rows, depth, columns = cell.key["shape"]
    left, right = (_random(n, depth, seed) for n, seed in ((rows, 0), (columns, 1)))
    packed, real = panels(right, WIDTH, 4), (left.float(), right.float().T.contiguous())
    calls: dict[str, Callable[[], Any]] = {
        SHORT: lambda: product(left, packed, 4, block=290),
        LONG: lambda: product(left, packed, 4, block=290, sums=32),
        PLAIN: lambda: product(left, packed, 4, plain=True),
        FLOAT: lambda: real[0] @ real[1],
    }
    for name, rival in rivals(right).items():
        calls[name] = lambda rival=rival: rival.multiply(left)
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(WARM + cell.plan["calls"]):
        for name, run in calls.items():
            began = time.perf_counter()
            run()
            if turn >= WARM:
                spent[name].append(1000 * (time.perf_counter() - began))
    found = {f"ms {name}": round(statistics.median(row), 4) for name, row in spent.items()}
    pairs = zip(spent[LONG], spent[SHORT], strict=True)
    return found | {"times": round(statistics.median(long / short for long, short in pairs), 3)}


def claims(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Say whether sums of 16 bits are faster than the same loops with sums of 32."""
    return [
        judged(
            f"{_name(shape)}: sums of 16 bits are faster than of 32",
            *(values(cells, "times", shape=shape), ">", 1, "x"),
        )
        for shape in settings["shapes"]
    ]


def summary(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Give the medians of every cell."""
    return [{**cell["key"], **cell["values"]} for cell in cells]


def tables(settings: Settings, cells: Cells) -> list[Table]:
    """Give milliseconds by shape."""
    names = (SHORT, LONG, PLAIN, FLOAT, TORCH, NBITS)
    rows = [
        [
            _name(shape),
            *(f"{median(values(cells, f'ms {name}', shape=shape)) or 0:.3f}" for name in names),
        ]
        for shape in settings["shapes"]
    ]
    title = f"Medians of {settings['calls']} calls in turn, one thread, ms"
    return [Table(title, ["rows x depth x columns", *names], rows)]


def _name(shape: list[int]) -> str:
    return " x ".join(map(str, shape))
