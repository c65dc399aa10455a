"""What one elastic training can be given, beside separate trainings: a small case in minutes."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from bench.claim import judged
from bench.experiments import Cell, Cells, Table, by_seed, paired, values
from bench.small import cnn, seeded
from bench.stats import mean, plus_minus
from pliant.budget import Budget
from pliant.compose import resolve
from pliant.data import Data, Train, load
from pliant.drivers.loop import evaluate, fit
from pliant.edits.sizes import count, of_size
from pliant.method import Method
from pliant.run import start

Settings = Mapping[str, Any]


def cells(settings: Settings) -> list[Cell]:
    """List every training of every seed, all of the first seed first."""
    names = ("data", "widths", "prepare", "train", "budgets")
    shared, rows = {name: settings[name] for name in names}, list[Cell]()
    for seed in settings["seeds"]:
        for rival, plan in settings["rivals"].items():
            rows.append(Cell({"rival": rival, "seed": seed}, {**shared, **plan}))
    return rows


def measure(cell: Cell, watch: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Train one elastic network, or one network for every size, and score all sizes."""
    torch.set_num_threads(1)
    plan, budgets = cell.plan, cell.plan["budgets"]
    data = digits(**plan["data"])
    dense, own = _dense(plan, data), "distill" in plan
    found = list[nn.Module]()
    for budget in budgets if own else budgets[:1]:
        found += _trained(dense, data, plan, budget, cell.key["seed"])
    rows: dict[str, Any] = {}
    for budget, model in zip(budgets, found, strict=True):
        score = evaluate(model, data, "val")
        rows |= {f"accuracy {budget}": score.accuracy, f"loss {budget}": round(score.loss, 5)}
    return rows


def _trained(
    dense: nn.Module, data: Data, plan: Mapping[str, Any], budget: float, seed: int
) -> list[nn.Module]:
    """Make one network smaller and train it; return all of its sizes."""
    model, train = copy.deepcopy(dense), Train(**plan["train"], distill=plan.get("distill", 0.0))
    steps, bound = train.steps(data.steps(train.batch)), Budget(params=budget)
    run = start(model, resolve(plan["spec"]), bound, data=data, steps=steps, seed=seed)
    fit(run, data, train, teacher=copy.deepcopy(dense) if train.distill else None)
    run.finish()
    sizes = count(run.edits)
    return [of_size(model, run.edits, size) for size in range(sizes)] if sizes > 1 else [model]


def digits(noise: float, train: int) -> Data:
    """Digits of 14 x 14 pixels in noise: so many to train, all others but the test's to score."""
    found, random = load("mnist5k"), torch.Generator().manual_seed(5)
    (images, labels), (others, more) = found.train, found.val

    def noisy(images: Tensor) -> Tensor:
        small = avg_pool2d(images.float(), 2)
        return small + noise * small.std() * torch.randn(small.shape, generator=random)

    images, others = noisy(images), noisy(others)
    order = torch.randperm(len(images), generator=random)
    images, labels = images[order], labels[order]
    val = torch.cat([others, images[train:]]), torch.cat([more, labels[train:]])
    return Data((images[:train], labels[:train]), val, classes=10)


def _dense(plan: Mapping[str, Any], data: Data) -> nn.Module:
    """Train the network that all begin with, the same one for all seeds."""
    model, train = seeded(0, lambda: cnn(1, plan["widths"])), Train(**plan["prepare"])
    run = start(model, Method(), data=data, steps=train.steps(data.steps(train.batch)))
    fit(run, data, train)
    run.finish()
    return model.eval()


# ---------------------------------------------------------------- what is said of it


def claims(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Say how far rivals are behind others: the mean of all sizes, and the worst size."""
    rows = []
    for asked in settings["claims"]:
        gaps = [_gap(cells, asked, budget) for budget in settings["budgets"]]
        text = f"{asked['own']}, behind {asked['other']}: points of accuracy, "
        seeds = [seed for seed in settings["seeds"] if all(seed in gap for gap in gaps)]
        means = [round(sum(gap[seed] for gap in gaps) / len(gaps), 6) for seed in seeds]
        rows.append(judged(f"{text}mean of all sizes", means, "<=", asked["mean"], "points"))
        worst = max(gaps, key=lambda gap: mean(list(gap.values())) or 0.0)
        found = list(worst.values())
        rows.append(judged(f"{text}at the worst size", found, "<=", asked["worst"], "points"))
    return rows


def _gap(cells: Cells, asked: Mapping[str, Any], budget: float) -> dict[Any, float]:
    own, other = (
        by_seed(cells, f"accuracy {budget}", rival=asked[side]) for side in ("own", "other")
    )
    seeds = [seed for seed in other if seed in own]
    return dict(zip(seeds, paired(other, own, 100), strict=True))


def summary(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Give mean accuracy and loss of every rival at every size."""
    return [
        {
            "rival": rival,
            "budget": budget,
            "accuracy": mean(values(cells, f"accuracy {budget}", rival=rival)),
            "loss": mean(values(cells, f"loss {budget}", rival=rival)),
        }
        for rival in settings["rivals"]
        for budget in settings["budgets"]
    ]


def tables(settings: Settings, cells: Cells) -> list[Table]:
    """Give accuracies, and losses, by size."""
    found = []
    for name, scale, title in (("accuracy", 100, "accuracy, %"), ("loss", 1, "cross-entropy")):
        rows = [
            [rival]
            + [
                plus_minus([scale * v for v in values(cells, f"{name} {budget}", rival=rival)])
                for budget in settings["budgets"]
            ]
            for rival in settings["rivals"]
        ]
        head = ["trained", *(f"{budget:.0%} of the parameters" for budget in settings["budgets"])]
        found.append(Table(f"Validation, {title}", head, rows))
    return found
