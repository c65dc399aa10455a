"""Training methods beside plain training of the same network, each in the case it is made for."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bench.claim import judged
from bench.compress import Values, scored
from bench.data import pooled_digits
from bench.experiments import Cell, Cells, Table, by_seed, paired, values
from bench.small import cnn, method_of, seeded
from bench.stats import mean, plus_minus, spread
from pliant.data import Data, Train
from pliant.data.noise import noisy_labels
from pliant.drivers.loop import epochs_of, evaluate, fit
from pliant.run import start

Settings = Mapping[str, Any]
Watch = Callable[[dict[str, Any]], None]
TITLES = {"accuracy": "test accuracy, %", "train_accuracy": "training accuracy, %"}


def cells(settings: Settings) -> list[Cell]:
    """List all trainings, all of the first seed first."""
    shared = {"widths": settings["widths"], "images": settings["images"]}
    rows = []
    for seed in settings["seeds"]:
        for name, rival in settings["rivals"].items():
            plan = {"spec": "", "drop": 0.0, "noise": None, **shared, **rival}
            plan["train"] = {**settings["train"], **rival.get("train", {})}
            rows.append(Cell({"rival": name, "seed": seed}, plan))
    return rows


def measure(cell: Cell, watch: Watch) -> Values:
    """Train one network from random weights, and score it on clean digits."""
    plan, seed = cell.plan, cell.key["seed"]
    data = noisy(pooled_digits(plan["images"]), plan["noise"], seed)
    model: Any = seeded(seed, lambda: network(plan["widths"], plan["drop"]))
    method, train = method_of(plan["spec"]), Train(**plan["train"])
    steps = epochs_of(method, data, train, seed=seed).steps
    run = start(model, method, data=data, steps=steps, seed=seed)
    fit(run, data, train, watch=watch)
    run.finish()
    found = scored(model, data) | {"steps": steps, "cosine": round(likeness(model, data), 5)}
    return found | {"train_accuracy": evaluate(model, data, "train").accuracy}


def claims(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Compare pairs of rivals by the differences of the seeds that they share."""
    rows = []
    for asked in settings["claims"]:
        name = asked.get("value", "accuracy")
        own, other = (by_seed(cells, name, rival=asked[who]) for who in ("own", "other"))
        if asked.get("ratio"):
            found = [other[seed] / own[seed] for seed in own if seed in other]
            rows.append(judged(asked["text"], found, asked["how"], asked["target"], "x"))
        else:
            found = paired(own, other, 100)
            rows.append(judged(asked["text"], found, asked["how"], asked["target"], "points"))
    return rows


def summary(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Give mean and deviation of every rival."""
    rows: list[dict[str, Any]] = []
    for name in settings["rivals"]:
        row: dict[str, Any] = {"rival": name, "steps": mean(values(cells, "steps", rival=name))}
        for value in (*TITLES, "cosine"):
            found = values(cells, value, rival=name)
            row[value] = {"mean": mean(found), "sd": spread(found), "seeds": len(found)}
        rows.append(row)
    return rows


def tables(settings: Settings, cells: Cells) -> list[Table]:
    """Give one row per rival."""
    head = ["training", "method", "epochs", "steps", *TITLES.values(), "cosine of class means"]
    rows = []
    for name, rival in settings["rivals"].items():
        found = {value: values(cells, value, rival=name) for value in (*TITLES, "cosine", "steps")}
        spec = f"`{rival['spec']}`" if rival.get("spec") else ""
        epochs = {**settings["train"], **rival.get("train", {})}["epochs"]
        points = [plus_minus([100 * v for v in found[value]]) for value in TITLES]
        steps = f"{mean(found['steps']) or 0:.0f}"
        rows.append([name, spec, f"{epochs:g}", steps, *points, plus_minus(found["cosine"], 3)])
    return [Table("Digits of 14 x 14 pixels", head, rows)]


# ---------------------------------------------------------------- what is trained, and on what


def network(widths: list[int], drop: float) -> nn.Sequential:
    """Build a small network with batch norms; with dropouts behind its poolings if asked."""
    layers: list[nn.Module] = []
    for layer in cnn(1, widths):
        layers.append(layer)
        if drop and isinstance(layer, nn.MaxPool2d):
            layers.append(nn.Dropout(drop))
    return nn.Sequential(*layers)


def noisy(data: Data, noise: Mapping[str, Any] | None, seed: int) -> Data:
    """Make a share of the training labels wrong."""
    if noise is None:
        return data
    images, labels = data.train
    wrong = noisy_labels(labels.long(), noise["rate"], 10, noise["kind"], seed=seed)
    return replace(data, train=(images, wrong))


@torch.no_grad()
def likeness(model: nn.Sequential, data: Data) -> float:
    """Return the mean absolute cosine between the mean features of two classes of test digits."""
    model.eval()
    features, labels = [], []
    for images, numbers in data.batches("test", 500):
        features.append(model[:-1](images))
        labels.append(numbers)
    rows, numbers = torch.cat(features), torch.cat(labels)
    means: Tensor = torch.stack([rows[numbers == k].mean(0) for k in numbers.unique()])
    unit = means / means.norm(dim=1, keepdim=True).clamp_min(1e-12)
    gram = (unit @ unit.T).abs()
    return float((gram.sum() - gram.trace()) / (gram.numel() - len(gram)))
