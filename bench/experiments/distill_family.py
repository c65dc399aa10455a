"""Distillation beside plain training: the same network trained on, made smaller, or grown again."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from bench.compress import Values, compress
from bench.data import cifar10, shrunk, some
from bench.experiments import Cell, Cells, Table, values
from bench.experiments.train_family import claims as compared
from bench.small import cnn, method_of, seeded
from bench.stats import mean, plus_minus, spread
from pliant.compose import together
from pliant.data import Train
from pliant.method import Method

Settings = Mapping[str, Any]
VALUES = ("accuracy", "params", "macs", "seconds")


def cells(settings: Settings) -> list[Cell]:
    """List all trainings, all of the first seed first."""
    shared = {name: settings[name] for name in ("widths", "images", "side", "before")}
    rows = []
    for seed in settings["seeds"]:
        for name, rival in settings["rivals"].items():
            plan = {"spec": "", "budget": {}, **shared, **rival}
            plan["train"] = {**settings["train"], **rival.get("train", {})}
            rows.append(Cell({"rival": name, "seed": seed}, plan))
    return rows


def measure(cell: Cell, watch: Callable[[dict[str, Any]], None]) -> Values:
    """Train a network, then train it on with a method, to a budget if there is one."""
    plan, seed = cell.plan, cell.key["seed"]
    data = shrunk(some(cifar10(), plan["images"]), plan["side"])
    model = seeded(seed, lambda: cnn(3, plan["widths"]))
    before = compress(model, data, Method(), {}, Train(**plan["before"]), seed=seed)
    began = time.monotonic()
    spec, train = plan["spec"], Train(**plan["train"])
    method = method_of(spec) if isinstance(spec, str) else together(*spec)
    found = compress(model, data, method, plan["budget"], train, seed=seed, watch=watch)
    found["seconds"] = round(time.monotonic() - began, 2)
    kept = ("accuracy", "loss", "params", "macs", "steps", "misses", "seconds")
    return {"teacher": before["accuracy"], **{name: found[name] for name in kept}}


def claims(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Compare pairs of rivals by the differences of the seeds that they share."""
    return compared(settings, cells)


def summary(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Give mean and deviation of every rival."""
    rows: list[dict[str, Any]] = []
    for name in settings["rivals"]:
        row: dict[str, Any] = {"rival": name}
        for value in VALUES:
            found = values(cells, value, rival=name)
            row[value] = {"mean": mean(found), "sd": spread(found), "seeds": len(found)}
        rows.append(row)
    return rows


def tables(settings: Settings, cells: Cells) -> list[Table]:
    """Give one row per rival."""
    head = ["training", "method", "budget", "test accuracy, %", "parameters", "seconds"]
    rows = []
    for name, rival in settings["rivals"].items():
        budget = ", ".join(f"{axis}={n:g}" for axis, n in rival.get("budget", {}).items())
        accuracy = plus_minus([100 * v for v in values(cells, "accuracy", rival=name)])
        params, seconds = (mean(values(cells, v, rival=name)) or 0 for v in ("params", "seconds"))
        parts = rival.get("spec", "")
        spec = " with ".join(f"`{part}`" for part in ([parts] if isinstance(parts, str) else parts))
        spec = spec if parts else ""
        rows.append([name, spec, budget, accuracy, f"{params:,.0f}", f"{seconds:.0f}"])
    return [Table("Small images, a network that was trained before", head, rows)]
