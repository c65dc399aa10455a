"""Rivals at equal parameters and equal epochs, from one dense checkpoint, before and after."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict
from itertools import pairwise
from typing import Any

from bench import tasks
from bench.claim import claim, judged
from bench.compress import compress, scored
from bench.experiments import Cell, Cells, Table, by_seed, fourway, paired, pick, values
from bench.stats import mean, plus_minus, spread
from pliant.compose import resolve
from pliant.data import Train
from pliant.errors import PliantError
from pliant.method import Method
from pliant.registry import construct, plain

Settings = Mapping[str, Any]
Watch = Callable[[dict[str, Any]], None]
BASE, DENSE, FOUR_WAY = "base", "dense", "four-way"


def cells(settings: Settings) -> list[Cell]:
    """List all measurements: everything of the first seed comes first."""
    shared = tasks.plan(settings)
    rows = [Cell({"rival": BASE}, shared)]
    for index, seed in enumerate(settings["seeds"]):
        rows.append(_dense(settings, shared, seed))
        rows += [
            _rival(settings, shared, name, budget, seed)
            for budget in settings["budgets"]
            for name in settings["rivals"]
        ]
        if not index:
            rows += [
                _rival(settings, shared, name, None, seed)
                for name in settings.get("unbudgeted", {})
            ]
            rows += _four_way(settings, shared, seed)
    return rows


def measure(cell: Cell, watch: Watch) -> dict[str, Any]:
    """Measure one cell."""
    plan = cell.plan
    model, data = tasks.base(plan, watch), tasks.data_of(plan)
    if cell.key["rival"] == BASE:
        return {**scored(model, data), "checkpoint": tasks.base_facts(plan)}
    train = Train(**plan["train"])
    if cell.key["rival"] == FOUR_WAY:
        return fourway.measure(model, data, plan, train, cell.key["seed"], watch)
    teacher = copy.deepcopy(model) if train.distill else None
    method = construct(**plan["method"]) if plan["method"] else Method()
    return compress(
        model,
        data,
        method,
        plan["budget"],
        train,
        seed=cell.key["seed"],
        teacher=teacher,
        watch=watch,
    )


def claims(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Say whom the champion leads, whether the order is as expected, and how near dense is."""
    wanted = settings["claims"]
    rows = [row for budget in settings["budgets"] for row in _ahead(settings, cells, budget)]
    for budget, most in wanted.get("gap_to_dense", {}).items():
        rows.append(_gap(settings, cells, float(budget), most))
    if "smaller_than" in wanted:
        rows += _smaller(settings, cells)
    return rows + _fair(settings, cells)


