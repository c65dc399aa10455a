"""Output sensitivity: S beside the test loss of a family of networks, and as a label-free rank."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pliant
from bench.claim import claim, judged
from bench.experiments import Cell, Cells, Table, pick
from bench.stats import plus_minus
from pliant.data import Data, Train
from pliant.errors import require
from pliant.families.analyze.variance import bias_variance

Settings = Mapping[str, Any]
LIBRARIES = ("scikit-learn", "scipy")
SETTLED, HITS, BATCH = 1e-5, 10, 128  # of the paper's training protocol
INITS = ("HN", "SN")
FAMILY, CANDIDATES = "family", "candidates"
RANKS = {
    "sensitivity": "S",
    "relative": "S over the scale of the logits",
    "agreement": "agreement with dense",
}


def cells(settings: Settings) -> list[Cell]:
    """List the networks of the family, then one cell of candidates per seed."""
    shared = {name: settings[name] for name in ("train", "noise", "draws")}
    rows = [
        Cell(
            {"part": FAMILY, "depth": depth, "width": width, "dropout": dropout, "init": init},
            {**shared, "epochs": settings["epochs"], "seeds": settings["seeds"]},
        )
        for depth, width, dropout in settings["family"]
        for init in INITS
    ]
    plan = {**shared, **settings["candidates"]}
    return rows + [Cell({"part": CANDIDATES, "seed": seed}, plan) for seed in settings["seeds"]]


def measure(cell: Cell, watch: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Train one network once per seed, or compress one in many ways."""
    return _family(cell) if cell.key["part"] == FAMILY else _candidates(cell)


