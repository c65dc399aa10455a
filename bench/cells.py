"""Measures the cells of an experiment, keeping each one on disk as soon as it is measured."""

import json
import os
import shutil
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import tasks
from bench.experiments import Cell, Cells, Experiment
from bench.provenance import now, source
from pliant.errors import PliantError


@dataclass
class Store:
    """The measured cells of one experiment, a file each; a cell with another plan is another."""

    folder: Path

    @staticmethod
    def of(experiment: Experiment) -> "Store":
        """Return where an experiment keeps its cells; quick ones lie apart."""
        return Store(tasks.WORK / ("quick" if experiment.quick else "full") / experiment.name)

    def get(self, cell: Cell) -> dict[str, Any] | None:
        """Return a cell that was measured, None if it was not or its file is damaged."""
        return _read(self._path(cell))

    def put(self, cell: Cell, measured: dict[str, Any]) -> None:
        """Keep a measured cell: whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self._path(cell).with_suffix(".part")
        part.write_text(json.dumps(measured, indent=1))
        os.replace(part, self._path(cell))

    def forget(self, word: str | None = None) -> None:
        """Delete all cells, or those with this word among the values of their key."""
        if word is None:
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        for path in self.folder.glob("*.json"):
            kept = _read(path)
            if kept is None or word in map(str, kept["key"].values()):
                path.unlink()

    def _path(self, cell: Cell) -> Path:
        words = "-".join(str(value) for value in cell.key.values() if value is not None)
        name = "".join(c if c.isalnum() or c in "-." else "_" for c in words)
        return self.folder / f"{name}-{tasks.digest([cell.key, cell.plan])}.json"


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return None


@dataclass
class Progress:
    """Counts cells and seconds, to say how long the rest takes."""

    total: int
    done: int = 0
    seconds: list[float] = field(default_factory=list)

    def left(self) -> float:
        """Estimate the seconds that are left from the mean so far."""
        return (self.total - self.done) * sum(self.seconds) / max(1, len(self.seconds))


def measure_all(
    experiment: Experiment,
    store: Store,
    show: Callable[[Cell, dict[str, Any], Progress], None],
    watch: Callable[[Cell, dict[str, Any]], None],
) -> tuple[Cells, list[str]]:
    """Measure every cell that is not on disk yet.

    A refusal (a `PliantError`) is a result and is kept for the report; it is tried again next
    time. Any other error leaves its cell out, and the rest is measured all the same.

    Returns:
        the measured cells in order, and the names of those that failed.
    """
    wanted: list[Cell] = experiment.code.cells(experiment.settings)
    progress, found, failed = Progress(len(wanted)), [], []
    for cell in wanted:
        kept = store.get(cell)
        if kept is None or "refused" in kept:
            try:
                kept = _measured(experiment, cell, watch)
            except Exception:
                traceback.print_exc()
                failed.append(name_of(cell))
                progress.done += 1
                continue
            store.put(cell, kept)
            progress.seconds.append(kept["seconds"])
        progress.done += 1
        found.append(kept)
        show(cell, kept, progress)
    return found, failed


def name_of(cell: Cell) -> str:
    """Name a cell for people."""
    words = {"seed": "seed {}", "budget": "at {}"}
    return " ".join(
        words.get(key, "{}").format(value) for key, value in cell.key.items() if value is not None
    )


def _measured(
    experiment: Experiment, cell: Cell, watch: Callable[[Cell, dict[str, Any]], None]
) -> dict[str, Any]:
    began = time.monotonic()
    made: dict[str, Any] = {"key": cell.key, "date": now(), **source()}
    try:
        made["values"] = experiment.code.measure(cell, lambda row: watch(cell, row))
    except PliantError as error:
        made |= {"refused": str(error), "values": {}}
    return made | {"seconds": round(time.monotonic() - began, 2)}
