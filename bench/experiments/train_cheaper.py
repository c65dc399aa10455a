"""Seconds of a training step as layers are factorized within the training, beside a plain one."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from bench import tasks
from bench.claim import claim, judged
from bench.compress import described, scored
from bench.experiments import Cell, Cells, Table, by_seed, paired, pick, values
from bench.stats import mean, median, plus_minus
from pliant.budget import Budget
from pliant.compose import resolve
from pliant.data import Train
from pliant.drivers.loop import fit
from pliant.method import Method
from pliant.registry import construct, plain
from pliant.run import start

Settings = Mapping[str, Any]
Watch = Callable[[dict[str, Any]], None]
PLAIN, ONCE, EARLY = "plain", "at once", "early"


def cells(settings: Settings) -> list[Cell]:
    """List the rivals."""
    train = asdict(Train(epochs=settings["epochs"], **settings["train"]))
    shared = {**tasks.plan(settings), "train": train, "parts": settings["parts"]}
    rows = []
    for seed in settings["seeds"]:
        for name, spec in settings["rivals"].items():
            own = {"method": None, "budget": {}}
            if spec:
                budget = {"params": settings["budget"]}
                own = {"method": plain(resolve(spec)), "budget": budget}
            rows.append(Cell({"rival": name, "seed": seed}, {**shared, **own}))
    return rows


def measure(cell: Cell, watch: Watch) -> dict[str, Any]:
    """Train one network and time every step of it."""
    plan, times = cell.plan, [time.perf_counter()]

    def look(row: dict[str, Any]) -> None:
        times.append(time.perf_counter())
        watch(row)

    model, data, train = tasks.base(plan), tasks.data_of(plan), Train(**plan["train"])
    method = construct(**plan["method"]) if plan["method"] else Method()
    budget = Budget(**plan["budget"]) if plan["budget"] else None
    steps = train.steps(data.steps(train.batch))
    run = start(model, method, budget, data=data, steps=steps, seed=cell.key["seed"])
    fit(run, data, train, watch=look)
    run.finish(strict=False)
    left = {row["step"]: row["factorized"] for row in run.log if "factorized" in row}
    took = [after - before for before, after in zip(times[1:], times[2:], strict=False)]
    share = max(1, len(took) // plan["parts"])
    parts = [took[start : start + share] for start in range(0, share * plan["parts"], share)]
    return {
        **scored(model, data),
        "left": left,
        "layers": described(run.edits),
        "step_seconds": [round(median(part) or 0.0, 4) for part in parts],
        "training_seconds": round(times[-1] - times[1], 2),
    }


def claims(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Say how much cheaper the last steps and the whole are, and what it costs in accuracy."""
    asked = settings["claims"]
    last, plain_last = (_last(cells, name) for name in (EARLY, PLAIN))
    whole = [mean(values(cells, "training_seconds", rival=name)) for name in (EARLY, PLAIN)]
    gaps = paired(*(by_seed(cells, "accuracy", rival=name) for name in (PLAIN, EARLY)), scale=100)
    text = "than a plain training of as many epochs"
    return [
        claim(
            "A step at the end over a plain one", _ratio(last, plain_last), "<=", asked["last"], "x"
        ),
        claim("Seconds of the whole over plain ones", _ratio(*whole), "<=", asked["whole"], "x"),
        judged(f"The final accuracy is lower {text} by", gaps, "<=", asked["gap"], "points"),
    ]


def summary(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Give seconds of a step by part of the training, and the ends."""
    return [
        {
            "rival": name,
            "step_seconds": _parts(cells, name),
            **{
                key: mean(values(cells, key, rival=name))
                for key in ("training_seconds", "accuracy", "params")
            },
        }
        for name in settings["rivals"]
    ]


def tables(settings: Settings, cells: Cells) -> list[Table]:
    """Give one row per rival."""
    count = settings["parts"]
    head = ["training", *(f"step, s, part {k + 1} of {count}" for k in range(count))]
    head += ["whole, s", "accuracy, %", "parameters"]
    rows = [
        [
            row["rival"],
            *(f"{each:.3f}" for each in row["step_seconds"] or [0.0] * count),
            f"{row['training_seconds'] or 0:.0f}",
            plus_minus([100 * v for v in values(cells, "accuracy", rival=row["rival"])]),
            f"{row['params'] or 0:,.0f}",
        ]
        for row in summary(settings, cells)
    ]
    return [Table("Seconds of a step, median of each part of the training", head, rows)]


def _parts(cells: Cells, rival: str) -> list[float]:
    found = [cell["values"]["step_seconds"] for cell in pick(cells, rival=rival)]
    return [mean(part) or 0.0 for part in zip(*found, strict=True)]


def _last(cells: Cells, rival: str) -> float | None:
    parts = _parts(cells, rival)
    return parts[-1] if parts else None


def _ratio(one: float | None, other: float | None) -> float | None:
    return one / other if one and other else None
