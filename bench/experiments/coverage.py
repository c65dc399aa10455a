"""What can be done with each architecture: counted, factorized, saved, exported, and how fast.

Every column is a fact of one network: what worked, with its figure, or why it did not.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bench.architectures import ARCHITECTURES, Architecture, Inputs
from bench.claim import claim
from bench.experiments import Cell, Cells, Table
from pliant.budget import Budget
from pliant.compose import resolve
from pliant.cost import cost
from pliant.data import Data
from pliant.edits import Factor, replay
from pliant.errors import BudgetError, PliantError
from pliant.files import artifact
from pliant.files.onnx import to_onnx
from pliant.latency import Target, compare
from pliant.math.forms import forms_for, max_ranks
from pliant.registry import construct, plain
from pliant.run import Run, start
from pliant.surgery.select import factorizable

Settings = Mapping[str, Any]
Values = dict[str, Any]
LIBRARIES = ("transformers", "torchvision", "timm", "onnxruntime")
COLUMNS = ("inspected", "factorized", "equal", "loaded", "exported", "faster")
CALIBRATION = (16, 16)  # samples of the batches to look at


def cells(settings: Settings) -> list[Cell]:
    """List all networks."""
    keep = ("method", "share", "equal", "export", "rounds")
    plan = {name: settings[name] for name in keep} | {"method": plain(resolve(settings["method"]))}
    names = settings["networks"] or list(ARCHITECTURES)
    return [
        Cell({"network": name}, {**plan, "family": ARCHITECTURES[name].family}) for name in names
    ]


def measure(cell: Cell, watch: Callable[[dict[str, Any]], None]) -> Values:
    """Try everything with one network; a failure is a value with its reason.

    Raises:
        MissingExtraError: the network's package cannot be imported: the row is skipped.
    """
    network, plan = ARCHITECTURES[cell.key["network"]], cell.plan
    dense = network.build()
    made: dict[str, Run] = {}

    def smaller() -> Values:
        run, share = _factorized(copy.deepcopy(dense), network, plan)
        made["run"] = run
        after = cost(run.model, run.example)
        return {"share": after.params / run.cost.params, "asked": share, "edits": len(run.edits)}

    values: Values = {
        "inspected": _tried(lambda: _inspected(dense, network)),
        "factorized": _tried(smaller),
        "equal": _tried(lambda: _equal(dense, network, plan["equal"])),
    }
    run = made.get("run")
    for name, column in (("loaded", _loaded), ("exported", _exported), ("faster", _faster)):
        found = {"why": "it could not be factorized"}
        values[name] = _tried(lambda c=column: c(dense, run, network, plan)) if run else found
    left = run.reasons if run else factorizable(dense)[1]
    return values | {"left": dict(Counter(left.values()).most_common()), "layers": _count(dense)}


def claims(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Say that every column holds for every network that could be built."""
    rows = [cell for cell in cells if "refused" not in cell]
    texts = {
        "inspected": "are counted, layer by layer",
        "factorized": "are factorized without training",
        "equal": f"are equal at full rank, to {settings['equal']:g} of the largest output",
        "loaded": "come back from their file bit by bit",
        "exported": f"are exported to ONNX, outputs within {settings['export']:g}",
    }
    whole = len(cells) == len(settings["networks"] or ARCHITECTURES)
    return [
        claim(
            f"Of {len(rows)} networks that can be built here, {text}",
            sum("why" not in cell["values"][column] for cell in rows) if whole else None,
            ">=",
            len(rows),
            "networks",
        )
        for column, text in texts.items()
    ]


