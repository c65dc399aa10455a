"""What a clock has measured, as plain data: a run that goes on makes its plans of it again."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import nn

from pliant.edits import Edit, to_json
from pliant.latency.compare import Timing
from pliant.latency.table import VERSION, LatencyTable
from pliant.latency.target import Target

KEPT = ("dense_ms", "weighed")  # fields of a clock that are plain data and make plans


def name_of(network: nn.Module, edits: Sequence[Edit] = ()) -> str:
    """Return a short name for what decides the time of a network with edits: modules and shapes."""
    tensors = itertools.chain(network.named_parameters(), network.named_buffers())
    shapes = [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in tensors]
    text = f"{network!r} {shapes} {to_json(edits)}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def remembered(
    dense: nn.Module, target: Target, timing: Timing, table: LatencyTable, **kept: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what was measured of a network on a target as plain data; ``kept`` as it is."""
    return {
        "version": VERSION,
        "network": name_of(dense),
        "target": target.plain(),
        "machine": target.digest(),
        "timing": asdict(timing),
        "times": dict(table.times),
        **{name: dict(values) for name, values in kept.items()},
    }


def recalled(saved: Mapping[str, Any] | None, dense: nn.Module, target: Target) -> dict[str, Any]:
    """Return the fields of a clock that measured before; none if it was another network or target.

    On another machine the run goes on with the times of the one on which it was planned. They
    are not mixed with the table there, since only times of one machine can be compared.
    """
    if not saved or not belongs(saved, dense, target):
        return {}
    here = saved["machine"] == target.digest()
    table = LatencyTable.of(target) if here else LatencyTable(target)
    table.past |= saved["times"]
    plain = {name: dict(saved[name]) for name in KEPT}
    return {"table": table, "timing": Timing(**saved["timing"]), **plain}


def belongs(saved: Mapping[str, Any], dense: nn.Module, target: Target) -> bool:
    """Say whether what was remembered is of this network on this target."""
    asked = (VERSION, name_of(dense), target.plain())
    return (saved.get("version"), saved["network"], saved["target"]) == asked
