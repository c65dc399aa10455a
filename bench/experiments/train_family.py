"""Training methods beside plain training of the same network, each in the case it is made for."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bench.claim import judged
from bench.compress import Values, scored
from bench.data import SMALL
from bench.experiments import Cell, Cells, Table, by_seed, paired, values
from bench.small import cnn, method_of, seeded
from bench.stats import mean, plus_minus, spread
from pliant.data import Data, Train
from pliant.data.noise import noisy_labels
from pliant.drivers.loop import epochs_of, evaluate, fit
from pliant.math.margins import margins
from pliant.method import Method
from pliant.run import Run, start

Settings = Mapping[str, Any]
Watch = Callable[[dict[str, Any]], None]
TITLES = {"accuracy": "test accuracy, %", "train_accuracy": "training accuracy, %"}
MORE = {  # of some plans only
    "right": "right among the labels kept, %",
    "by_norm": "channels out by norm, %",
    "by_chance": "channels out by chance, %",
}
SMALL_LOSS = "small losses, "


def cells(settings: Settings) -> list[Cell]:
    """List all trainings, all of the first seed first."""
    shared = {name: settings[name] for name in ("widths", "images")}
    shared |= {name: settings[name] for name in ("data", "prune") if name in settings}
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
    source = SMALL[plan.get("data", "digits")]
    clean = source.load(plan["images"])
    data = noisy(clean, plan["noise"], seed)
    model: Any = seeded(seed, lambda: network(plan["widths"], plan["drop"], source.channels))
    method, train = _method(plan["spec"]), Train(**plan["train"])
    steps = epochs_of(method, data, train, seed=seed).steps
    run = start(model, method, data=data, steps=steps, seed=seed)
    fit(run, data, train, watch=watch)
    run.finish()
    found = scored(model, data) | {"steps": steps, "cosine": round(likeness(model, data), 5)}
    found |= {"train_accuracy": evaluate(model, data, "train").accuracy}
    if plan["noise"]:
        found |= {"right": right(model, data, clean.train[1], plan["noise"]["rate"])}
    if share := plan.get("prune"):
        found |= pruned(model, data, share)
    return found


def claims(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Compare pairs of rivals by the differences of the seeds that they share."""
    rows = []
    for asked in settings["claims"]:
        name = asked.get("value", "accuracy")
        own = by_seed(cells, name, rival=asked["own"])
        other = by_seed(cells, asked.get("other_value", name), rival=asked["other"])
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
        for value in (*TITLES, *MORE, "cosine"):
            found = values(cells, value, rival=name)
            if value in MORE and not found:
                continue
            row[value] = {"mean": mean(found), "sd": spread(found), "seeds": len(found)}
        rows.append(row)
    return rows


def tables(settings: Settings, cells: Cells) -> list[Table]:
    """Give one row per rival."""
    more = {name: title for name, title in MORE.items() if values(cells, name)}
    titles = TITLES | more
    head = ["training", "method", "epochs", "steps", *titles.values(), "cosine of class means"]
    rows = []
    for name, rival in settings["rivals"].items():
        found = {value: values(cells, value, rival=name) for value in (*titles, "cosine", "steps")}
        spec = f"`{rival['spec']}`" if rival.get("spec") else ""
        epochs = {**settings["train"], **rival.get("train", {})}["epochs"]
        points = [plus_minus([100 * v for v in found[value]]) for value in titles]
        steps = f"{mean(found['steps']) or 0:.0f}"
        rows.append([name, spec, f"{epochs:g}", steps, *points, plus_minus(found["cosine"], 3)])
    return [Table(SMALL[settings.get("data", "digits")].title, head, rows)]


# ---------------------------------------------------------------- what is trained, and on what


def network(widths: list[int], drop: float, channels: int = 1) -> nn.Sequential:
    """Build a small network with batch norms; with dropouts behind its poolings if asked."""
    layers: list[nn.Module] = []
    for layer in cnn(channels, widths):
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


@dataclass(frozen=True)
class SmallLosses(Method):
    """Trains on the samples of a batch whose losses are the smallest, as co-teaching does.

    With one network, and the share that is left out growing over the first tenth of the training.
    """

    noise: float

    def weigh(self, run: Run, losses: Tensor, output: Any, batch: Any) -> Tensor:
        """Return 1 for the smallest losses, 0 for the others."""
        share = self.noise * min(1.0, run.step / (0.1 * run.steps))
        kept = losses.argsort()[: max(1, round((1 - share) * len(losses)))]
        return torch.zeros_like(losses).index_fill(0, kept, 1.0)


def _method(spec: str) -> Method:
    if spec.startswith(SMALL_LOSS):
        return SmallLosses(float(spec.removeprefix(SMALL_LOSS)))
    return method_of(spec)


@torch.no_grad()
def right(model: nn.Module, data: Data, clean: Tensor, rate: float) -> float:
    """Return the share of right labels among those that the trained network believes most.

    Args:
        model: trained.
        data: with the labels that it was trained on.
        clean: the right ones.
        rate: share of the samples that is left out, those of the lowest margins.
    """
    model.eval()
    found = [margins(model(images), labels.long()) for images, labels in data.batches("train", 500)]
    kept = torch.cat(found).argsort(descending=True)[: round((1 - rate) * len(clean))]
    return float((data.train[1][kept].long() == clean[kept].long()).double().mean())


@torch.no_grad()
def pruned(model: nn.Sequential, data: Data, share: float, draws: int = 5) -> dict[str, float]:
    """Return the accuracy with a share of the channels of every convolution left out.

    Those of the smallest filter norms, and as many by chance, of which the mean is given.
    """
    found = []
    for draw in range(draws + 1):
        random, trial = torch.Generator().manual_seed(draw), copy.deepcopy(model)
        pairs = zip(trial, trial[1:], strict=False)
        for conv, norm in ((a, b) for a, b in pairs if isinstance(a, nn.Conv2d)):
            order = torch.randperm(len(conv.weight), generator=random)
            if not draw:
                order = conv.weight.flatten(1).norm(dim=1).argsort()
            out = order[: round(share * len(order))]
            norm.weight[out], norm.bias[out] = 0.0, 0.0
        found.append(evaluate(trial, data, "test").accuracy or 0.0)
    return {"by_norm": found[0], "by_chance": sum(found[1:]) / draws}
