"""What coding a trained network gains and loses, over pruning level and number of values."""

import json
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor, nn

from bench.claim import claim, judged
from bench.experiments import Cell, Cells, Table, by_seed, paired, pick, values
from bench.stats import mean, plus_minus
from pliant import zoo
from pliant.codecs import address_map, tensors
from pliant.data import Data, Train, load
from pliant.drivers.loop import evaluate, fit
from pliant.errors import require
from pliant.files import artifact
from pliant.method import Method
from pliant.nn.coded import Coded
from pliant.registry import build
from pliant.run import start

Settings = Mapping[str, Any]
DENSE = "dense"
LIBRARIES = ("scipy", "zstandard", "numba")


def cells(settings: Settings) -> list[Cell]:
    """List the dense networks, then every level with every number of values."""
    again = settings["repeat"]
    rows = []
    for network, grid in settings["networks"].items():
        shared = {key: settings[key] for key in ("data", "base", "train")}
        rows += [Cell(_key(network, DENSE, seed=seed), shared) for seed in settings["seeds"]]
        for level in grid["levels"]:
            for count in grid["values"]:
                for share, spec in settings["shares"].items():
                    if share != "pq" and count != settings["both"]:
                        continue
                    point = {"network": network, "level": level, "values": count}
                    for seed in settings["seeds"] if point == again else settings["seeds"][:1]:
                        plan = {**shared, "method": spec.format(p=level, k=count)}
                        key = _key(network, share, level=level, values=count, seed=seed)
                        rows.append(Cell(key, plan))
    return rows


def _key(network: str, share: str, **rest: Any) -> dict[str, Any]:
    return {"network": network, "share": share, **rest}


