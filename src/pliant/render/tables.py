"""Rows of tables that several renderers draw: stages of a chain, sizes, what was tried."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pliant.render import quantities
from pliant.render.quantities import human, known, percent, seconds, size
from pliant.result import Report


@dataclass(frozen=True)
class StageRow:
    """The network when one stage of a chain was over."""

    name: str
    params: int
    bytes: int
    accuracy: float | None

    @property
    def said(self) -> str:
        """What stands beside its bar."""
        return f", {percent(self.accuracy)}" if known(self.accuracy) else ""

    def cells(self) -> tuple[str, str, str]:
        """Parameters, bytes and accuracy as text."""
        return human(self.params), size(self.bytes), percent(self.accuracy, 2)


def stages(report: Report) -> list[StageRow]:
    """Return the stages of a chain, the dense network first; nothing where there is one only.

    The last row is the same network in a coded file, where coding makes it smaller.
    """
    seen = [row for row in report.history if "finished" in row]
    if not seen:
        return []
    dense, last = report.before, seen[-1]
    rows = [StageRow("dense", dense.params, dense.bytes, dense.accuracy)]
    rows += [StageRow(r["finished"], r["params"], r["file"], r["accuracy"]) for r in seen]
    if last["coded"] < last["file"]:
        rows.append(StageRow("coded file", last["params"], last["coded"], last["accuracy"]))
    return rows


SIZE_COLUMNS = ("size", "params", "MACs", "accuracy", "ms")


def sizes(report: Report) -> list[tuple[str, str, str, str, str]]:
    """Return a row of cells for every size of an elastic network, from the largest.

    The first is its share of the dense parameters, by which `pliant.load` finds it.
    """
    return [
        (
            percent(size.params / report.before.params if report.before.params else None),
            human(size.params),
            human(size.macs),
            percent(size.accuracy, 2),
            human(size.latency_ms),
        )
        for size in report.sizes
    ]


def tried(report: Report) -> list[dict[str, Any]]:
    """Return a row for every network that was tried on the way, with a name and a note."""
    return [{**row, "name": _tried_name(row), "note": _tried_note(row)} for row in report.tried]


def tried_columns(report: Report) -> tuple[str, ...]:
    """Name the columns of numbers in the table of what was tried."""
    return ("params", "bytes", "ms", quantities.metric(report.tried), "points lost", "took")


def tried_cells(report: Report) -> list[tuple[str, ...]]:
    """Return the cells of the table of what was tried: a name, `tried_columns`, a note."""
    return [
        (
            row["name"],
            human(row.get("params")),
            size(row.get("bytes")),
            human(row.get("latency_ms")),
            quantities.score(row),
            quantities.lost(row),
            seconds(row.get("seconds")),
            row["note"],
        )
        for row in tried(report)
    ]


def _tried_name(row: Mapping[str, Any]) -> str:
    share = row.get("share")
    sized = "" if share is None else f"at {100 * share:.1f} %"
    trained = "trained" if row.get("trained") else ""
    return ", ".join(filter(None, (row.get("plan", ""), sized, trained)))


def _tried_note(row: Mapping[str, Any]) -> str:
    if row.get("chosen"):
        return f"chosen: {row['why']}" if "why" in row else "chosen"
    if "refused" in row:
        return str(row["refused"])
    if row.get("met") is False:
        return "misses the limits"
    return "" if row.get("within") else "too much"
