"""Searches beside random networks of equal cost and uniformly scaled ones, and their milliseconds.

Every cell searches once, then trains what was found, a random network of its space that costs as
much, and a uniform one that costs at least as much, from scratch by one recipe.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from bench.claim import judged
from bench.compress import Values, compress, scored
from bench.data import cifar10, shrunk, some
from bench.experiments import Cell, Cells, Table, by_seed, paired, pick, values
from bench.small import method_of, seeded
from bench.stats import mean, plus_minus, spread
from pliant.cost import cost
from pliant.data import Data, Train
from pliant.drivers.loop import fit
from pliant.families.search.bilevel import halves
from pliant.families.search.expected import expected
from pliant.latency import LatencyTable, Target
from pliant.latency import measure as timed
from pliant.method import Method
from pliant.nn.genotype import DARTS_V2, DARTS_V2_WIRING, Genotype
from pliant.nn.mobile import Space
from pliant.nn.operations import SKIP
from pliant.run import Run, start
from pliant.zoo import darts, mobile
from pliant.zoo.staged import StagedResNet

Settings = Mapping[str, Any]
Watch = Callable[[dict[str, Any]], None]
Build = Callable[[], nn.Module]
FOUND, RANDOM, UNIFORM = "found", "random", "uniform"
NETWORKS = (FOUND, RANDOM, UNIFORM)
DRAWS = 300


@dataclass(frozen=True)
class Candidate:
    """A network that can be built, and what it is for people."""

    build: Build
    said: str


Three = tuple[Candidate, Candidate, Candidate]


def cells(settings: Settings) -> list[Cell]:
    """List all searches, all of the first seed first."""
    shared = {n: settings[n] for n in ("images", "side", "search", "train", "target", "space")}
    return [
        Cell({"rival": name, "seed": seed}, {**shared, **rival})
        for seed in settings["seeds"]
        for name, rival in settings["rivals"].items()
    ]


def measure(cell: Cell, watch: Watch) -> Values:
    """Search, train three networks, score them, and take their times on the target."""
    plan, seed = cell.plan, cell.key["seed"]
    began = time.monotonic()
    three, found = SEARCHES[plan["kind"]](plan, seed, watch)
    found["search_seconds"] = found.pop("searched", round(time.monotonic() - began, 2))
    data, train = images(plan, "train"), Train(**plan["train"])
    for name, candidate in zip(NETWORKS, three, strict=True):
        model = seeded(seed, candidate.build)
        compress(model, data, Method(), {}, train, seed=seed, watch=watch)
        row = scored(model, data) | milliseconds(model, data, plan["target"])
        found |= {f"{name}_{key}": row[key] for key in ROW}
        found[f"{name}_is"] = candidate.said
    return found


ROW = ("accuracy", "params", "macs", "ms", "predicted_ms")


def images(plan: Mapping[str, Any], what: str) -> Data:
    """Some images of CIFAR-10, made smaller."""
    counts = plan["images"]
    return shrunk(some(cifar10(), {"train": counts[what], "test": counts["test"]}), plan["side"])


def milliseconds(model: nn.Module, data: Data, target: str) -> Values:
    """Measure a network on a target, and predict it as the sum of its layers by the table."""
    place, model = Target.parse(target), model.eval()
    table = LatencyTable.of(place)
    predicted = expected(model, data.example(), "latency", table).fixed
    found = timed(model, data.example(), place).median_ms
    return {"ms": round(found, 4), "predicted_ms": round(predicted, 4)}


def searched(model: nn.Module, plan: Mapping[str, Any], seed: int, watch: Watch) -> Run:
    """Run a search on a network, one half of its images for the logits."""
    data, train = halves(images(plan, "search"), seed=seed), Train(**plan["search"])
    data = replace(data, test=None)
    steps = train.steps(data.steps(train.batch))
    target = plan["target"] if plan.get("timed") else None
    run = start(model, method_of(plan["spec"]), data=data, steps=steps, seed=seed, target=target)
    fit(run, replace(data, val=None), train, watch=watch)
    run.finish(strict=False)
    return run


def last(run: Run, name: str) -> Any:
    """Return what a run noted last under a name."""
    return [row[name] for row in run.log if name in row][-1]


def nearest(rows: Iterator[tuple[float, Any]], aim: float) -> Any:
    """Return what costs nearest to what is aimed at."""
    return min(rows, key=lambda row: abs(row[0] - aim))[1]


# ---------------------------------------------------------------- blocks and kernels


def blocks(plan: Mapping[str, Any], seed: int, watch: Watch) -> tuple[Three, Values]:
    """Search inverted bottlenecks, or the kernels of such as are given."""
    space, began = Space.from_plain(plan["space"]), time.monotonic()
    if plan["kind"] == "kernels":
        space = with_ops(space, [f"mbconv_k{size}_e3" for size in (3, 5, 7)])
        model = seeded(seed, lambda: uniform(space, 1.0))
    else:
        model = seeded(seed, lambda: mobile.supernet(space))
    run = searched(model, plan, seed, watch)
    seconds = round(time.monotonic() - began, 2)
    if plan["kind"] == "kernels":
        ops = [f"mbconv_k{size}_e3" for size in last(run, "sizes").values()]
    else:
        ops = last(run, "ops")
    example = images(plan, "train").example()
    prices = expected(mobile.supernet(space), example, "macs")
    names, supernet = list(prices.prices), mobile.supernet(space)

    def macs(chosen: list[str]) -> float:
        return prices.at(dict(zip(names, chosen, strict=True)), supernet)

    draw, aim = torch.Generator().manual_seed(seed), macs(ops)
    drawn = [list(mobile.random(space, draw)) for _ in range(DRAWS)]
    other = nearest(((macs(row), row) for row in drawn if row != ops), aim)
    width = next(w / 20 for w in range(4, 200) if cost(uniform(space, w / 20), example).macs >= aim)
    three = (
        Candidate(lambda: mobile.evaluation(space, ops), short(ops)),
        Candidate(lambda: mobile.evaluation(space, other), short(other)),
        Candidate(lambda: uniform(space, width), f"k3_e3, width {width:g}"),
    )
    return three, {"searched": seconds}


def with_ops(space: Space, ops: list[str]) -> Space:
    """Give all searched stages of a space other candidates."""
    return replace(space, stages=tuple(replace(s, ops=tuple(ops)) for s in space.stages))


def uniform(space: Space, width: float) -> nn.Module:
    """Build the network whose blocks are all of kernel 3 and expansion 3, at a width."""
    alike = with_ops(space, ["mbconv_k3_e3"])
    stages = tuple(replace(s, channels=max(1, round(s.channels * width))) for s in alike.stages)
    return mobile.supernet(replace(alike, stem=max(1, round(space.stem * width)), stages=stages))


def short(ops: list[str]) -> str:
    """Write blocks for people."""
    return " ".join("-" if op == SKIP else op.removeprefix("mbconv_") for op in ops)


# ---------------------------------------------------------------- cells


def of_cells(plan: Mapping[str, Any], seed: int, watch: Watch) -> tuple[Three, Values]:
    """Search cells: by eDARTS on its wiring, or by DARTS on the dense one."""
    wiring = darts.DENSE if plan["wiring"] == "dense" else DARTS_V2_WIRING
    ops, began, sizes = tuple(plan["ops"]), time.monotonic(), plan["network"]

    def build() -> nn.Module:
        return darts.supernet(wiring, ops, cells=plan["cells"], channels=plan["channels"])

    run = searched(seeded(seed, build), plan, seed, watch)
    seconds = round(time.monotonic() - began, 2)
    genotype = Genotype.from_plain(last(run, "genotype"))
    real = [op for op in ops if op != "none"]
    draw = torch.Generator().manual_seed(seed)

    def params(cell: Genotype, channels: int = sizes["channels"]) -> int:
        model = darts.evaluation(cell, cells=sizes["cells"], channels=channels)
        return sum(p.numel() for p in model.parameters())

    drawn = [_drawn(real, draw) for _ in range(30)]
    other = nearest(((params(cell), cell) for cell in drawn), params(genotype))
    plain = Genotype.of(*(tuple(("sep_conv_3x3", s) for s in reads) for reads in DARTS_V2_WIRING))
    wide = next(c for c in range(2, 65, 2) if params(plain, c) >= params(genotype))
    skips = genotype.count(SKIP)
    return (
        Candidate(lambda: darts.evaluation(genotype, **sizes), f"{skips} skips"),
        Candidate(lambda: darts.evaluation(other, **sizes), f"{other.count(SKIP)} skips"),
        Candidate(
            lambda: darts.evaluation(plain, cells=sizes["cells"], channels=wide),
            f"all sep_conv_3x3, {wide} channels",
        ),
    ), {"searched": seconds, "genotype": genotype.plain(), "skips": skips}


def _drawn(ops: list[str], draw: torch.Generator) -> Genotype:
    def kind() -> tuple[tuple[tuple[str, int], ...], ...]:
        return tuple(
            tuple((ops[int(torch.randint(len(ops), (), generator=draw))], s) for s in reads)
            for reads in DARTS_V2_WIRING
        )

    return Genotype(kind(), kind())


def fixed(plan: Mapping[str, Any], seed: int, watch: Watch) -> tuple[Three, Values]:
    """Nothing is searched: operations are put into a published cell, or channels."""
    sizes = plan["network"]
    example = images(plan, "train").example()

    def plain(channels: int) -> nn.Module:
        return darts.evaluation(DARTS_V2, cells=sizes["cells"], channels=channels)

    def inserted() -> nn.Module:
        model = plain(sizes["channels"])
        start(model, method_of(plan["spec"]), example=example).finish()
        return model

    aim = cost(inserted(), example).params
    wide = next(c for c in range(2, 65, 2) if cost(plain(c), example).params >= aim)
    return (
        Candidate(inserted, plan["spec"]),
        Candidate(lambda: plain(sizes["channels"]), "DARTS-V2 as it is"),
        Candidate(lambda: plain(wide), f"DARTS-V2, {wide} channels"),
    ), {}


# ---------------------------------------------------------------- depths


def of_depths(plan: Mapping[str, Any], seed: int, watch: Watch) -> tuple[Three, Values]:
    """Grow stages; compare with as many blocks elsewhere, and with equal depths."""
    widths, began = tuple(plan["widths"]), time.monotonic()
    run = searched(seeded(seed, lambda: StagedResNet((2, 2, 2), widths)), plan, seed, watch)
    seconds, found = round(time.monotonic() - began, 2), tuple(last(run, "depths"))
    example = images(plan, "train").example()

    def params(depths: tuple[int, ...]) -> int:
        return cost(StagedResNet(depths, widths), example).params

    draw, most = torch.Generator().manual_seed(seed), max(found) + 2
    drawn = [tuple(1 + torch.randint(most, (3,), generator=draw)) for _ in range(60)]
    rows = [row for row in ((int(a), int(b), int(c)) for a, b, c in drawn) if row != found]
    other = nearest(((params(row), row) for row in rows), params(found))
    deep = next(d for d in range(1, 40) if params((d, d, d)) >= params(found))
    return (
        Candidate(lambda: StagedResNet(found, widths), str(found)),
        Candidate(lambda: StagedResNet(other, widths), str(other)),
        Candidate(lambda: StagedResNet((deep,) * 3, widths), str((deep,) * 3)),
    ), {"searched": seconds}


SEARCHES = {
    "kernels": blocks,
    "blocks": blocks,
    "cells": of_cells,
    "fixed": fixed,
    "depths": of_depths,
}


# ---------------------------------------------------------------- what it says


def claims(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Compare what was found with both others, and predicted with measured milliseconds."""
    rows = []
    for name in settings["rivals"]:
        own, drawn, alike = (by_seed(cells, f"{n}_accuracy", rival=name) for n in NETWORKS)
        words = settings["words"].get(name, ["a random network of equal cost", "uniform scaling"])
        rows += [
            judged(f"{name} leads {words[0]}", *(paired(own, drawn, 100), ">", 0, "points")),
            judged(f"{name} leads {words[1]}", *(paired(own, alike, 100), ">", 0, "points")),
        ]
    ours, theirs = (by_seed(cells, "skips", rival=name) for name in ("edarts", "DARTS"))
    rows.append(judged("Skips: edarts less DARTS", *(paired(ours, theirs), "<", 0, "skips")))
    own, other = (by_seed(cells, "found_accuracy", rival=name) for name in ("edarts", "DARTS"))
    rows.append(judged("edarts leads DARTS", *(paired(own, other, 100), ">=", -0.3, "points")))
    off = [abs(p / m - 1) for p, m in predicted(cells)]
    rows.append(
        judged("Predicted milliseconds are off by, in the mean", *(off, "<=", 0.25, "of them"))
    )
    return rows


