"""Pliant beside its peers: one checkpoint, the same epochs, no less time for any peer."""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from torch import nn

from bench import tasks
from bench.claim import claim, judged
from bench.compress import scored
from bench.experiments import Cell, Cells, Table, paired, pick
from bench.peers import LEFT_OUT, PEERS, VERSIONS, around
from pliant.budget import Budget
from pliant.data import Data, Train
from pliant.drivers.loop import fit
from pliant.errors import BudgetError
from pliant.latency import Target
from pliant.latency.compare import compared, interleaved, quiet
from pliant.method import Method
from pliant.registry import build
from pliant.run import start

Settings = Mapping[str, Any]
Watch = Callable[[dict[str, Any]], None]
DENSE = "dense"
Runs = list[tuple[int, dict[str, dict[str, Any]]]]  # seeds, and what each rival measured
KEPT = (0.85, 1.05)  # of the time asked: nearer is kept
SIDES = ("faster", "slower")  # the networks of a peer, beside the slowest of ours


def cells(settings: Settings) -> list[Cell]:
    """List tasks and seeds: all rivals of one are measured together."""
    rows = []
    for task, seeds in settings["seeds"].items():
        shared = tasks.plan({**settings, "task": task})
        train = asdict(Train(**settings["train"], epochs=settings["epochs"]))
        own = {name: settings[name] for name in ("target", "share", "rungs", "seconds", "methods")}
        plan = {**shared, **own, "train": train, "versions": VERSIONS}
        rows += [Cell({"task": task, "seed": seed}, plan) for seed in seeds]
    return rows


def measure(cell: Cell, watch: Watch) -> dict[str, Any]:
    """Make ours as fast as asked, the peers' just faster and just slower, and train all alike."""
    plan = cell.plan
    dense, data = tasks.base(plan, watch), tasks.data_of(plan)
    target, train, seed = Target.parse(plan["target"]), Train(**plan["train"]), cell.key["seed"]
    budget = Budget.parse(f"latency={plan['share']:.0%}")
    found: dict[str, dict[str, Any]] = {}
    networks: dict[str, nn.Module] = {}

    def compete(name: str, model: nn.Module, method: Method, **asked: Any) -> None:
        began = time.monotonic()
        try:
            networks[name] = _trained(model, method, data, train, watch, seed=seed, **asked)
            found[name] = scored(networks[name], data)
        except BudgetError as error:
            found[name] = {"refused": str(error)}
        found[name]["seconds"] = round(time.monotonic() - began, 1)

    compete(DENSE, copy.deepcopy(dense), Method())
    for name, spec in plan["methods"].items():
        compete(name, copy.deepcopy(dense), build(spec), budget=budget, target=target)

    ours = [networks[name] for name in plan["methods"] if name in networks]

    def times(models: Sequence[nn.Module]) -> list[float]:
        rows = _times(dense, [*ours, *models], data, target, plan["seconds"])
        shares = [row["share"] for row in rows]
        slowest = max(shares[: len(ours)], default=plan["share"])
        return [share / slowest for share in shares[len(ours) :]]

    for peer, knobs in around(dense, data, times, plan["rungs"]).items():
        for name, side, knob in zip(_both(peer), SIDES, knobs, strict=True):
            if knob is None:
                found[name] = {"refused": f"no setting makes it {side}"}
                continue
            began = time.monotonic()
            network = PEERS[peer](dense, data, knob)
            took = round(time.monotonic() - began, 1)
            compete(name, network, Method())
            found[name] |= {"knob": knob, "seconds_to_compress": took}
    torch = Target("torch", threads=target.threads, batch=target.batch)
    for place, head in ((target, ""), (torch, "torch_")):
        rows = _times(dense, list(networks.values()), data, place, plan["seconds"])
        for name, row in zip(networks, rows, strict=True):
            found[name] |= {f"{head}{key}": value for key, value in row.items()}
    return {"rivals": found}


