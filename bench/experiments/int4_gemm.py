"""Products of 4-bit codes: exact, how many bytes, and what a small network of them still knows.

Rivals take the very same codes: PyTorch's own product of int8 matrices, and onnxruntime's
MatMulNBits, which adds in floating point and has a scale for every block of depth.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bench.claim import claim, judged
from bench.compress import Values, compress
from bench.experiments import Cell, Cells, Table, by_seed, paired, pick, values
from bench.experiments.int4_rivals import NBITS, TORCH, Rival, rivals
from bench.small import cnn, method_of, seeded
from bench.stats import plus_minus
from pliant import zoo
from pliant.cost import cost
from pliant.data import Data, Train, load
from pliant.drivers.loop import evaluate, fit
from pliant.math.gemm import panels, product
from pliant.math.gemm_loops import WIDTH
from pliant.method import Method
from pliant.run import start

Settings = Mapping[str, Any]
LIBRARIES = ("numba", "onnx", "onnxruntime")
OURS, PLAIN, DENSE = "int4_gemm", "int4_gemm, plain PyTorch", "float32"


def cells(settings: Settings) -> list[Cell]:
    """List every shape, then every seed with every way to round."""
    rows = [Cell({"part": "product", "shape": shape}, {}) for shape in settings["shapes"]]
    for seed in settings["seeds"]:
        for network, own in settings["networks"].items():
            shared = {"data": settings["data"], "widths": own["widths"], "base": own["base"]}
            key = {"part": "network", "network": network, "rival": DENSE, "seed": seed}
            rows.append(Cell(key, shared))
            for rival, row in settings["rivals"].items():
                train = own["train"] if row["trained"] else None
                plan = {**shared, "spec": row["spec"], "train": train}
                rows.append(Cell({**key, "rival": rival}, plan))
    return rows


def measure(cell: Cell, watch: Callable[[dict[str, Any]], None]) -> Values:
    """Multiply one shape by everyone, or round one network."""
    if cell.key["part"] == "product":
        return _products(cell.key["shape"])
    return _network(cell.plan, cell.key["seed"], watch)


# ---------------------------------------------------------------- products


def _products(shape: list[int]) -> Values:
    """Count the sums that are not those of 64-bit integers, and the bytes of the right matrix."""
    rows, depth, columns = shape
    left, right = (_random(n, depth, seed) for n, seed in ((rows, 0), (columns, 1)))
    wanted = left.long() @ right.long().T
    packed, found = panels(right, WIDTH, 4), {}
    for name, plain in ((OURS, False), (PLAIN, True)):
        mine = product(left, packed, 4, plain=plain)[:, :columns]
        wrong = int((mine.long() != wanted).sum())
        found |= {f"wrong {name}": wrong, f"bytes {name}": packed.numel()}
    for name, rival in rivals(right).items():
        found |= _compared(name, rival, left, wanted)
    full = torch.full((1, 292), 15, dtype=torch.uint8)
    wraps = [int(product(full, panels(full, WIDTH, 4), 4, block=b)[0, 0]) for b in (292, 290)]
    return {**found, "float32": 4 * depth * columns, "in one sum": wraps[0], "in blocks": wraps[1]}


def _compared(name: str, rival: Rival, left: Tensor, wanted: Tensor) -> Values:
    found = rival.multiply(left)
    gap = (found.double() - wanted.double()).abs()
    return {
        f"wrong {name}": int((gap > 0).sum()),
        f"largest {name}": float(gap.max()),
        f"bytes {name}": rival.bytes,
    }


def _random(rows: int, depth: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 16, (rows, depth), generator=generator).to(torch.uint8)


# ---------------------------------------------------------------- a network


_BASES: dict[tuple[str, int], nn.Module] = {}


def _network(plan: Mapping[str, Any], seed: int, watch: Callable[..., None]) -> Values:
    data = _data(plan["data"])
    model = copy.deepcopy(_base(plan, seed, data))
    if "spec" not in plan:
        return {"accuracy": evaluate(model, data, "test").accuracy, "bytes": _bytes(model, data)}
    if plan["train"] is None:
        start(model, method_of(plan["spec"]), data=data, seed=seed).finish()
        return {"accuracy": evaluate(model, data, "test").accuracy, "bytes": _bytes(model, data)}
    train = Train(**plan["train"])
    found = compress(model, data, method_of(plan["spec"]), {}, train, seed=seed, watch=watch)
    return {name: found[name] for name in ("accuracy", "bytes")}


def _base(plan: Mapping[str, Any], seed: int, data: Data) -> nn.Module:
    """Train the network in floating point; once for all cells of one call."""
    key = (str(plan["widths"]), seed)
    if key not in _BASES:
        model, train = seeded(seed, lambda: _built(plan["widths"])), Train(**plan["base"])
        steps = train.steps(data.steps(train.batch))
        fit(start(model, Method(), data=data, steps=steps, seed=seed), data, train)
        _BASES[key] = model
    return _BASES[key]


def _built(widths: list[int]) -> nn.Module:
    """LeNet-5 without widths; else pairs of convolutions with batch norms."""
    return cnn(1, widths) if widths else zoo.build("lenet5")


def _data(name: str) -> Data:
    return replace(load(name), val=None)


def _bytes(model: nn.Module, data: Data) -> int:
    return cost(model, data.example()).bytes


# ---------------------------------------------------------------- what came out


def claims(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Say what the card of the method asks for."""
    asked, found = settings["claims"], pick(cells, part="product")
    wrong = [c["values"][f"wrong {name}"] for c in found for name in (OURS, PLAIN)]
    sums = {(c["values"]["in one sum"], c["values"]["in blocks"]) for c in found}
    shapes = [(c["values"], c["key"]["shape"]) for c in found]  # those that fill their panels
    whole = [row for row, shape in shapes if not shape[1] % 2 and not shape[2] % WIDTH]

    def ratio(other: str) -> float | None:
        each = [row[other] / row[f"bytes {OURS}"] for row in whole if row.get(other)]
        return min(each, default=None)

    def of(network: str, rival: str) -> dict[Any, float]:
        return by_seed(cells, "accuracy", part="network", network=network, rival=asked[rival])

    def gap(network: str, first: str, second: str) -> list[float]:
        return paired(of(network, first), of(network, second), 100)

    trained = [
        row
        for network in settings["networks"]
        for row in (
            judged(
                f"{network}: 4 bits, trained, behind 8 bits, trained",
                *(gap(network, "eight", "four"), "<=", asked["behind"], "points"),
            ),
            judged(
                f"{network}: 4 bits, trained, before 4 bits, not trained",
                *(gap(network, "four", "untrained"), ">", 0, "points"),
            ),
        )
    ]
    return [
        *trained,
        claim("Sums that differ from 64-bit integers", sum(wrong) if wrong else None, "<=", 0, ""),
        claim(
            "292 products of 15 x 15 in one sum of 16 bits wrap around to 164, in blocks not",
            float(sums == {(164, 65700)}) if sums else None,
            *(">=", 1, ""),
        ),
        claim("Bytes of float32 over ours", ratio("float32"), ">=", asked["float32"], "x"),
        claim(f"Bytes of {TORCH} over ours", ratio(f"bytes {TORCH}"), ">=", asked["int8"], "x"),
        claim(f"Bytes of {NBITS} over ours", ratio(f"bytes {NBITS}"), ">=", asked["nbits"], "x"),
    ]