def summary(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Give mean and standard deviation over the seeds, a row per rival and budget."""
    keys = list(dict.fromkeys((c["key"]["rival"], c["key"].get("budget")) for c in pick(cells)))
    rows = []
    for rival, budget in keys:
        if rival == FOUR_WAY:
            continue
        row: dict[str, Any] = {"rival": rival, "budget": budget}
        for name in ("accuracy", "accuracy_before", "params", "macs", "seconds"):
            found = _of(cells, name, rival, budget)
            if found:
                row[name] = {"mean": mean(found), "sd": spread(found), "seeds": len(found)}
        rows.append(row)
    return rows


def tables(settings: Settings, cells: Cells) -> list[Table]:
    """Give accuracy after and before fine-tuning, sizes and seconds, and the four-way table."""
    found = [
        _accuracies(settings, cells, "accuracy", "Accuracy at the end, %"),
        _accuracies(settings, cells, "accuracy_before", "Accuracy right after factorizing, %"),
        _sizes(settings, cells),
    ]
    four = pick(cells, rival=FOUR_WAY)
    return found + [fourway.table(settings["four_way"], four[0])] if four else found


# ---------------------------------------------------------------- cells


def _dense(settings: Settings, shared: dict[str, Any], seed: int) -> Cell:
    train = Train(**settings["train"], epochs=settings["epochs"])
    plan = {**shared, "train": asdict(train), "method": None, "budget": {}}
    return Cell({"rival": DENSE, "budget": None, "seed": seed}, plan)


def _rival(
    settings: Settings, shared: dict[str, Any], name: str, budget: float | None, seed: int
) -> Cell:
    """A rival is a spec string, or {"method": spec} with entries of Train that are its own."""
    given = (settings["rivals"] | settings.get("unbudgeted", {}))[name]
    own = {"method": given} if isinstance(given, str) else dict(given)
    method = plain(resolve(own.pop("method")))
    train = Train(**{**settings["train"], "epochs": settings["epochs"], **own})
    if abs(train.epochs + train.finetune - settings["epochs"]) > 1e-9:
        raise PliantError(
            f"All rivals must train for {settings['epochs']} epochs, but {name} has "
            f"{train.epochs} and {train.finetune} of fine-tuning; make the sum equal."
        )
    limit = {} if budget is None else {settings.get("axis", "params"): budget}
    plan = {**shared, "train": asdict(train), "method": method, "budget": limit}
    return Cell({"rival": name, "budget": budget, "seed": seed}, plan)


def _four_way(settings: Settings, shared: dict[str, Any], seed: int) -> list[Cell]:
    if "four_way" not in settings:
        return []
    asked = settings["four_way"]
    methods = {name: plain(resolve(spec)) for name, spec in asked["methods"].items()}
    train = Train(**settings["train"], epochs=settings["epochs"])
    plan = {
        **shared,
        "train": asdict(train),
        "methods": methods,
        "budget": {settings.get("axis", "params"): asked["budget"]},
        "recalibrate": asked["recalibrate"],
    }
    return [Cell({"rival": FOUR_WAY, "budget": asked["budget"], "seed": seed}, plan)]


# ---------------------------------------------------------------- claims


def _of(cells: Cells, name: str, rival: str, budget: float | None) -> list[float]:
    if rival in (BASE, DENSE):
        return values(cells, name, rival=rival)
    return values(cells, name, rival=rival, budget=budget)


def _ahead(settings: Settings, cells: Cells, budget: float) -> list[dict[str, Any]]:
    """Compare the champion with each rival, and each rival with the next of an expected order."""
    asked = settings["claims"]
    champion, own = asked["champion"], asked.get("ablations", [])
    after = [(champion, other) for other in (*asked["rivals"], *own)]
    before = list(pairwise(asked.get("order", [])))
    pairs = [("accuracy_before", pair) for pair in before]
    pairs += [("accuracy", pair) for pair in dict.fromkeys([*after, *before])]
    rows = []
    for name, (first, second) in pairs:
        when = "at the end" if name == "accuracy" else "before fine-tuning"
        what = f"{second}, its ablation," if second in own else second
        text = f"{first} leads {what} at {budget:.0%} of the parameters, {when}"
        found = (by_seed(cells, name, rival=rival, budget=budget) for rival in (first, second))
        rows.append(judged(text, paired(*found, scale=100), ">", 0, "points"))
    return rows


def _gap(settings: Settings, cells: Cells, budget: float, most: float) -> dict[str, Any]:
    champion = settings["claims"]["champion"]
    dense = by_seed(cells, "accuracy", rival=DENSE)
    own = by_seed(cells, "accuracy", rival=champion, budget=budget)
    text = (
        f"With {budget:.0%} of the parameters, {champion} is within {most} of the dense control "
        "trained for the same epochs"
    )
    return judged(text, paired(dense, own, 100), "<=", most, "points")


def _smaller(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Compare accuracies where the champion has fewer parameters than a rival at its best."""
    champion, other = settings["claims"]["champion"], settings["claims"]["smaller_than"]
    means = {b: mean(_of(cells, "accuracy", other, b)) or 0.0 for b in settings["budgets"]}
    best = max(means, key=lambda budget: means[budget])
    most = mean(_of(cells, "params", other, best))
    theirs = by_seed(cells, "accuracy", rival=other, budget=best)
    rows = []
    for budget in settings["budgets"]:
        size = mean(_of(cells, "params", champion, budget))
        if size is None or most is None or size >= most:
            continue
        text = (
            f"{champion} at {budget:.0%} of the parameters, {size / most:.2f} times those of "
            f"{other} at its most accurate, is no less accurate"
        )
        own = by_seed(cells, "accuracy", rival=champion, budget=budget)
        rows.append(judged(text, paired(own, theirs, 100), ">=", 0, "points"))
    text = f"{champion} has fewer parameters than {other} at its most accurate, and is as accurate"
    return rows or [judged(text, [], ">=", 0, "points")]


def _fair(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Check that all rivals were compared at equal parameters."""
    most, ratios = [], []
    for budget in settings["budgets"]:
        found = [c for c in pick(cells, budget=budget) if c["key"]["rival"] in settings["rivals"]]
        params = [c["values"]["params"] for c in found]
        dense = values(cells, "params", rival=BASE)
        if not params or not dense:
            continue
        most.append(max(params) / (budget * dense[0]))
        ratios.append(max(params) / min(params))
    return [
        claim(
            "No rival has more parameters than the budget: the largest share of it",
            max(most, default=None),
            "<=",
            1,
            "x",
        ),
        claim(
            "All rivals have equal parameters: the largest over the smallest at one budget",
            max(ratios, default=None),
            "<=",
            1.02,
            "x",
        ),
    ]


# ---------------------------------------------------------------- tables


def _accuracies(settings: Settings, cells: Cells, name: str, title: str) -> Table:
    budgets = settings["budgets"]
    head = ["rival", "method", *(f"{budget:.0%} of params" for budget in budgets)]
    rows = [
        [rival, f"`{_spec(given)}`", *(_mean_of(cells, name, rival, b) for b in budgets)]
        for rival, given in settings["rivals"].items()
    ]
    if name == "accuracy":
        dense = plus_minus([100 * v for v in _of(cells, name, DENSE, None)])
        base = plus_minus([100 * v for v in _of(cells, name, BASE, None)])
        rows.append(["dense control", "the same epochs, nothing removed", *[dense] * len(budgets)])
        rows.append(["checkpoint", "before these epochs", *[base] * len(budgets)])
    for rival, given in settings.get("unbudgeted", {}).items():
        share = _share(cells, rival, None)
        value = plus_minus([100 * v for v in _of(cells, name, rival, None)])
        cell = f"{value} at {share}" if share else value
        rows.append([rival, f"`{_spec(given)}`", cell, *[""] * (len(budgets) - 1)])
    return Table(title, head, rows)


def _mean_of(cells: Cells, name: str, rival: str, budget: float) -> str:
    refused = [
        c
        for c in cells
        if "refused" in c and c["key"].get("rival") == rival and c["key"].get("budget") == budget
    ]
    if refused:
        return "refused"
    return plus_minus([100 * v for v in _of(cells, name, rival, budget)])


def _share(cells: Cells, rival: str, budget: float | None) -> str:
    dense = values(cells, "params", rival=BASE)
    own = mean(_of(cells, "params", rival, budget))
    return f"{own / dense[0]:.1%}" if own and dense else ""


def _sizes(settings: Settings, cells: Cells) -> Table:
    """Parameters, multiply-accumulates and seconds of every rival, means over the seeds."""
    head = ["rival", "budget", "parameters", "MACs", "seconds"]
    rows = []
    for row in summary(settings, cells):
        at = "" if row["budget"] is None else f"{row['budget']:.0%}"
        numbers = [row.get(name, {}).get("mean") for name in ("params", "macs", "seconds")]
        rows.append([row["rival"], at, *(f"{n:,.0f}" if n is not None else "" for n in numbers)])
    return Table("Sizes, and seconds of search, factorization and training together", head, rows)


def _spec(given: Any) -> str:
    if isinstance(given, str):
        return given
    rest = ", ".join(f"{name}={value}" for name, value in given.items() if name != "method")
    return f"{given['method']} {rest}".strip()
