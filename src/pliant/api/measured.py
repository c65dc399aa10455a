"""What is measured of a compression: on which samples, and in which phase of the training."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pliant.cost import Example, counted
from pliant.data import Data, unpack
from pliant.data.splits import Split
from pliant.data.task import Task
from pliant.method import Method
from pliant.observe import spectra
from pliant.run import Run
from pliant.surgery.select import factorizable


@dataclass(frozen=True)
class Control(Method):
    """Only watches the spectra: the same training without any method."""

    only: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def prepare(self, run: Run) -> None:
        """Look before the first step."""
        self.after_epoch(run)

    def after_epoch(self, run: Run) -> None:
        """Note the singular values of every kernel."""
        layers, _ = factorizable(run.model, only=self.only, exclude=self.exclude)
        if layers:
            run.note(**spectra.row(layers, 0.95))


def known(value: float) -> float | None:
    """Return a number, None where it is not finite."""
    return value if math.isfinite(value) else None


def first_inputs(data: Data, split: Split, most: int) -> Iterator[Example]:
    """Give the inputs of a split, batch by batch, until there are enough."""
    seen = 0
    for batch in data.batches(split, 128):
        if seen >= most:
            return
        inputs = unpack(batch)[0]
        seen += counted(inputs)
        yield inputs


def scored_split(data: Data, task: Task | None) -> Split | None:
    """Name the split to measure scores on, None where nothing is labelled."""
    if task is not None and task.name == "none":
        return None
    own = task is not None and task.name in ("custom", "own")
    splits: tuple[Split, ...] = ("test", "val")
    for split in splits:
        if data.has(split):
            batch = next(iter(data.batches(split, 1)), None)
            there = batch is not None and (own or unpack(batch)[1] is not None)
            return split if there else None
    return None


def short(row: dict[str, Any]) -> dict[str, Any]:
    """Write singular values with five digits: reports draw them, nothing computes with them."""
    if "spectra" not in row:
        return row
    spectra = {
        layer: {side: [float(f"{s:.5g}") for s in values] for side, values in sides.items()}
        for layer, sides in row["spectra"].items()
    }
    return {**row, "spectra": spectra}


def phases(log: Sequence[Mapping[str, Any]], whole: float) -> dict[str, float]:
    """Share the seconds of a training out to its phases, those before a resumption too."""
    found: dict[str, float] = {}
    for row in log:
        if "phase" in row and "seconds" in row:
            found[row["phase"]] = found.get(row["phase"], 0.0) + row["seconds"]
    rest = max(0.0, whole - sum(found.values()))
    return {**found, "validate and finish" if found else "factorize": rest}
