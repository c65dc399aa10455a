"""What the papers of pruning methods claim, one small study for each."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import nn

from bench import tasks
from bench.claim import claim, judged
from bench.compress import Looker, Observed, Values, scored
from bench.data import mnist, pooled_cifar10, pooled_digits, some
from bench.experiments import Cell, Cells, Table, by_seed, paired, pick, values
from bench.experiments.prune_controls import method, nearly_dead, risen, steps_of_eight
from bench.small import cnn, seeded
from bench.stats import mean, plus_minus, spread
from pliant.budget import Budget
from pliant.data import Data, Train, load
from pliant.drivers.loop import fit
from pliant.families.prune.blocks import information, units
from pliant.families.prune.times import estimated
from pliant.latency import Target, compare
from pliant.latency.builds import built
from pliant.method import Method
from pliant.methods.prune.mi_layers import MILayers
from pliant.run import Run, start
from pliant.surgery.prove import cuttable, edits_of

Settings = Mapping[str, Any]
Watch = Callable[[dict[str, Any]], None]
DATA: Mapping[str, Callable[[Mapping[str, int]], Data]] = {
    "small digits": lambda images: some(load("digits"), images),
    "digits of 14 x 14": pooled_digits,
    "digits": lambda images: some(mnist(), images),
    "photographs of 16 x 16": pooled_cifar10,
}
SHOWN = {  # values, as heads of the tables, with their factor
    "accuracy_before": ("right after the cut, %", 100),
    "accuracy": ("at the end, %", 100),
    "params": ("parameters", 1),
    "macs": ("MACs", 1),
    "zeros": ("weights that are zero, %", 100),
    "dead_filters": ("filters near zero, %", 100),
    "dead_inputs": ("inputs near zero, %", 100),
    "risen": ("layers denser at the end, %", 100),
    "agreement": ("rank correlation", 1),
    "worst": ("largest error, %", 100),
    "method_seconds": ("seconds", 1),
}


def cells(settings: Settings) -> list[Cell]:
    """List all measurements, all of the first seed first."""
    rows = []
    for seed in settings["seeds"]:
        for study, asked in settings["studies"].items():
            shared = {key: asked[key] for key in asked if key not in ("rivals", "seeds")}
            for name, rival in asked["rivals"].items():
                if seed not in {**asked, **rival}.get("seeds", [seed]):
                    continue
                plan = {"spec": "", "budget": {}, "train": {}, "prepare": {}, **shared, **rival}
                rows.append(Cell({"study": study, "rival": name, "seed": seed}, plan))
    return rows


def measure(cell: Cell, watch: Watch) -> Values:
    """Measure one rival of one study."""
    plan, seed = cell.plan, cell.key["seed"]
    torch.set_num_threads(1)
    model, data = subject(plan, seed, watch)
    if probe := plan.get("probe"):
        return PROBES[probe](plan, model, data, seed)
    return compressed(plan, model, data, seed, watch)


# ---------------------------------------------------------------- networks


def subject(plan: Mapping[str, Any], seed: int, watch: Watch) -> tuple[nn.Module, Data]:
    """Return the network of a plan, trained as it says, and its data."""
    if task := plan.get("task"):
        shared = tasks.plan({"task": task, "images": plan["images"], "prepare": plan["prepare"]})
        return tasks.base(shared, watch), tasks.data_of(shared)
    data = DATA[plan["data"]](plan["images"])
    model = seeded(seed, lambda: network(plan, data))
    if plan["prepare"]:
        trained(model, Method(), data, Train(**plan["prepare"]), seed, watch)
    return model, data


def network(plan: Mapping[str, Any], data: Data) -> nn.Module:
    """Build a CNN of so many channels, or an MLP of so many units; as narrow as asked."""
    if "units" in plan:
        sizes = plan["units"]
        layers: list[nn.Module] = [nn.Flatten()]
        for size, following in zip(sizes, sizes[1:], strict=False):
            layers += [nn.Linear(size, following), nn.ReLU()]
        return nn.Sequential(*layers[:-1])
    channels = data.example(1)[0].shape[1]
    whole = cnn(channels, plan["widths"])
    share = plan.get("narrowed", 1.0)
    most = share * sum(p.numel() for p in whole.parameters())
    found = whole
    for percent in range(100, 0, -1) if share < 1 else ():
        found = cnn(channels, [max(1, round(w * percent / 100)) for w in plan["widths"]])
        if sum(p.numel() for p in found.parameters()) <= most:
            break
    return found


def trained(
    model: nn.Module, how: Method, data: Data, train: Train, seed: int, watch: Watch, **more: Any
) -> Run:
    """Train a network with a method, in place."""
    steps = train.steps(data.steps(train.batch))
    run = start(model, how, data=data, steps=steps, seed=seed, **more)
    fit(run, data, train, watch=watch)
    return run


# ---------------------------------------------------------------- what is measured


@dataclass
class Timed(Looker):
    """Knows the processor seconds that its scoring took."""

    spent: float = 0.0

    def __call__(self, run: Run) -> None:
        began = time.process_time()
        super().__call__(run)
        self.spent += time.process_time() - began


def compressed(
    plan: Mapping[str, Any], model: nn.Module, data: Data, seed: int, watch: Watch
) -> Values:
    """Run a method, and score the network right after the cut and at the end."""
    looker, began = Timed(data), time.process_time()
    budget = Budget(**plan["budget"]) if plan["budget"] else None
    target = Target.of(steps_of_eight) if "latency" in plan["budget"] else None
    train = Train(**{"epochs": 0, **plan["train"]})
    how, more = Observed(method(plan["spec"]), looker), {"budget": budget, "target": target}
    run = trained(model, how, data, train, seed, watch, **more)
    run.finish(strict=False)
    taken = time.process_time() - began - looker.spent
    rewards = [row for row in run.log if "reward" in row]
    zeros = [row["zeros"] for row in run.log if "zeros" in row]
    return {
        **scored(model, data),
        **looker.seen,
        "method_seconds": round(taken, 2),
        **({"zeros": zeros[-1]} if zeros else {}),
        **({"nonzero": sum(int((p != 0).sum()) for p in model.parameters())}),
        **({"reward": rewards[-1]["reward"]} if rewards else {}),
        **(nearly_dead(model) if plan.get("look") == "dead" else {}),
        **({"risen": up} if (up := risen(run.log)) is not None else {}),
    }


def agreement(plan: Mapping[str, Any], model: nn.Module, data: Data, seed: int) -> Values:
    """Score all blocks on two halves of some images, and compare the orders."""
    count = plan["samples"]
    run = start(model, MILayers(ratio=0.0), data=data, steps=1, seed=seed)
    found = units(run)
    images = data.calibration(2 * count, batch=250, seed=seed)
    seen = [tuple(batch) for batch in images]
    halves = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    looks = {"estimator": plan["estimator"], "size": 16, "neighbours": 3}
    one, other = (information(model, run.example, found, half, **looks) for half in halves)
    return {"agreement": float(spearmanr(one, other).statistic), "blocks": len(found)}


def sums_of_layers(plan: Mapping[str, Any], model: nn.Module, data: Data, seed: int) -> Values:
    """Compare the sum over layers with the measured network, for widths drawn at random."""
    target = Target.parse(plan["target"])
    run = start(model, Method(), data=data, steps=1, seed=seed, target=target)
    groups, _ = cuttable(model, run.example)
    draws = torch.Generator().manual_seed(seed)
    assert run.clock is not None
    dense, sums, found = run.clock.dense, list[float](), list[float]()
    for _ in range(plan["draws"]):
        leaving = {
            group.name: range(8 * int(torch.randint(len(group.units) // 8, (), generator=draws)))
            for group in groups
        }
        edits = edits_of(model, groups, leaving)
        sums.append(estimated(run, edits))
        found.append(_measured(run, dense, edits))
    errors = [abs(a / b - 1) for a, b in zip(sums, found, strict=True)]
    return {
        "worst": max(errors),
        "median": sorted(errors)[len(errors) // 2],
        "agreement": float(spearmanr(sums, found).statistic),
    }


def _measured(run: Run, dense: Any, edits: Sequence[Any]) -> float:
    assert run.clock is not None
    found = compare(dense, built(run.model, edits), run.example, run.clock.target)
    return float(run.clock.timing.median_ms / found.speedup)


PROBES = {"agreement": agreement, "sums of layers": sums_of_layers}


# ---------------------------------------------------------------- what is said of it


def claims(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Compare rivals by the differences of the seeds that they share, or values with targets."""
    rows = []
    for asked in settings["claims"]:
        name, study = asked.get("value", "accuracy"), asked["study"]
        scale, unit = asked.get("scale", 100), asked.get("unit", "points")
        own = _of(cells, study, name, asked["own"], asked)
        if "other" not in asked:
            found = [scale * value for value in own.values()]
        elif asked.get("ratio"):
            other = _of(cells, study, name, asked["other"], asked)
            found = [own[seed] / other[seed] for seed in own if seed in other]
        else:
            found = paired(own, _of(cells, study, name, asked["other"], asked), scale)
        text, how = f"{asked['about']}: {asked['text']}", (asked["how"], asked["target"], unit)
        if asked.get("once"):
            rows.append(claim(text, found[0] if found else None, *how))
        else:
            rows.append(judged(text, found, *how))
    return rows