def predicted(cells: Cells) -> list[tuple[float, float]]:
    """Give predicted and measured milliseconds of all networks."""
    rows = [cell["values"] for cell in pick(cells)]
    return [(row[f"{n}_predicted_ms"], row[f"{n}_ms"]) for row in rows for n in NETWORKS]


def summary(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Give mean and deviation of every search and of both networks beside it."""
    rows: list[dict[str, Any]] = []
    for name in settings["rivals"]:
        row: dict[str, Any] = {"rival": name}
        for value in ("search_seconds", *(f"{n}_{key}" for n in NETWORKS for key in ROW)):
            found = values(cells, value, rival=name)
            row[value] = {"mean": mean(found), "sd": spread(found), "seeds": len(found)}
        rows.append(row)
    return rows


def tables(settings: Settings, cells: Cells) -> list[Table]:
    """Give accuracies and times, and what was found."""
    head = ["search", "network", "test accuracy, %", "parameters", "multiply-accumulates"]
    head += ["measured ms", "predicted ms", "seconds of the search"]
    rows, found = [], []
    for name in settings["rivals"]:
        for n in NETWORKS:
            seen = {key: values(cells, f"{n}_{key}", rival=name) for key in ROW}
            seconds = values(cells, "search_seconds", rival=name) if n == FOUND else []
            counts = [f"{mean(seen[key]) or 0:,.0f}" for key in ("params", "macs")]
            times = [plus_minus(seen[key], 3) for key in ("ms", "predicted_ms")]
            accuracy = plus_minus([100 * v for v in seen["accuracy"]])
            spent = f"{mean(seconds):.0f}" if seconds else ""
            rows.append([name, n, accuracy, *counts, *times, spent])
        for cell in pick(cells, rival=name):
            said = [cell["values"][f"{n}_is"] for n in NETWORKS]
            found.append([name, str(cell["key"]["seed"]), *said])
    return [
        Table("What searches find, beside what others reach at equal cost", head, rows),
        Table("What was found (blocks, sizes, depths)", ["search", "seed", *NETWORKS], found),
    ]