def claims(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Say how well S ranks the family, and candidates of compression."""
    asked, rows = settings["claims"], _rows(settings, cells)
    whole = len(rows) == 2 * len(settings["family"])
    found = _correlations(rows) if whole and len(rows) > 2 else {}
    number = len(settings["family"]) * len(INITS)
    name = f"Spearman over {number} MLPs of S and"
    loss = found.get("loss")
    said = [
        claim(f"{name} test cross-entropy", loss, ">=", asked["spearman"], ""),
        claim(f"{name} the variance term", found.get("variance"), ">=", asked["spearman"], ""),
    ]
    lead = None if loss is None else loss - abs(found["params"])
    said.append(claim("S ranks by test loss better than the parameter count", lead, ">", 0, ""))
    for what, column in (("S", "sensitivity"), ("test loss", "loss")):
        text = f"Share of networks whose {what} is lower with He's initialization than with N(0, 1)"
        said.append(claim(text, _twins(rows, column) if whole else None, ">=", 1.0, ""))
    for stage in ("untrained", "finetuned"):
        values = [c["values"][f"{stage} sensitivity"] for c in pick(cells, part=CANDIDATES)]
        text = f"Spearman of S and accuracy, {stage} candidates, mean over seeds"
        said.append(judged(text, values, ">=", asked["ranking"], ""))
    return said


def summary(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Give means over seeds of every network, the correlations, and those of candidates."""
    rows = _rows(settings, cells)
    found: list[dict[str, Any]] = list(rows)
    if len(rows) > 2:
        found.append({"part": "correlations", **_correlations(rows)})
    return found + [
        {"part": CANDIDATES, "seed": c["key"]["seed"]}
        | {k: v for k, v in c["values"].items() if k != "rows"}
        for c in pick(cells, part=CANDIDATES)
    ]


def tables(settings: Settings, cells: Cells) -> list[Table]:
    """Give the family, its correlations, and how candidates were ranked."""
    rows = _rows(settings, cells)
    head = ["depth", "width", "dropout", "init", "parameters", "S", "variance term", "test loss"]
    family = [
        [str(row[name]) for name in ("depth", "width", "dropout", "init", "params")]
        + [f"{row[name]:.3g}" for name in ("sensitivity", "variance", "loss")]
        + [f"{100 * row['accuracy']:.1f}", f"{row['train_loss']:.1g}"]
        for row in sorted(rows, key=lambda row: row["sensitivity"])
    ]
    found = _correlations(rows) if len(rows) > 2 else {}
    names = {
        "loss": "S and test cross-entropy",
        "variance": "S and the variance term",
        "accuracy": "S and test error",
        "params": "parameters and test cross-entropy",
    }
    between = [[names[key], f"{value:.3f}"] for key, value in found.items()]
    ranked = []
    for stage in ("untrained", "finetuned"):
        for key, name in RANKS.items():
            each = [c["values"][f"{stage} {key}"] for c in pick(cells, part=CANDIDATES)]
            ranked.append([stage, name, plus_minus(each, 3)])
    return [
        Table("Family, by S; means over seeds", [*head, "accuracy, %", "training loss"], family),
        Table("Spearman over the family", ["of", "correlation"], between),
        Table(
            "Ranking compressed candidates, Spearman with test accuracy, over seeds",
            ["candidates", "ranked by", "correlation"],
            ranked,
        ),
    ]


# ---------------------------------------------------------------- the family


def _family(cell: Cell) -> dict[str, Any]:
    plan, data = cell.plan, _data(cell.plan["train"])
    rows, models = [], [mlp(cell.key, seed) for seed in plan["seeds"]]
    for seed, model in zip(plan["seeds"], models, strict=True):
        last = _train(model, data.train, plan["epochs"], seed)
        rows.append({**_scored(model, data, plan, _logits(model, data.test[0])), **last})
    divided = bias_variance(models, data)
    means = {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}
    return {
        **means,
        "variance": divided.variance,
        "bias": divided.bias,
        "params": sum(p.numel() for p in models[0].parameters()),
        "rows": rows,
    }


def mlp(key: Mapping[str, Any], seed: int) -> nn.Sequential:
    """Build an MLP for digits: ReLU and perhaps dropout after each hidden layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        widths = [64, *[key["width"]] * key["depth"], 10]
        layers: list[nn.Module] = [nn.Flatten()]
        for columns, rows in zip(widths, widths[1:], strict=False):
            linear = nn.Linear(columns, rows)
            if key["init"] == "SN":
                nn.init.normal_(linear.weight)
                nn.init.normal_(linear.bias)
            else:
                nn.init.kaiming_normal_(linear.weight)
                nn.init.zeros_(linear.bias)
            layers += [linear, nn.ReLU(), nn.Dropout(key["dropout"])]
    return nn.Sequential(*layers[:-2])


def _train(model: nn.Module, pair: tuple[Tensor, Tensor], epochs: int, seed: int) -> dict[str, Any]:
    """Train by the paper's protocol; the counter of low losses is never reset."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    hits = epoch = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        while epoch < epochs and hits < HITS:
            total = 0.0
            for rows in torch.randperm(len(pair[0])).split(BATCH):
                loss = F.cross_entropy(model(pair[0][rows]), pair[1][rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += float(loss.detach()) * len(rows)
            epoch += 1
            hits += total / len(pair[0]) < SETTLED
    logits = _logits(model, pair[0])
    wrong = float((logits.argmax(1) != pair[1]).float().mean())
    return {
        "train_loss": float(F.cross_entropy(logits, pair[1])),
        "train_error": wrong,
        "epochs": epoch,
    }


def _rows(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    return [
        {**cell["key"], **{k: v for k, v in cell["values"].items() if k != "rows"}}
        for cell in pick(cells, part=FAMILY)
    ]


def _correlations(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    of = {name: [row[name] for row in rows] for name in ("sensitivity", "loss", "variance")}
    errors, params = [1 - row["accuracy"] for row in rows], [row["params"] for row in rows]
    return {
        "loss": _spearman(of["sensitivity"], of["loss"]),
        "variance": _spearman(of["sensitivity"], of["variance"]),
        "accuracy": _spearman(of["sensitivity"], errors),
        "params": _spearman(params, of["loss"]),
    }


def _twins(rows: Sequence[Mapping[str, Any]], column: str) -> float:
    """The share of pairs in which He's initialization has the lower value."""
    by_key = {tuple(row[k] for k in ("depth", "width", "dropout", "init")): row for row in rows}
    pairs = [(row, by_key[(*key[:3], "SN")]) for key, row in by_key.items() if key[3] == "HN"]
    return sum(he[column] < normal[column] for he, normal in pairs) / len(pairs)


# ---------------------------------------------------------------- candidates


def _candidates(cell: Cell) -> dict[str, Any]:
    """Compress one network in many ways and rank the results, before and after fine-tuning."""
    plan, seed, data = cell.plan, cell.key["seed"], _data(cell.plan["train"])
    dense = _convolutional(seed)
    _train(dense, data.train, plan["epochs"], seed)
    truth = _logits(dense, data.test[0]).argmax(1)
    found: dict[str, Any] = {"rows": [], "dense": float((truth == data.test[1]).float().mean())}
    plans = {"untrained": None, "finetuned": Train(epochs=0, finetune=plan["finetune"], lr=0.01)}
    for stage, train in plans.items():
        rows = []
        for name, spec in plan["methods"].items():
            for budget in plan["budgets"]:
                limit = f"params={budget}"
                result = pliant.compress(
                    dense, data, spec, limit, train=train, seed=seed, strict=False
                )
                logits = _logits(result.model, data.test[0])
                same = float((logits.argmax(1) == truth).float().mean())
                row = {"stage": stage, "method": name, "budget": budget, "agreement": same}
                rows.append(row | _scored(result.model, data, plan, logits))
        accuracies = [row["accuracy"] for row in rows]
        for key in RANKS:
            sign = 1 if key == "agreement" else -1
            ranked = _spearman([sign * row[key] for row in rows], accuracies)
            found[f"{stage} {key}"] = ranked
        found["rows"] += rows
    return found


def _convolutional(seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1)),
            *(nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU()),
            *(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10)),
        )


# ---------------------------------------------------------------- what is measured


@cache
def _data(count: int) -> Data:
    """Digits, standardized by the training images: the first of a fixed shuffle train."""
    found = require("sklearn.datasets", "cluster").load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    images = torch.as_tensor(found.images, dtype=torch.float32)[order][:, None]
    labels = torch.as_tensor(found.target)[order].long()
    mean, scale = images[:count].mean(), images[:count].std()
    images = (images - mean) / scale
    train, test = (images[:count], labels[:count]), (images[count:], labels[count:])
    return Data(train, test=test, classes=10, name="digits")


@torch.no_grad()
def _logits(model: nn.Module, inputs: Tensor) -> Tensor:
    model.eval()
    found: Tensor = model(inputs)
    model.train()
    return found


def _scored(
    model: nn.Module, data: Data, plan: Mapping[str, Any], logits: Tensor
) -> dict[str, Any]:
    """S without labels; loss and accuracy with them."""
    spec = f"output_sensitivity(noise={plan['noise']}, draws={plan['draws']})"
    found = float(pliant.analyze(model, data.test[0], spec).value)
    scale = float((logits - logits.mean(1, keepdim=True)).square().mean())
    return {
        "sensitivity": found,
        "relative": found / scale,
        "loss": float(F.cross_entropy(logits, data.test[1])),
        "accuracy": float((logits.argmax(1) == data.test[1]).float().mean()),
    }


def _spearman(first: Sequence[float], second: Sequence[float]) -> float:
    found = require("scipy.stats", "bench").spearmanr(first, second).statistic
    return float(found) if found == found else 0.0