def summary(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Give a row per network: its columns, or why it was skipped."""
    return [
        cell["key"]
        | ({"skipped": cell["refused"]} if "refused" in cell else {"columns": cell["values"]})
        for cell in cells
    ]


def tables(settings: Settings, cells: Cells) -> list[Table]:
    """Give the matrix, and the reasons of all that is not in it."""
    head = ["network", "parameters", "factorized, share of params", "full rank, change"]
    head += ["loaded", "ONNX, difference", "dense, ms", "factorized, ms", "verdict"]
    head += ["layers factorized", "left alone"]
    matrix = Table("What works with which network", head, [_row(cell) for cell in cells])
    reasons = [[name, *row] for cell in cells for name in [_name(cell)] for row in _reasons(cell)]
    return [matrix, Table("What was left alone or failed, and why", _REASONS, reasons)]


_REASONS = ["network", "what", "layers", "why"]


def _name(cell: Mapping[str, Any]) -> str:
    return str(cell["key"]["network"])


def _row(cell: Mapping[str, Any]) -> list[str]:
    if "refused" in cell:
        return [_name(cell), f"skipped: {cell['refused']}", *[""] * 9]
    v = cell["values"]
    cross = {name: "**no**" for name in COLUMNS if "why" in v[name]}
    faster = v["faster"]
    return [
        _name(cell),
        cross.get("inspected") or f"{v['inspected']['params']:,}",
        cross.get("factorized") or f"{v['factorized']['share']:.2f}",
        cross.get("equal") or f"{v['equal']['change']:.1e}",
        cross.get("loaded") or "equal",
        cross.get("exported") or f"{v['exported']['difference']:.1e}",
        *(f"{faster[key]:.2f}" if key in faster else "" for key in ("dense_ms", "ms")),
        cross.get("faster") or faster["verdict"],
        str(v["factorized"].get("edits", 0)),
        str(sum(v["left"].values())),
    ]


def _reasons(cell: Mapping[str, Any]) -> list[list[str]]:
    if "refused" in cell:
        return []
    values = cell["values"]
    failed = [[name, "", values[name]["why"]] for name in COLUMNS if "why" in values[name]]
    unknown = values["inspected"].get("uncounted", [])
    if unknown:
        why = f"multiplies outside of layers with a known count ({', '.join(unknown[:2])}"
        failed.append(["uncounted", str(len(unknown)), f"{why}{', ...' if unknown[2:] else ''})"])
    return failed + [["left alone", str(n), why] for why, n in values["left"].items()]


# ---------------------------------------------------------------- the columns


def _tried(column: Callable[[], Values]) -> Values:
    """What a column found, or why it failed: whatever a network provokes is a finding."""
    try:
        return column()
    except Exception as error:
        kind = "" if isinstance(error, PliantError) else f"{type(error).__name__}: "
        return {"why": f"{kind}{str(error).strip().splitlines()[0] if str(error) else ''}"}


def _inspected(dense: nn.Module, network: Architecture) -> Values:
    found = cost(dense, network.inputs(1))
    return {"params": found.params, "macs": found.macs, "uncounted": list(found.uncounted)}


def _count(dense: nn.Module) -> int:
    layers, reasons = factorizable(dense)
    return len(layers) + len(reasons)


def _factorized(
    model: nn.Module, network: Architecture, plan: Mapping[str, Any]
) -> tuple[Run, float]:
    """Compress to the share asked for, or to the next tenth that can be reached."""
    data = Data(train=[network.inputs(size) for size in CALIBRATION])
    share = plan["share"]
    while True:
        try:
            method, budget = construct(**plan["method"]), Budget(params=share)
            run = start(model, method, budget, data=data)
            run.finish()
            return run, share
        except BudgetError:
            if share > 0.85:
                raise
            share = round(share + 0.1, 2)


def _equal(dense: nn.Module, network: Architecture, most: float) -> Values:
    """Factorize everything at full ranks, the forms in turn, and compare outputs."""
    model, edits = copy.deepcopy(dense), []
    for number, (name, module) in enumerate(factorizable(dense)[0].items()):
        forms = forms_for(module.weight.shape)
        form = forms[number % len(forms)]
        edits.append(Factor(name, form, max_ranks(module.weight.shape, form)))
    replay(model, edits)
    inputs = network.inputs(2)
    change = _change(_outputs(dense, inputs), _outputs(model, inputs))
    if not change <= most:
        raise PliantError(
            f"outputs change by {change:.2g} of the largest where {most:g} is allowed"
        )
    return {"change": change, "layers": len(edits)}


def _loaded(dense: nn.Module, run: Run, network: Architecture, plan: Mapping[str, Any]) -> Values:
    with tempfile.TemporaryDirectory() as folder:
        path = artifact.save(Path(folder) / "a.pliant", run.model, run.edits)
        again = artifact.load(path, network.build).eval()
        size = path.stat().st_size
    inputs = network.inputs(2)
    pairs = zip(_outputs(run.model.eval(), inputs), _outputs(again, inputs), strict=True)
    if not all(torch.equal(mine, other) for mine, other in pairs):
        raise PliantError("the outputs of the loaded network differ")
    return {"bytes": size}


def _exported(dense: nn.Module, run: Run, network: Architecture, plan: Mapping[str, Any]) -> Values:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.onnx"
        made = to_onnx(run.model, path, network.inputs(2), tolerance=plan["export"])
    return {"difference": made.max_difference, "bytes": made.bytes}


def _faster(dense: nn.Module, run: Run, network: Architecture, plan: Mapping[str, Any]) -> Values:
    """Time both networks in turn, twice."""
    target = Target("torch", threads=1)
    runs = [compare(dense, run.model, network.inputs(1), target) for _ in range(plan["rounds"])]
    verdicts = {found.verdict for found in runs}
    return {
        "dense_ms": round(statistics.median(found.a.median_ms for found in runs), 3),
        "ms": round(statistics.median(found.b.median_ms for found in runs), 3),
        "verdict": verdicts.pop() if len(verdicts) == 1 else "not distinguishable",
        "speedups": [round(found.speedup, 3) for found in runs],
    }


def _outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    with torch.inference_mode():
        return [leaf for leaf in tree_leaves(model(**inputs)) if isinstance(leaf, Tensor)]


def _change(before: list[Tensor], after: list[Tensor]) -> float:
    """The largest change of any number, relative to the largest of its tensor."""
    pairs = zip(before, after, strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-12)) for b, a in pairs)
