"""Norm loss beside weight decay: where norms end, what settings matter, what a step costs."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from bench.claim import claim, judged
from bench.compress import Values, compress
from bench.data import cifar10, some
from bench.experiments import Cell, Cells, Table, by_seed, paired, values
from bench.small import cnn, method_of, seeded, step_ratio
from bench.stats import mean, median, plus_minus, spread
from pliant import zoo
from pliant.data import Train, load
from pliant.math.filters import filter_norms
from pliant.surgery.select import weighted

Settings = Mapping[str, Any]
OURS, THEIRS = "norm loss", "weight decay"
BATCH = 128  # at which the learning rate is the one that the settings name


def cells(settings: Settings) -> list[Cell]:
    """List all measurements, rivals side by side."""
    rows = []
    norms, grid = settings["norms"], settings["robustness"]
    shared = {"images": norms["images"], "train": norms["train"]}
    for seed in norms["seeds"]:
        for name in settings["rivals"]:
            plan = shared | _rival(settings, name, norms["strength"][name])
            rows.append(Cell({"study": "norms", "rival": name, "seed": seed}, plan))
    for seed in grid["seeds"]:
        for batch in grid["batches"]:
            for name, strengths in grid["strength"].items():
                for strength in strengths:
                    key = {"study": "robustness", "rival": name, "strength": strength}
                    plan = {"train": grid["train"], "widths": grid["widths"]}
                    plan |= _rival(settings, name, strength)
                    rows.append(Cell({**key, "batch": batch, "seed": seed}, plan))
    plan = {**settings["overhead"], **_rival(settings, OURS, norms["strength"][OURS])}
    count = plan.pop("repetitions")
    return rows + [Cell({"study": "overhead", "repetition": n}, plan) for n in range(count)]


def measure(cell: Cell, watch: Callable[[dict[str, Any]], None]) -> Values:
    """Measure one cell of one study."""
    studies = {"norms": _norms, "robustness": _robustness, "overhead": _overhead}
    return studies[cell.key["study"]](cell)


def claims(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Say what the card of the method asks for."""
    asked = settings["claims"]
    gaps = values(cells, "gap", study="norms", rival=OURS)
    decayed, ours = (by_seed(cells, "sd", study="norms", rival=name) for name in (THEIRS, OURS))
    ratios = [decayed[seed] / ours[seed] for seed in ours if seed in decayed]
    grids = {name: _grids(settings, cells, name) for name in settings["rivals"]}
    widths = {
        name: {seed: max(row) - min(row) for seed, row in found.items()}
        for name, found in grids.items()
    }
    tops = {name: {s: max(row) for s, row in found.items()} for name, found in grids.items()}
    leads, best = paired(widths[THEIRS], widths[OURS], 100), paired(tops[OURS], tops[THEIRS], 100)
    step = median(values(cells, "ratio", study="overhead"))
    return [
        judged("ResNet-20's filters end at norm one: mean distance", gaps, "<=", asked["gap"], ""),
        judged("Norms spread wider under weight decay", ratios, ">=", asked["spread"], "x"),
        judged("Accuracy depends less on settings than under decay", leads, ">=", 0, "points"),
        judged("At its best it is not behind weight decay", best, ">=", -asked["best"], "points"),
        claim("A step with norm loss over one with decay", step, "<=", asked["step"], "x"),
    ]


