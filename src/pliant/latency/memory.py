"""What a clock has measured, as plain data: a run that goes on makes its plans of it again."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from torch import nn

from pliant.edits import Edit, to_json
from pliant.latency.compare import Timing
from pliant.latency.table import VERSION, LatencyTable
from pliant.latency.target import Target

if TYPE_CHECKING:
    from pliant.latency.clock import Clock

KEPT = ("dense_ms", "weighed")  # fields of a clock that are plain data and make plans


def name_of(network: nn.Module, edits: Sequence[Edit] = ()) -> str:
    """Return a short name for what decides the time of a network with edits: modules and shapes."""
    tensors = itertools.chain(network.named_parameters(), network.named_buffers())
    shapes = [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in tensors]
    text = f"{network!r} {shapes} {to_json(edits)}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def remembered(clock: Clock) -> dict[str, Any]:
    """Return all that a clock has measured, but for the finished network, as plain data."""
    return {
        "version": VERSION,
        "network": name_of(clock.dense),
        "target": clock.target.plain(),
        "machine": clock.target.digest(),
        "timing": asdict(clock.timing),
        "times": dict(clock.table.times),
        "layers": dict(clock.layers),
        **{name: dict(getattr(clock, name)) for name in KEPT},
    }


def recalled(saved: Mapping[str, Any] | None, dense: nn.Module, target: Target) -> dict[str, Any]:
    """Return the fields of a clock that measured before; none if it was another network or target.

    On another machine the run goes on with the times of the one on which it was planned. They
    are not mixed with the table there, since only times of one machine can be compared.
    """
    if not saved or not _belongs(saved, dense, target):
        return {}
    here = saved["machine"] == target.digest()
    table = LatencyTable.of(target) if here else LatencyTable(target)
    table.past |= saved["times"]
    plain = {name: dict(saved[name]) for name in KEPT}
    return {"table": table, "timing": Timing(**saved["timing"]), **plain}


def recall_layers(clock: Clock | None, saved: Mapping[str, Any] | None) -> None:
    """Give a clock the times of layers that a report of the saved run would show."""
    if clock and saved and _belongs(saved, clock.dense, clock.target):
        clock.layers = dict(saved["layers"])


def _belongs(saved: Mapping[str, Any], dense: nn.Module, target: Target) -> bool:
    asked = (VERSION, name_of(dense), target.plain())
    return (saved.get("version"), saved["network"], saved["target"]) == asked
