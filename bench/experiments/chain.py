"""One chain of methods of three families: size of the file and accuracy after each stage."""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import pliant
from bench import tasks
from bench.claim import claim, judged
from bench.experiments import Cell, Cells, Table, pick
from pliant import zoo
from pliant.render import words

Settings = Mapping[str, Any]
Watch = Callable[[dict[str, Any]], None]
CHAIN = "chain"


def cells(settings: Settings) -> list[Cell]:
    """List the one measurement."""
    plan = {**tasks.plan(settings), "train": settings["train"], "stages": settings["stages"]}
    return [Cell({"rival": CHAIN}, plan)]


def measure(cell: Cell, watch: Watch) -> dict[str, Any]:
    """Compress by the chain, write the file, and see that it comes back."""
    plan = cell.plan
    dense, data = tasks.base(plan, watch), tasks.data_of(plan)
    chain = pliant.chain(*(_stage(stage) for stage in plan["stages"]))
    train = pliant.Train(**plan["train"])
    result = pliant.compress(dense, data, chain, train=train, control=True, watch=watch)
    stages = [row for row in result.report.history if "finished" in row]
    with tempfile.TemporaryDirectory() as folder:
        path = result.save(Path(folder) / "coded.pliant", encode="auto")
        file, image = path.stat().st_size, data.example()[0]
        again = pliant.load(path, zoo.build(plan["network"])).eval()
        with torch.no_grad():
            same = torch.equal(again(image), result.model(image))
        onnx = pliant.to_onnx(result.model, Path(folder) / "model.onnx", (image,), tolerance=0.5)
    return {
        "checkpoint": tasks.base_facts(plan),
        "dense": {"bytes": result.report.before.bytes, "accuracy": result.report.before.accuracy},
        "accuracy": result.report.after.accuracy,
        "params": result.report.after.params,
        "file": file,
        "loads_equal": same,
        "onnx_bytes": onnx.bytes,
        "onnx_difference": onnx.max_difference,
        "stages": stages,
    }


def claims(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Say how much smaller the file is, and what that costs in accuracy."""
    asked, found = settings["claims"], pick(cells, rival=CHAIN)
    v = found[0]["values"] if found else {}
    smaller = v["dense"]["bytes"] / v["file"] if v else None
    gap = [100 * (v["dense"]["accuracy"] - v["accuracy"])] if v else []
    equal = float(v["loads_equal"]) if v else None
    text = "The chain's file is smaller than the float32 state of the dense network: times"
    return [
        claim(text, smaller, ">=", asked["smaller"], "x"),
        judged("The dense control is more accurate by", gap, "<=", asked["within"], "points"),
        claim("The loaded file gives the same outputs bit for bit", equal, ">=", 1, ""),
    ]


def summary(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Give what was measured."""
    return [{**cell["key"], **cell["values"]} for cell in cells]


def tables(settings: Settings, cells: Cells) -> list[Table]:
    """Give the stages: the waterfall in numbers."""
    found = pick(cells, rival=CHAIN)
    if not found:
        return []
    v = found[0]["values"]
    dense = v["dense"]
    rows = [["dense control", "", words.size(dense["bytes"]), "1.0×", _points(dense["accuracy"])]]
    rows += [
        _row(row["finished"], row["params"], row["file"], dense["bytes"], row["accuracy"])
        for row in v["stages"]
    ]
    rows.append(_row("coded file", v["params"], v["file"], dense["bytes"], v["accuracy"]))
    head = ["after", "parameters", "file", "smaller", "accuracy, %"]
    return [Table("After each stage", head, rows)]


def _stage(stage: Mapping[str, Any]) -> pliant.Stage:
    budget = pliant.Budget(**stage["budget"]) if "budget" in stage else None
    return pliant.Stage(pliant.method(stage["method"]), budget, stage["share"])


def _row(name: str, params: int, size: int, dense: int, accuracy: float) -> list[str]:
    return [name, f"{params:,}", words.size(size), words.times(dense, size), _points(accuracy)]


def _points(share: float) -> str:
    return f"{100 * share:.2f}"
