"""What came out: plain data that every renderer reads, and the compressed network with it."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pliant.cost import Cost, LayerCost, layer_costs
from pliant.edits import Edit
from pliant.edits import sizes as elastic
from pliant.errors import PliantError
from pliant.files import artifact
from pliant.latency.compare import Timing
from pliant.latency.target import machine
from pliant.run import Run

AXES = ("params", "macs", "bytes")
LIBRARIES = ("pliant", "torch", "lightning-fabric", "onnxruntime", "numpy")


@dataclass(frozen=True)
class Side:
    """The network before or after: its costs and what it scores; None where not measured.

    ``latency_spread_ms`` is half the distance between the quartiles of the measured times.
    """

    params: int
    macs: int
    bytes: int
    latency_ms: float | None = None
    accuracy: float | None = None
    loss: float | None = None
    uncounted: tuple[str, ...] = ()
    latency_spread_ms: float | None = None


@dataclass(frozen=True)
class LayerRow:
    """One layer, changed or left alone.

    Args:
        layer: its name in the dense network.
        kind: its class there.
        form: what it became: ``dense``, or the form of its factorization.
        ranks: the ranks of the form, empty where it stayed dense.
        kept: channels kept of how many, where channels were removed.
        before: params, macs and bytes in the dense network; latency, the milliseconds of the
            layer alone, where it was measured.
        after: the same now.
        reason: why it was left alone; of a changed layer a warning, empty without one.
    """

    layer: str
    kind: str
    form: str
    ranks: tuple[int, ...]
    kept: tuple[int, int] | None
    before: dict[str, Any]
    after: dict[str, Any]
    reason: str = ""


@dataclass(frozen=True)
class Report:
    """Everything worth knowing about one compression, as plain data.

    ``history`` is the run's log: rows with ``step`` and ``epoch`` and any of ``loss``,
    ``accuracy``, ``lr``, ``phase``, ``ranks`` (by layer), ``spectra`` (singular values by layer
    and unfolding) and ``warnings`` (by layer). ``seconds`` is by stage, ``export`` what was
    written and how it compares, ``target`` where milliseconds were measured and how sure their
    comparison is. ``sizes`` are those of an elastic network, each by itself, from the largest;
    empty for any other.
    """

    model: str
    data: str
    method: dict[str, Any]
    budget: dict[str, Any]
    before: Side
    after: Side
    layers: tuple[LayerRow, ...]
    met: bool
    misses: tuple[str, ...]
    history: tuple[dict[str, Any], ...]
    seconds: dict[str, float]
    seed: int
    device: str
    versions: dict[str, str]
    export: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    target: dict[str, Any] = field(default_factory=dict)
    sizes: tuple[Side, ...] = ()

    def to_json(self) -> str:
        """Return the report as JSON; numbers that are not finite become null."""
        return json.dumps(_finite(asdict(self)), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read a report back.

        Raises:
            PliantError: the text is not a report.
        """
        try:
            raw = json.loads(text)
            raw["before"], raw["after"] = (Side(**_tuples(raw[s])) for s in ("before", "after"))
            raw["sizes"] = tuple(Side(**_tuples(row)) for row in raw.get("sizes", ()))
            raw["layers"] = tuple(LayerRow(**_tuples(row)) for row in raw["layers"])
            raw["history"], raw["misses"] = tuple(raw["history"]), tuple(raw["misses"])
            return cls(**raw)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise PliantError(
                f"The text must be a report as Report.to_json writes it, but is not "
                f"({type(error).__name__}: {error}); make it anew."
            ) from error


@dataclass(frozen=True)
class Result:
    """A compressed network, the edits that made it, and the report.

    Args:
        model: plain modules only; use it as any other.
        edits: rebuild its shape from the dense architecture.
        report: see ``Report``.
    """

    model: nn.Module
    edits: tuple[Edit, ...]
    report: Report

    def save(
        self, path: str | Path, *, source: str | None = None, encode: str | None = None
    ) -> Path:
        """Write the network to one ``.pliant`` file that ``pliant.load`` rebuilds.

        Args:
            path: where to; an earlier ``.pliant`` file is replaced, once the new one is complete,
                and a file of another kind is refused.
            source: what builds the dense network, for commands: a zoo name or module:callable.
            encode: store tensors coded where that is smaller, without loss: ``hac`` by Huffman,
                ``ans`` at the entropy, ``auto`` in whichever is smallest.

        Raises:
            OutputError: a file of another kind is there, or the file cannot be written.
        """
        return artifact.save(path, self.model, self.edits, source=source, encode=encode)


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
    """Return one row for every layer of the dense network, changed or not."""
    now: dict[str, list[LayerCost]] = {layer: [] for layer in run.layers}
    for name, row in layer_costs(run.model, run.example).items():
        if (owner := _owner(name, now)) is not None:
            now[owner].append(row)
    edits: dict[str, list[Edit]] = {layer: [] for layer in run.layers}
    for edit in run.edits:
        if (owner := _owner(edit.layer, edits)) is not None:
            edits[owner].append(edit)
    noted = [row["warnings"] for row in run.log if "warnings" in row]
    warnings = {layer: text for row in noted for layer, text in row.items()}
    return tuple(
        _row(run, layer, edits[layer], now[layer], warnings.get(layer, "")) for layer in run.layers
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
        reason=warning if edits else run.reasons.get(layer) or _default_reason(before),
    )


def _times(run: Run, layer: str, *, changed: bool) -> tuple[dict[str, float], dict[str, float]]:
    """Milliseconds of a layer before and after, empty where it was not measured."""
    if run.clock is None or layer not in run.clock.layers:
        return {}, {}
    before, after = run.clock.layers[layer]
    return {"latency": before}, {"latency": after if changed else before}


def _default_reason(before: LayerCost) -> str:
    if len(before.weight) > 1:
        return "the method changes no shapes here"
    return "nothing to factorize: no kernel with channels"


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


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def _tuples(row: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