def summary(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Give every product, and the accuracy of every network."""
    return [{**cell["key"], **cell["values"]} for cell in cells if "refused" not in cell]


def tables(settings: Settings, cells: Cells) -> list[Table]:
    """Give wrong sums and bytes by shape, and accuracy by rival."""
    names = (OURS, TORCH, NBITS)
    head = ["rows x depth x columns", *(f"{name}: wrong sums, bytes" for name in names)]
    rows = [
        [
            " x ".join(map(str, cell["key"]["shape"])),
            *(
                f"{cell['values'].get(f'wrong {n}', '–')}, {cell['values'].get(f'bytes {n}', 0):,}"
                for n in names
            ),
        ]
        for cell in pick(cells, part="product")
    ]
    return [Table("Products of the same codes", head, rows), *_networks(settings, cells)]


def _networks(settings: Settings, cells: Cells) -> list[Table]:
    found = []
    for network in settings["networks"]:
        rows = []
        for rival in (DENSE, *settings["rivals"]):
            key = {"part": "network", "network": network, "rival": rival}
            scores = plus_minus([100 * v for v in values(cells, "accuracy", **key)])
            size = values(cells, "bytes", **key)
            rows.append([rival, scores, f"{size[0]:,.0f}" if size else ""])
        found.append(Table(f"{network} on digits", ["numbers", "accuracy, %", "bytes"], rows))
    return found