def summary(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Give the norms, and the mean accuracy of every setting."""
    rows: list[dict[str, Any]] = []
    for rival in settings["rivals"]:
        row: dict[str, Any] = {"study": "norms", "rival": rival}
        for name in ("mean", "sd", "gap", "accuracy"):
            found = values(cells, name, study="norms", rival=rival)
            if found:
                row[name] = {"mean": mean(found), "sd": spread(found), "seeds": len(found)}
        rows.append(row)
    for rival, strengths in settings["robustness"]["strength"].items():
        for strength in strengths:
            for batch in settings["robustness"]["batches"]:
                found = _accuracies(cells, rival, strength, batch)
                row = {"rival": rival, "strength": strength, "batch": batch}
                rows.append(row | {"accuracy": {"mean": mean(found), "sd": spread(found)}})
    return rows


def tables(settings: Settings, cells: Cells) -> list[Table]:
    """Give a table of norms, and one of the settings."""
    head = ["training", "mean norm", "sd over filters", "mean distance to one", "accuracy, %"]
    norms = []
    for rival in settings["rivals"]:
        found = {
            n: values(cells, n, study="norms", rival=rival)
            for n in ("mean", "sd", "gap", "accuracy")
        }
        digits = [plus_minus(found[n], 3) for n in ("mean", "sd", "gap")]
        norms.append([rival, *digits, plus_minus([100 * v for v in found["accuracy"]])])
    batches = settings["robustness"]["batches"]
    grid = [
        [
            f"{rival}, {strength:g}",
            *(
                plus_minus([100 * v for v in _accuracies(cells, rival, strength, batch)])
                for batch in batches
            ),
        ]
        for rival, strengths in settings["robustness"]["strength"].items()
        for strength in strengths
    ]
    return [
        Table("ResNet-20 after half an epoch", head, norms),
        Table("Digits, accuracy in %", ["strength", *(f"batch {b}" for b in batches)], grid),
    ]


def _rival(settings: Settings, name: str, strength: float) -> dict[str, Any]:
    """Put the strength where it belongs: into the method, or into the optimizer's decay."""
    rival = settings["rivals"][name]
    decay = strength if rival["decay"] == "{}" else rival["decay"]
    return {"spec": rival["spec"].format(strength), "decay": decay}


def _accuracies(cells: Cells, rival: str, strength: float, batch: int) -> list[float]:
    key = {"study": "robustness", "rival": rival, "strength": strength, "batch": batch}
    return values(cells, "accuracy", **key)


def _grids(settings: Settings, cells: Cells, rival: str) -> dict[int, list[float]]:
    """The accuracy of every setting, for each seed that has them all."""
    grid = settings["robustness"]
    found = [
        by_seed(cells, "accuracy", study="robustness", rival=rival, strength=strength, batch=batch)
        for strength in grid["strength"][rival]
        for batch in grid["batches"]
    ]
    seeds = [seed for seed in grid["seeds"] if all(seed in row for row in found)]
    return {seed: [row[seed] for row in found] for seed in seeds}


# ---------------------------------------------------------------- the studies


@torch.no_grad()
def _norms(cell: Cell) -> Values:
    plan, seed = cell.plan, cell.key["seed"]
    model = seeded(seed, lambda: zoo.build("resnet20"))
    train = Train(**plan["train"], weight_decay=plan["decay"])
    with torch.enable_grad():
        data = some(cifar10(), plan["images"])
        found = compress(model, data, method_of(plan["spec"]), {}, train, seed=seed)
    norms = torch.cat([filter_norms(layer.weight) for layer in weighted(model).values()])
    return found | {
        "mean": float(norms.mean()),
        "sd": float(norms.std()),
        "gap": float((norms - 1).abs().mean()),
    }


def _robustness(cell: Cell) -> Values:
    plan, seed, batch = cell.plan, cell.key["seed"], cell.key["batch"]
    settings = {**plan["train"], "lr": plan["train"]["lr"] * batch / BATCH}
    train = Train(**settings, batch=batch, weight_decay=plan["decay"])
    model, data = seeded(seed, lambda: cnn(1, plan["widths"])), replace(load("digits"), val=None)
    return compress(model, data, method_of(plan["spec"]), {}, train, seed=seed)


def _overhead(cell: Cell) -> Values:
    plan = cell.plan
    model, method = seeded(0, lambda: zoo.build("resnet20")), method_of(plan["spec"])
    return step_ratio(model, method, batch=plan["batch"], steps=plan["steps"], decay=5e-4)