def _of(
    cells: Cells, study: str, name: str, rivals: str | list[str], asked: Mapping[str, Any]
) -> dict[Any, float]:
    """A value by seed; of several rivals the best that is not much less accurate than another."""
    if isinstance(rivals, str):
        return by_seed(cells, name, study=study, rival=rivals)
    best = max if asked["best"] == "most" else min
    dense = by_seed(cells, "accuracy", study=study, rival=asked["beside"])
    found = {}
    for seed, bound in dense.items():
        good = [
            cell["values"][name]
            for rival in rivals
            for cell in pick(cells, study=study, rival=rival, seed=seed)
            if cell["values"]["accuracy"] >= bound - 0.01
        ]
        if good:
            found[seed] = best(good)
    return found


def summary(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Give mean and deviation of every rival of every study."""
    rows = []
    for study, asked in settings["studies"].items():
        for rival in asked["rivals"]:
            row: dict[str, Any] = {"study": study, "rival": rival}
            for name in SHOWN:
                if found := values(cells, name, study=study, rival=rival):
                    row[name] = {"mean": mean(found), "sd": spread(found), "seeds": len(found)}
            rows.append(row)
    return rows


def tables(settings: Settings, cells: Cells) -> list[Table]:
    """Give a table per study."""
    return [_table(cells, study, asked) for study, asked in settings["studies"].items()]


def _table(cells: Cells, study: str, asked: Mapping[str, Any]) -> Table:
    names = [name for name in SHOWN if values(cells, name, study=study)]
    rows = []
    for rival, plan in asked["rivals"].items():
        row = [rival, f"`{plan['spec']}`" if plan.get("spec") else ""]
        for name in names:
            _, scale = SHOWN[name]
            found = [scale * value for value in values(cells, name, study=study, rival=rival)]
            whole = name in ("params", "macs")
            row.append(f"{mean(found):,.0f}" if whole and found else plus_minus(found))
        rows.append(row)
    return Table(study, ["rival", "method", *(SHOWN[name][0] for name in names)], rows)
