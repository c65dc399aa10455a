"""Experiments: settings in a JSON file, and the code that measures with them.

The code is a module of this folder, named by the settings' "experiment", with

    cells(settings)            every measurement, in order
    measure(cell, watch)       one of them: a pure function of the cell, hence resumable
    claims(settings, cells)    what was to be shown, computed from measured cells
    summary(settings, cells)   means and spreads, as plain data
    tables(settings, cells)    the same for people
"""

import importlib
import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pliant.errors import PliantError

HERE = Path(__file__).parent
Cells = list[dict[str, Any]]  # measured: {"key": ..., "values": ..., ...}


@dataclass(frozen=True)
class Cell:
    """One measurement.

    Args:
        key: what it is called in the results: rival, budget, seed.
        plan: everything else that it depends on; a cell with another plan is measured anew.
    """

    key: dict[str, Any]
    plan: dict[str, Any]


@dataclass(frozen=True)
class Table:
    """A table of the report."""

    title: str
    head: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Experiment:
    """Settings and the code that measures with them."""

    name: str
    settings: dict[str, Any]
    quick: bool = False

    @property
    def code(self) -> Any:
        """The module that measures."""
        return code(self.settings)


def code(settings: Mapping[str, Any]) -> Any:
    """Import the module that settings name."""
    return importlib.import_module(f"bench.experiments.{settings['experiment']}")


def names() -> list[str]:
    """List all experiments."""
    return sorted(path.stem for path in HERE.glob("*.json"))


def load(name: str, *, quick: bool = False) -> Experiment:
    """Read an experiment; a quick one takes over the overrides under "quick".

    Raises:
        PliantError: there is no such experiment.
    """
    if name not in names():
        raise PliantError(f"There is no bench {name!r}: choose one of {', '.join(names())}.")
    settings = json.loads((HERE / f"{name}.json").read_text())
    short = settings.pop("quick", {})
    return Experiment(name, settings | short if quick else settings, quick)


def pick(cells: Cells, **key: Any) -> Cells:
    """Return the measured cells whose key has these values, refused ones left out."""
    return [
        cell
        for cell in cells
        if "refused" not in cell and all(cell["key"].get(k) == v for k, v in key.items())
    ]


def values(cells: Cells, name: str, **key: Any) -> list[float]:
    """Return one value of all cells whose key fits."""
    return [c["values"][name] for c in pick(cells, **key) if c["values"].get(name) is not None]


def by_seed(cells: Cells, name: str, **key: Any) -> dict[Any, float]:
    """Return one value of all cells whose key fits, by their seed (None without one).

    Several cells of one seed are averaged.
    """
    found: dict[Any, list[float]] = {}
    for cell in pick(cells, **key):
        if (value := cell["values"].get(name)) is not None:
            found.setdefault(cell["key"].get("seed"), []).append(value)
    return {seed: statistics.fmean(row) for seed, row in found.items()}


def paired(own: Mapping[Any, float], other: Mapping[Any, float], scale: float = 1.0) -> list[float]:
    """Return the differences of two rivals, one for each seed that both have.

    What has no seed (a checkpoint, a network before any training) stands beside every seed.
    """
    if None in other:
        other = dict.fromkeys(own, other[None])
    return [round(scale * (own[seed] - other[seed]), 9) for seed in own if seed in other]
