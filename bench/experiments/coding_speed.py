"""One matrix in every code: bytes beside other packers, and how fast it is written and read."""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor, nn

from bench.claim import claim
from bench.experiments import Cell, Cells, Table, pick
from pliant.codecs import address_map, loops, tensors
from pliant.edits.encode import Encode
from pliant.errors import require
from pliant.families.code.sharing import draw, mask, representatives

Settings = Mapping[str, Any]
LIBRARIES = ("scipy", "numba", "zstandard", "constriction")
BATCH = 128


def cells(settings: Settings) -> list[Cell]:
    """List the pruning levels."""
    plan = {key: settings[key] for key in ("size", "values", "repetitions")}
    return [
        Cell({"level": level, "seed": seed}, plan)
        for level in settings["levels"]
        for seed in settings["seeds"]
    ]


def measure(cell: Cell, watch: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Code one matrix in every form and by other packers, and time it."""
    plan = cell.plan
    weight = matrix(plan["size"], cell.key["level"], plan["values"], cell.key["seed"])
    return {"dense": weight.nbytes, **_sizes(weight), **_speeds(weight, plan["repetitions"])}


def matrix(size: int, level: float, count: int, seed: int) -> Tensor:
    """Make weights as the paper does: Gaussian, pruned, rounded to quantiles of all of them."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(size, size, generator=random)
    kept = mask(weight, level)
    levels = representatives(weight * kept, count)
    return levels[draw(weight * kept, levels, random)] * kept + 0.0


def _sizes(weight: Tensor) -> dict[str, int]:
    patterns, dense = tensors.patterns(weight), weight.numpy()
    sparse = scipy.sparse.csc_matrix(dense.T)
    arrays = (sparse.data, sparse.indices, sparse.indptr)
    zstd = require("zstandard", "bench").ZstdCompressor(level=19)
    return {
        **{form: len(address_map.encode(patterns, form)) for form in address_map.FORMS},
        **{f"paper_{f}": address_map.paper_size(patterns, f) for f in ("hac", "shac")},
        "csc": sum(np.asarray(array).nbytes for array in arrays),
        "zstd": len(zstd.compress(dense.tobytes())),
        "constriction": _constriction(patterns),
    }


def _constriction(patterns: Any) -> int:
    stream = require("constriction", "bench").stream
    _, index, counts = np.unique(patterns, return_inverse=True, return_counts=True)
    model = stream.model.Categorical(counts / counts.sum(), perfect=False)
    coder = stream.stack.AnsCoder()
    coder.encode_reverse(index.reshape(-1).astype(np.int32), model)
    return int(coder.get_compressed().nbytes) + 6 * len(counts)


def _speeds(weight: Tensor, repetitions: int) -> dict[str, float]:
    """Give MB/s of writing and reading, and milliseconds of a product with a batch."""
    patterns, found = tensors.patterns(weight), {}
    x = torch.ones(BATCH, weight.shape[1])
    model = nn.Sequential(nn.Linear(*reversed(weight.shape), bias=False))
    model[0].weight = nn.Parameter(weight, requires_grad=False)
    found["product_dense_ms"] = 1e3 * _median(lambda: model(x), repetitions)
    for form in address_map.FORMS:
        data = address_map.encode(patterns, form)
        found[f"encode_{form}"] = _rate(
            weight, lambda form=form: address_map.encode(patterns, form), repetitions
        )
        layer = nn.Sequential(nn.Linear(*reversed(weight.shape), bias=False))
        Encode("0", form, len(data), data=data).apply(layer)
        for name, least in (("compiled", 0), ("plain", 1 << 60)):
            with _loops(least):
                found[f"decode_{form}_{name}"] = _rate(
                    weight,
                    lambda data=data: address_map.decode(data, patterns.shape, 4),
                    repetitions,
                )
                if name == "compiled":
                    spent = _median(lambda layer=layer: layer(x), repetitions)
                    found[f"product_{form}_ms"] = 1e3 * spent
    return {name: round(value, 3) for name, value in found.items()}


def _rate(weight: Tensor, work: Callable[[], object], repetitions: int) -> float:
    return weight.nbytes / 1e6 / _median(work, repetitions)


def _median(work: Callable[[], object], repetitions: int) -> float:
    """Time some work, after once for what is compiled and cached."""
    work()
    spent = []
    for _ in range(repetitions):
        began = time.perf_counter()
        work()
        spent.append(time.perf_counter() - began)
    return statistics.median(spent)


@contextmanager
def _loops(least: int) -> Iterator[None]:
    """Compile loops from so many symbols on."""
    before, loops.WORTH = loops.WORTH, least
    try:
        yield
    finally:
        loops.WORTH = before


# ---------------------------------------------------------------- what is said of it


def claims(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Check the accounting, the bounds, the crossover, and the speed."""
    asked = settings["claims"]
    low, cross, high = 0.8, 0.97, 0.99
    off = [abs(c[f] / c[f"paper_{f}"] - 1) for c in _all(cells) for f in ("hac", "shac")]
    text = "Bytes of HAC and sHAC over what the paper counts, farthest from 1"
    rows = [claim(text, max(off, default=None), "<=", asked["accounting"], "")]
    share = min((c["hac"] / c["dense"] for c in _all(cells)), default=None)
    rows.append(claim("HAC over dense, the least of all", share, ">=", asked["floor"], ""))
    text = f"sHAC over HAC at p = {low:.0%}"
    rows.append(claim(text, _over(cells, "shac", "hac", low), ">", 1, "x"))
    text = f"sHAC over HAC at p = {cross:.0%}"
    rows.append(claim(text, _over(cells, "shac", "hac", cross), "<", 1, "x"))
    text = f"sHAC at p = {high:.0%}"
    ratio = _over(cells, "dense", "shac", high)
    rows.append(claim(text, ratio, ">=", asked["ratio"], "times smaller"))
    worst = max((c["ans"] / c["constriction"] for c in _all(cells)), default=None)
    text = "ANS over constriction's with the same dictionary, the most"
    rows.append(claim(text, worst, "<=", asked["ans"], "x"))
    for other in ("hac", "shac", "zstd", "csc"):
        most = max((c["ans"] / c[other] for c in _all(cells)), default=None)
        rows.append(claim(f"ANS over {other}, the most", most, "<=", 1, "x"))
    for form in address_map.FORMS:
        slowest = min((c[f"decode_{form}_compiled"] for c in _all(cells)), default=None)
        text = f"Reading {form}, the slowest"
        rows.append(claim(text, slowest, ">=", asked["decode"], "MB/s"))
    return rows


def _all(cells: Cells) -> list[dict[str, Any]]:
    return [cell["values"] for cell in pick(cells)]


def _over(cells: Cells, one: str, other: str, level: float) -> float | None:
    found = [c["values"] for c in pick(cells, level=level)]
    return statistics.fmean(c[one] / c[other] for c in found) if found else None


def summary(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Say between which levels sHAC becomes the smaller one."""
    smaller = [c["key"]["level"] for c in pick(cells) if c["values"]["shac"] < c["values"]["hac"]]
    larger = [c["key"]["level"] for c in pick(cells) if c["values"]["shac"] >= c["values"]["hac"]]
    return [{"shac_larger_up_to": max(larger, default=None), "shac_smaller_from": _least(smaller)}]


def _least(levels: Iterable[float]) -> float | None:
    return min(levels, default=None)


def tables(settings: Settings, cells: Cells) -> list[Table]:
    """Give one table of sizes and one of speeds, a row per level."""
    sizes = ("hac", "shac", "ans", "paper_hac", "paper_shac", "csc", "zstd", "constriction")
    heads = [
        "HAC",
        "sHAC",
        "ANS",
        "HAC as counted",
        "sHAC as counted",
        "CSC",
        "zstd",
        "constriction",
    ]
    rows = [
        [_level(c), *(f"{c['values']['dense'] / max(1, c['values'][s]):.1f}" for s in sizes)]
        for c in pick(cells)
    ]
    found = [Table("Times smaller than dense float32", ["p", *heads], rows)]
    names = [f"encode_{form}" for form in address_map.FORMS]
    names += [f"decode_{f}_{how}" for f in address_map.FORMS for how in ("compiled", "plain")]
    rows = [[_level(c), *(f"{c['values'][n]:.0f}" for n in names)] for c in pick(cells)]
    heads = [
        name.replace("_", " ").replace("decode", "read").replace("encode", "write")
        for name in names
    ]
    found.append(Table("MB/s of dense float32", ["p", *heads], rows))
    names = [f"product_{form}_ms" for form in ("dense", *address_map.FORMS)]
    rows = [[_level(c), *(f"{c['values'][n]:.2f}" for n in names)] for c in pick(cells)]
    title = f"Milliseconds of the product with a batch of {BATCH}, from the code"
    return [*found, Table(title, ["p", "dense", *address_map.FORMS], rows)]


def _level(cell: Mapping[str, Any]) -> str:
    return f"{cell['key']['level']:.0%}"
