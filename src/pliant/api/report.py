"""Fills a report: costs, times, a row for every layer, and what the result depends on."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

from pliant.cost import Cost, LayerCost, layer_costs
from pliant.edits import Edit
from pliant.edits import sizes as elastic
from pliant.latency.compare import Timing
from pliant.latency.target import machine
from pliant.result import LayerRow, Side
from pliant.run import Run

AXES = ("params", "macs", "bytes")


LIBRARIES = ("pliant", "torch", "lightning-fabric", "onnxruntime", "numpy")


def side(cost: Cost, *, accuracy: float | None = None, loss: float | None = None) -> Side:
    """Return a cost and its score as one side of a report."""
    return Side(
        params=cost.params,
        macs=cost.macs,
        bytes=cost.bytes,
        latency_ms=cost.latency_ms,
        accuracy=accuracy,
        loss=loss,
        uncounted=cost.uncounted,
    )


def timed(run: Run, before: Side, after: Side) -> tuple[Side, Side]:
    """Put the times of the dense and of the finished network into both sides, if measured."""
    if run.clock is None:
        return before, after
    old, new = run.clock.sides(run.model)
    return _took(before, old), _took(after, new)


def cuts(run: Run, measured: Callable[[nn.Module], Side]) -> tuple[Side, ...]:
    """Cut an elastic network to each of its sizes and measure it, as it comes out of the file.

    The time of the largest is that of the finished network: they are built alike.
    """
    rows = []
    for size in range(elastic.count(run.edits)):
        network = elastic.of_size(run.model, run.edits, size)
        row = measured(network)
        if run.clock is not None:
            timing = run.clock.beside(network) if size else run.clock.sides(run.model)[1]
            row = _took(row, timing)
        rows.append(row)
    return tuple(rows)


def _took(found: Side, timing: Timing) -> Side:
    return replace(found, latency_ms=timing.median_ms, latency_spread_ms=timing.spread_ms)


def where_timed(run: Run) -> dict[str, Any]:
    """Say where milliseconds were measured, and how sure the comparison of both networks is.

    ``times_faster`` is the median of the ratios, between the ends of its interval.
    """
    if run.clock is None:
        return {}
    final = run.clock.finish(run.model)
    return {
        "name": str(run.clock.target),
        **run.clock.target.plain(),
        "verdict": final.verdict,
        "times_faster": [final.low, final.speedup, final.high],
        "rounds": final.a.repeats,
    }


def layer_rows(run: Run) -> tuple[LayerRow, ...]:
    """Return one row for every layer of the dense network, changed or not, and for new ones."""
    now: dict[str, list[LayerCost]] = {layer: [] for layer in run.layers}
    new: dict[str, LayerCost] = {}
    for name, row in layer_costs(run.model, run.example).items():
        if (owner := _owner(name, now)) is not None:
            now[owner].append(row)
        else:
            new[name] = row
    edits: dict[str, list[Edit]] = {layer: [] for layer in run.layers}
    around = [edit for edit in run.edits if _owner(edit.layer, edits) is None]  # of whole blocks
    for edit in run.edits:
        if (owner := _owner(edit.layer, edits)) is not None:
            edits[owner].append(edit)
    for layer, found in edits.items():
        if not found and _changed(run.layers[layer], now[layer]):
            found += [edit for edit in around if _within(layer, edit.layer)]
    noted = [row["warnings"] for row in run.log if "warnings" in row]
    warned = {layer: text for row in noted for layer, text in row.items()}
    rows = [_row(run, n, edits[n], now[n], warned.get(n, "")) for n in run.layers]
    return (*rows, *(_added(name, row, around) for name, row in new.items()))


def _within(name: str, block: str) -> bool:
    return not block or name.startswith(f"{block}.")


def _changed(before: LayerCost, parts: Sequence[LayerCost]) -> bool:
    return any(getattr(before, axis) != sum(getattr(p, axis) for p in parts) for axis in AXES)


def _added(name: str, row: LayerCost, around: Sequence[Edit]) -> LayerRow:
    """The row of a layer that the dense network did not have."""
    forms = [edit.form for edit in around if _within(name, edit.layer)]
    return LayerRow(
        layer=name,
        kind=row.kind,
        form=forms[-1] if forms else "added",
        ranks=(),
        kept=None,
        before=dict.fromkeys(AXES, 0),
        after={axis: getattr(row, axis) for axis in AXES},
    )


def _owner(name: str, layers: Mapping[str, Any]) -> str | None:
    """The dense layer that a layer of now was made from: itself, or the nearest around it."""
    while name not in layers and name:
        name = name.rpartition(".")[0]
    return name if name in layers else None


def _row(
    run: Run, layer: str, edits: Sequence[Edit], parts: Sequence[LayerCost], warning: str
) -> LayerRow:
    before, times = run.layers[layer], _times(run, layer, changed=bool(edits))
    return LayerRow(
        layer=layer,
        kind=before.kind,
        form="+".join(dict.fromkeys(edit.form for edit in edits)) or "dense",
        ranks=tuple(rank for edit in edits for rank in getattr(edit, "ranks", ())),
        kept=next((kept for e in reversed(edits) if (kept := getattr(e, "kept", None))), None),
        before={axis: getattr(before, axis) for axis in AXES} | times[0],
        after={axis: sum(getattr(p, axis) for p in parts) for axis in AXES} | times[1],
        reason=warning if edits else run.reasons.get(layer) or _default_reason(run, layer, before),
    )


def _times(run: Run, layer: str, *, changed: bool) -> tuple[dict[str, float], dict[str, float]]:
    """Milliseconds of a layer before and after, empty where it was not measured."""
    if run.clock is None or layer not in run.clock.layers:
        return {}, {}
    before, after = run.clock.layers[layer]
    return {"latency": before}, {"latency": after if changed else before}


def _default_reason(run: Run, layer: str, before: LayerCost) -> str:
    """Say of a layer of which the method says nothing why it is as it was."""
    if len(before.weight) > 1:
        return f"{before.kind} is no kind of layer that this method changes"
    for name, parameter in _parameters(run.model, layer):
        if sum(size > 1 for size in parameter.shape) > 1:
            shape = " x ".join(map(str, parameter.shape))
            return f"its parameter {name} ({shape}) lies in no layer of a kind that can be replaced"
    return "no matrix to change: its parameters are vectors"


def _parameters(model: nn.Module, name: str) -> list[tuple[str, nn.Parameter]]:
    try:
        return list(model.get_submodule(name).named_parameters(recurse=False))
    except AttributeError:
        return []


def versions() -> dict[str, str]:
    """Return the versions that a result depends on: Python, the libraries and the machine."""
    found = {
        "python": platform.python_version(),
        "machine": f"{machine()}, {torch.get_num_threads()} threads",
    }
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found
