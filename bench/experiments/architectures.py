"""What can be done with other people's networks: ranks, channels, bits, files, ONNX.

Every network is tried in a process of its own, with a time limit. A column is a fact: what came
out, or why nothing did. Torch-Pruning gets the same networks, and is told which layers answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from bench import tries
from bench.claim import claim
from bench.experiments import Cell, Cells, Table
from bench.networks import NETWORKS

Settings = Mapping[str, Any]
Values = dict[str, Any]
PACKAGES = ("torchvision", "timm", "transformers", "diffusers", "ultralytics", "torch_pruning")
LIBRARIES = (*PACKAGES, "segmentation_models_pytorch", "torchaudio", "torchcrepe", "onnxruntime")
COLUMNS = tries.COLUMNS
CHECKS = {
    "ranks": "works",
    "channels": "works",
    "bits": "works",
    "torch_pruning": "works",
    "files": "equal",
    "onnx": "agrees",
}
"""Columns and the fact in each that counts."""


def cells(settings: Settings) -> list[Cell]:
    """List all networks."""
    plan = {name: settings[name] for name in ("tries", "seconds")}
    names = settings["networks"] or list(NETWORKS)
    return [Cell({"network": name}, {**plan, "package": NETWORKS[name].package}) for name in names]


def measure(cell: Cell, watch: Callable[[dict[str, Any]], None]) -> Values:
    """Try everything with one network, in a process of its own.

    Raises:
        MissingExtraError: the network's package is not installed: the row is skipped.
    """
    return tries.apart(cell.key["network"], cell.plan["tries"], cell.plan["seconds"])


def claims(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Say how many networks each column must work on, and that nothing is wrong."""
    rows = [cell["values"] for cell in cells if "refused" not in cell]
    whole = len(rows) == len(settings["networks"] or NETWORKS)
    count = {name: sum(holds(row, name) for row in rows) for name in CHECKS}
    share = {name: 100 * number / max(1, len(rows)) for name, number in count.items()}
    least = settings["targets"]
    texts = {
        "ranks": "lose a tenth of their parameters or more to lower ranks",
        "bits": "take 60 % of their bytes or less in 8 bits",
        "channels": "lose channels, and run",
        "files": "come back from every file bit by bit",
        "onnx": "are exported to ONNX after their ranks are lowered",
    }
    said = [
        claim(
            f"Of {len(rows)} networks nobody chose for it, {text}",
            share[name] if whole else None,
            ">=",
            least[name],
            "%",
        )
        for name, text in texts.items()
    ]
    times = count["channels"] / max(1, count["torch_pruning"])
    failures = [why for row in rows for why in _failures(row)]
    return [
        *said,
        claim(
            "Networks that lose channels, for each on which Torch-Pruning does so",
            times if whole else None,
            ">=",
            least["times"],
            "times",
        ),
        claim(
            "Results that are wrong",
            sum(len(row.get("wrong", [])) for row in rows) if whole else None,
            "<=",
            0,
            "results",
        ),
        claim(
            "Errors that are no sentence of Pliant's, or time that ran out",
            sum(kind == "raw" for kind, _ in failures) if whole else None,
            "<=",
            0,
            "errors",
        ),
    ]


def holds(values: Values, column: str) -> bool:
    """Say whether a column worked."""
    return bool(values.get(column, {}).get(CHECKS[column]))


def _failures(values: Values) -> list[tuple[str, str]]:
    found = [values[name] for name in COLUMNS if name != "torch_pruning" and name in values]
    return [("raw" if row.get("raw") else "said", row["why"]) for row in found if "why" in row]


def summary(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Give a row per package: how many networks, and on how many each column works."""
    rows = []
    packages = dict.fromkeys(cell["plan"]["package"] for cell in _planned(settings, cells))
    for package in packages:
        some = [c["values"] for c in _planned(settings, cells) if c["plan"]["package"] == package]
        counts = {name: sum(holds(row, name) for row in some) for name in CHECKS}
        rows.append({"package": package, "networks": len(some), **counts})
    return rows


def _planned(settings: Settings, measured: Cells) -> list[dict[str, Any]]:
    plans = {cell.key["network"]: cell.plan for cell in cells(settings)}
    rows = [cell for cell in measured if "refused" not in cell]
    return [{**cell, "plan": plans[cell["key"]["network"]]} for cell in rows]


def tables(settings: Settings, cells: Cells) -> list[Table]:
    """Give counts by package, the matrix, and the reasons of all that is not in it."""
    counts = [list(map(str, row.values())) for row in summary(settings, cells)]
    heads = ["package", "networks", "low rank", "channels", "int8", "Torch-Pruning", "files"]
    matrix = ["network", "parameters", "low rank, share left", "channels, share left"]
    matrix += ["Torch-Pruning, share left", "int8, share of bytes", "int8, error", "files"]
    matrix += ["ONNX, difference", "layers", "left alone", "seconds", "peak MB"]
    return [
        Table("On how many networks it works", [*heads, "ONNX"], counts),
        Table("What works with which network", matrix, [_row(cell) for cell in cells]),
        Table("What failed, and why", ["network", "what", "why"], _whys(cells)),
        Table("Why layers keep their ranks", ["layers", "why"], _left(cells)),
    ]


def _row(cell: Mapping[str, Any]) -> list[str]:
    name = str(cell["key"]["network"])
    if "refused" in cell:
        return [name, "skipped", *[""] * 11]
    v = cell["values"]

    def fact(column: str, key: str, text: str = "{:.2f}") -> str:
        return text.format(v[column][key]) if v.get(column, {}).get(key) is not None else "no"

    return [
        name,
        f"{v['network']['params']:,}" if "params" in v.get("network", {}) else "no",
        *(fact(column, "share") for column in ("ranks", "channels", "torch_pruning", "bits")),
        fact("bits", "error", "{:.1%}"),
        "equal" if holds(v, "files") else "no",
        fact("onnx", "difference", "{:.0e}"),
        str(v.get("ranks", {}).get("layers", "")),
        str(sum(v.get("ranks", {}).get("left", {}).values())),
        f"{sum(v.get(column, {}).get('seconds', 0) for column in COLUMNS):.0f}",
        str(v.get("peak_mb", "")),
    ]


def _whys(cells: Cells) -> list[list[str]]:
    rows = []
    for cell in cells:
        name, values = str(cell["key"]["network"]), cell.get("values", {})
        if "refused" in cell:
            rows.append([name, "all", cell["refused"]])
        for column in COLUMNS:
            if "why" in values.get(column, {}):
                rows.append([name, column, values[column]["why"]])
        rows += [[name, "**wrong**", why] for why in values.get("wrong", [])]
    return rows


def _left(cells: Cells) -> list[list[str]]:
    counts: dict[str, int] = {}
    for cell in cells:
        for why, number in cell.get("values", {}).get("ranks", {}).get("left", {}).items():
            general = tries.general(why)
            counts[general] = counts.get(general, 0) + number
    ranked = sorted(counts.items(), key=lambda pair: -pair[1])
    return [[str(number), why] for why, number in ranked]