def measure(cell: Cell, watch: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Train with the method from the dense network; score it, and count bytes in every form."""
    plan, seed = cell.plan, cell.key["seed"]
    data = _data(plan["data"])
    model = _network(cell.key["network"], seed)
    model.load_state_dict(_base(cell.key["network"], seed, plan["data"], json.dumps(plan["base"])))
    if cell.key["share"] == DENSE:
        return {"accuracy": evaluate(model, data, "test").accuracy}
    train = Train(**plan["train"], device="cpu")
    steps = train.steps(data.steps(train.batch))
    run = start(model, build(plan["method"]), data=data, steps=steps, seed=seed)
    fit(run, data, train, watch=watch)
    return {
        "accuracy": evaluate(model, data, "test").accuracy,
        **_kernels([m.weight for m in model.modules() if isinstance(m, Coded)]),
        "file": _file(model, run.edits),
    }


def _kernels(weights: list[Tensor]) -> dict[str, Any]:
    """Sum the bytes of all coded kernels, as they were and in every form."""
    found = [_sizes(weight.flatten(1)) for weight in weights]
    distinct = max(len(weight.unique()) for weight in weights)
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    total = {name: sum(sizes[name] for sizes in found) for name in found[0]}
    numbers = sum(weight.numel() for weight in weights)
    return {**total, "distinct": distinct, "zeros": zeros / numbers}


def _sizes(weight: Tensor) -> dict[str, int]:
    matrix, dense = tensors.patterns(weight), weight.numpy()
    sparse = scipy.sparse.csc_matrix(dense.T)
    arrays = (sparse.data, sparse.indices, sparse.indptr)
    zstd = require("zstandard", "bench").ZstdCompressor(level=19)
    return {
        "dense": dense.nbytes,
        **{form: len(address_map.encode(matrix, form)) for form in address_map.FORMS},
        "paper_shac": address_map.paper_size(matrix, "shac"),
        "csc": sum(np.asarray(array).nbytes for array in arrays),
        "zstd": len(zstd.compress(dense.tobytes())),
    }


def _file(model: nn.Module, edits: Any) -> int:
    with tempfile.TemporaryDirectory() as folder:
        return artifact.save(Path(folder) / "a.pliant", model, edits).stat().st_size


@cache
def _data(name: str) -> Data:
    return load(name)


def _network(name: str, seed: int) -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        if name != "mlp":
            return zoo.build(name)
        sizes = (784, 300, 100, 10)
        rows = [nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False)]
        return nn.Sequential(nn.Flatten(), rows[0], nn.ReLU(), rows[1], nn.ReLU(), rows[2])


@cache
def _base(name: str, seed: int, data_name: str, plan: str) -> dict[str, Tensor]:
    """Train a dense network; once for all cells of one call."""
    train, data, model = Train(**json.loads(plan)), _data(data_name), _network(name, seed)
    steps = train.steps(data.steps(train.batch))
    fit(start(model, Method(), data=data, steps=steps, seed=seed), data, train)
    return model.state_dict()


# ---------------------------------------------------------------- what is said of it


def claims(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Check the small scale of the paper: ratio, accuracy, distinct values, and plain CSC."""
    asked, again = settings["claims"], settings["repeat"]
    point = {key: again[key] for key in ("network", "level", "values")}
    place = f"{again['network']} at p = {again['level']:.0%}, k = {again['values']}"
    rows = []
    for share in settings["shares"]:
        found = pick(cells, share=share, **point)
        ratios = [c["values"]["dense"] / c["values"]["shac"] for c in found]
        before = by_seed(cells, "accuracy", network=again["network"], share=DENSE)
        lost = paired(before, by_seed(cells, "accuracy", share=share, **point), 100)
        over = [c["values"]["shac"] / c["values"]["csc"] for c in found]
        counts = values(cells, "distinct", share=share, **point)
        rows += [
            judged(f"sHAC, {share}, {place}", ratios, ">=", asked["ratio"], "times smaller"),
            judged(f"Points lost, {share}, {place}", lost, "<=", asked["points"], "points"),
            judged(f"sHAC over plain CSC, {share}, {place}", over, "<", asked["csc"], "x"),
            claim(
                f"Distinct values of a layer, {share}, {place}",
                max(counts, default=None),
                *("<=", again["values"] + 1, ""),
            ),
        ]
    all_zeros = [c["values"]["zeros"] - c["key"]["level"] for c in cells if "zeros" in c["values"]]
    text = "Share of zeros above the pruning level, the least of all cells"
    return [*rows, claim(text, min(all_zeros, default=None), ">=", -1e-3, "")]


def _gap(cells: Cells, network: str, share: str, level: float, count: int) -> float | None:
    """Points lost against the dense network of the same seeds."""
    found = pick(cells, network=network, share=share, level=level, values=count)
    before = pick(cells, share=DENSE, network=network)
    dense = {c["key"]["seed"]: c["values"]["accuracy"] for c in before}
    pairs = [(dense.get(c["key"]["seed"]), c["values"]["accuracy"]) for c in found]
    lost = mean([100 * (was - now) for was, now in pairs if was is not None])
    return None if lost is None else round(lost, 6)  # whole images: the rest is rounding


def summary(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Give ratios and lost points of every cell."""
    return [
        {**c["key"], "accuracy": c["values"]["accuracy"], "ratios": _ratios(c["values"])}
        for c in cells
        if "refused" not in c
    ]


def _ratios(found: Mapping[str, Any]) -> dict[str, float]:
    forms = ("hac", "shac", "paper_shac", "ans", "csc", "zstd")
    return {form: round(found["dense"] / found[form], 2) for form in forms if form in found}


def tables(settings: Settings, cells: Cells) -> list[Table]:
    """Give one table per network: a row per way of sharing, level and number of values."""
    return [_table(settings, cells, network) for network in settings["networks"]]


def _table(settings: Settings, cells: Cells, network: str) -> Table:
    head = ["values", "p", "k", "distinct", "accuracy, %", "points lost"]
    head += ["HAC", "sHAC", "sHAC as counted", "ANS", "CSC", "zstd", "file, bytes"]
    grid, rows = settings["networks"][network], []
    for share in settings["shares"]:
        for count in grid["values"]:
            for level in grid["levels"]:
                key = {"network": network, "share": share, "level": level, "values": count}
                found = pick(cells, **key)
                if found:
                    rows.append([share, f"{level:.0%}", str(count), *_row(cells, key, found)])
    dense = plus_minus([100 * v for v in values(cells, "accuracy", network=network, share=DENSE)])
    return Table(f"{network}, times smaller than float32; dense accuracy {dense} %", head, rows)


def _row(cells: Cells, key: dict[str, Any], found: Cells) -> list[str]:
    ratios = [_ratios(c["values"]) for c in found]
    gap = _gap(cells, key["network"], key["share"], key["level"], key["values"])
    return [
        str(max(c["values"]["distinct"] for c in found)),
        plus_minus([100 * c["values"]["accuracy"] for c in found], 1),
        "" if gap is None else f"{gap:.1f}",
        *(f"{mean([row[form] for row in ratios]):.1f}" for form in ratios[0]),
        f"{found[0]['values']['file']:,}",
    ]
