"""Milliseconds in onnxruntime: float32, our integers, and those of its own quantization.

All rivals run in turn in one process, so that whatever else the machine does falls on all alike.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench import tasks
from bench.claim import claim
from bench.experiments import Cell, Cells, Table, values
from bench.experiments.ptq import quantized_by_onnxruntime, session
from bench.stats import median
from pliant.files.onnx import to_onnx
from pliant.registry import build
from pliant.run import start

Settings = Mapping[str, Any]
LIBRARIES = ("onnx", "onnxruntime")
FLOAT, OURS, THEIRS = "float32", "pliant", "onnxruntime"
WARM = 5  # calls that are not timed


def cells(settings: Settings) -> list[Cell]:
    """List every network at every batch."""
    names = ("spec", "samples", "threads", "calls")
    return [
        Cell(
            {"task": task, "batch": batch},
            {**tasks.plan({**settings, "task": task}), **{name: settings[name] for name in names}},
        )
        for task in settings["tasks"]
        for batch in settings["batches"]
    ]


def measure(cell: Cell, watch: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Time one call of each rival in turn, many times; medians, and ratios of neighbours."""
    plan = cell.plan
    model, data = tasks.base(plan, watch).eval(), tasks.data_of(plan)
    image = data.example(cell.key["batch"])[0].numpy()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = {FLOAT: to_onnx(model, folder / "float.onnx", data.example(2)).path}
        paths[THEIRS] = quantized_by_onnxruntime(paths[FLOAT], folder, data, plan["samples"], 0)
        run = start(model, build(plan["spec"]), data=data)
        run.finish()
        paths[OURS] = to_onnx(run.model, folder / "ours.onnx", data.example(2)).path
        rivals = {rival: session(path, plan["threads"]) for rival, path in paths.items()}
    feed = {rival: {s.get_inputs()[0].name: image} for rival, s in rivals.items()}
    spent: dict[str, list[float]] = {rival: [] for rival in rivals}
    for call in range(WARM + plan["calls"]):
        for rival, running in rivals.items():
            began = time.perf_counter()
            running.run(None, feed[rival])
            if call >= WARM:
                spent[rival].append(1000 * (time.perf_counter() - began))
    found = {f"ms_{rival}": round(statistics.median(row), 4) for rival, row in spent.items()}
    for rival in (OURS, THEIRS):
        pairs = zip(spent[FLOAT], spent[rival], strict=True)
        found[f"times_{rival}"] = round(statistics.median(a / b for a, b in pairs), 3)
    return found


def claims(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Say how many times faster integers are."""
    return [
        claim(
            f"{task}, batch {batch}: {OURS}'s integers are faster than {FLOAT}",
            median(values(cells, f"times_{OURS}", task=task, batch=batch)),
            ">",
            1,
            "x",
        )
        for task in settings["tasks"]
        for batch in settings["batches"]
    ]


def summary(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Give the medians, a row per network and batch."""
    return [{**cell["key"], **cell["values"]} for cell in cells]


def tables(settings: Settings, cells: Cells) -> list[Table]:
    """Give milliseconds, and how many times faster than float32."""
    head = ["network", "batch", f"{FLOAT}, ms", f"{OURS}, ms", "times faster"]
    head += [f"{THEIRS}'s own, ms", "times faster"]
    rows = [
        [
            cell["key"]["task"],
            str(cell["key"]["batch"]),
            f"{cell['values'][f'ms_{FLOAT}']:.2f}",
            f"{cell['values'][f'ms_{OURS}']:.2f}",
            f"{cell['values'][f'times_{OURS}']:.2f}",
            f"{cell['values'][f'ms_{THEIRS}']:.2f}",
            f"{cell['values'][f'times_{THEIRS}']:.2f}",
        ]
        for cell in cells
    ]
    title = f"Medians of {settings['calls']} calls in turn, {settings['threads']} threads"
    return [Table(title, head, rows)]
