"""Rivals at equal parameters and equal epochs, from one dense checkpoint, before and after."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict
from itertools import pairwise
from typing import Any

from bench import tasks
from bench.claim import claim
from bench.compress import compress, scored
from bench.experiments import Cell, Cells, Table, fourway, pick, values
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
    """Say whether the champion is first, near the dense network, and the order as expected."""
    wanted = settings["claims"]
    rows: list[dict[str, Any]] = []
    for budget in settings["budgets"] if wanted["rivals"] else ():
        rows += _first(settings, cells, budget)
    for budget in settings["budgets"]:
        rows += _ordered(settings, cells, budget)
    for budget, most in wanted.get("gap_to_dense", {}).items():
        rows.append(_gap(settings, cells, float(budget), most))
    if "smaller_than" in wanted:
        rows.append(_smaller(settings, cells))
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


def _lead(cells: Cells, name: str, first: str, others: list[str], budget: float) -> float | None:
    """Points between the mean of one rival and the best mean of the others; None if one lacks."""
    own = mean(_of(cells, name, first, budget))
    means = [mean(_of(cells, name, other, budget)) for other in others]
    known = [value for value in means if value is not None]
    if own is None or not known:
        return None
    return 100 * (own - max(known))


def _first(settings: Settings, cells: Cells, budget: float) -> list[dict[str, Any]]:
    asked = settings["claims"]
    champion, others = asked["champion"], asked["rivals"]
    lead, at = _lead(cells, "accuracy", champion, others, budget), f"{budget:.0%} of the parameters"
    rows = [
        claim(f"{champion} is first of {_and([champion, *others])} at {at}", lead, ">", 0, "points")
    ]
    if budget in asked.get("beyond_spread", []):
        sds = [100 * spread(_of(cells, "accuracy", rival, budget)) for rival in (champion, *others)]
        text = f"{champion} leads at {at} by more than the largest spread over seeds of any rival"
        rows.append(claim(text, lead, ">", max(sds), "points"))
    for name in asked.get("ablations", []):
        sds = [100 * spread(_of(cells, "accuracy", rival, budget)) for rival in (champion, name)]
        text = f"{champion} leads {name}, its ablation, at {at} by more than the spread over seeds"
        rows.append(
            claim(text, _lead(cells, "accuracy", champion, [name], budget), ">", max(sds), "points")
        )
    return rows


def _ordered(settings: Settings, cells: Cells, budget: float) -> list[dict[str, Any]]:
    order = settings["claims"].get("order")
    if not order:
        return []
    rows = []
    for name, when in (("accuracy_before", "before"), ("accuracy", "after")):
        gaps = [_lead(cells, name, a, [b], budget) for a, b in pairwise(order)]
        known = [gap for gap in gaps if gap is not None]
        least = min(known) if len(known) == len(gaps) else None
        text = f"{' > '.join(order)} {when} fine-tuning at {budget:.0%}: the smallest gap"
        rows.append(claim(text, least, ">", 0, "points"))
    return rows


def _gap(settings: Settings, cells: Cells, budget: float, most: float) -> dict[str, Any]:
    champion = settings["claims"]["champion"]
    dense, own = (
        mean(_of(cells, "accuracy", DENSE, None)),
        mean(_of(cells, "accuracy", champion, budget)),
    )
    gap = None if dense is None or own is None else 100 * (dense - own)
    text = (
        f"With {budget:.0%} of the parameters, {champion} is within {most} of the dense control "
        "trained for the same epochs"
    )
    return claim(text, gap, "<=", most, "points")


def _smaller(settings: Settings, cells: Cells) -> dict[str, Any]:
    """Compare sizes where the champion is at least as accurate as a rival at its best."""
    champion, other = settings["claims"]["champion"], settings["claims"]["smaller_than"]
    ratio = None
    if found := [c["values"] for c in pick(cells, rival=other)]:
        at = max(found, key=lambda row: row["accuracy"])
        own = [c["values"] for c in pick(cells, rival=champion)]
        good = [row["params"] for row in own if row["accuracy"] >= at["accuracy"]]
        ratio = min(good) / at["params"] if good else None
    text = (
        f"{champion} has fewer parameters than {other} at its most accurate and is no less "
        "accurate: their ratio"
    )
    return claim(text, ratio, "<", 1, "x")


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


def _and(words: list[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}"