def claims(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Say which of ours lead which peers, and that these had at least as much time."""
    rows = []
    for task in settings["seeds"]:
        runs = _runs(cells, task)
        asked = [
            rivals[name]["share"] / settings["share"]
            for _, rivals in runs
            for name in settings["methods"]
            if name in rivals
        ]
        rows += [
            row
            for name in settings["methods"]
            for peer in PEERS
            for row in _beside(task, runs, name, peer)
        ]
        text = f"{task}: ours take the time asked"
        low, high = KEPT
        rows.append(
            claim(f"{text}: the slowest over it", max(asked, default=None), "<=", high, "x")
        )
        rows.append(claim(f"{text}: the fastest over it", min(asked, default=None), ">=", low, "x"))
    return rows


def _beside(task: str, runs: Runs, ours: str, peer: str) -> list[dict[str, Any]]:
    """Compare one of ours with both networks of one peer: accuracies, and milliseconds.

    The milliseconds are those of the peer's slower network, so that it had at least as much time.
    """
    rows = []
    for name in _both(peer):
        own, other = (
            {seed: rivals[who]["accuracy"] for seed, rivals in runs if who in rivals}
            for who in (ours, name)
        )
        text = f"{task}: {ours} leads {name}, by"
        rows.append(judged(text, paired(own, other, 100), ">", 0, "points"))
    slower = _both(peer)[1]
    times = [
        rivals[slower]["share"] / rivals[ours]["share"]
        for _, rivals in runs
        if slower in rivals and ours in rivals
    ]
    whole = min(times) if times and len(times) == len(runs) else None
    text = f"{task}: {ours} has no more time than {slower}: the least over it"
    return [*rows, claim(text, whole, ">=", 1, "x")]


def _both(peer: str) -> list[str]:
    """Name the networks of a peer."""
    return [f"{peer}, {side}" for side in SIDES]


def summary(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Give what was measured, a row per rival."""
    return [
        {"task": task, "seed": seed, "rival": name, **row}
        for task in settings["seeds"]
        for seed, rivals in _runs(cells, task)
        for name, row in rivals.items()
    ]


def tables(settings: Settings, cells: Cells) -> list[Table]:
    """Give one table per task and seed, and the peers that could not be run."""
    head = ["rival", "accuracy, %", "parameters", "MACs", "bytes", "onnxruntime, ms"]
    head += ["median", "torch, ms", "seconds to compress", "seconds in all"]
    found = []
    for cell in cells:
        rivals = cell["values"].get("rivals", {})
        plain = rivals.get(DENSE, {}).get("seconds", 0)  # what training takes by itself
        rows = [_row(name, row, row.get("seconds", 0) - plain) for name, row in rivals.items()]
        title = f"{cell['key']['task']}, seed {cell['key']['seed']}, {settings['target']}"
        found.append(Table(title, head, rows))
    left = [[name, reason] for name, reason in LEFT_OUT.items()]
    return [*found, Table("Left out", ["peer", "why"], left)]


# ---------------------------------------------------------------- one rival


def _trained(
    model: nn.Module, method: Method, data: Data, train: Train, watch: Watch, **asked: Any
) -> nn.Module:
    steps = train.steps(data.steps(train.batch))
    run = start(model, method, data=data, steps=steps, **asked)
    fit(run, data, train, watch=watch)
    run.finish(strict=False)
    return run.model


def _times(
    dense: nn.Module, models: Sequence[nn.Module], data: Data, target: Target, seconds: float
) -> list[dict[str, float]]:
    """Measure networks in turn with the dense one, all in one go.

    The machine is slow in spells that last longer than a comparison, and what is fastest then is
    not what is fastest otherwise: the times are those of the quiet tenth, as everything that
    disturbs only adds to them.
    """
    samplers = [target.sampler(model, data.example()) for model in (dense, *models)]
    first, *rows = interleaved(samplers, replace(target, seconds=seconds))
    return [
        {
            "ms": round(1000 * quiet(row), 4),
            "dense_ms": round(1000 * quiet(first), 4),
            "share": round(quiet(row) / quiet(first), 4),
            "median_share": round(1 / compared(first, row).speedup, 4),
        }
        for row in rows
    ]


def _runs(cells: Cells, task: str) -> Runs:
    """Pick the seeds of a task, and the rivals of each that were measured."""
    return [
        (cell["key"]["seed"], {n: row for n, row in rivals.items() if "refused" not in row})
        for cell in pick(cells, task=task)
        if (rivals := cell["values"].get("rivals"))
    ]


def _row(name: str, v: Mapping[str, Any], beyond: float) -> list[str]:
    if "refused" in v:
        return [name, v["refused"], *[""] * 8]
    return [
        name,
        f"{100 * v['accuracy']:.2f}",
        f"{v['params']:,}",
        f"{v['macs']:,}",
        f"{v['bytes']:,}",
        f"{v['ms']:.3g} ({v['share']:.0%} of {v['dense_ms']:.3g})",
        f"{v['median_share']:.0%}",
        f"{v['torch_ms']:.3g} ({v['torch_share']:.0%})",
        f"{v.get('seconds_to_compress', beyond):.1f}",
        f"{v['seconds'] + v.get('seconds_to_compress', 0):,.0f}",
    ]
