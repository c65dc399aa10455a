"""WeightAlign, batch norms and group norms at small and large batches, and through many layers."""

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bench.claim import judged
from bench.compress import Values, compress
from bench.data import SMALL, Small, some
from bench.experiments import Cell, Cells, Table, by_seed, paired, values
from bench.small import cnn, method_of, seeded
from bench.stats import mean, plus_minus, spread
from pliant.data import Data, Train, load
from pliant.run import start

Settings = Mapping[str, Any]
BATCHED, ALIGNED, GROUPED, BOTH = (
    *("batch norm", "weightalign", "group norm"),
    "weightalign + group norm",
)
PAPER = "weightalign(scale=2.0)"
BATCH = 128  # at which the learning rate is the one that the settings name


def cells(settings: Settings) -> list[Cell]:
    """List all trainings, all of the first seed first, and then the deep stacks."""
    asked = ("images", "widths", "train", "data")
    shared = {name: settings[name] for name in asked if name in settings}
    rows = []
    for seed in settings["seeds"]:
        for name, rival in settings["rivals"].items():
            plan = {**shared, "norm": rival["norm"], "spec": rival["spec"]}
            for batch in rival["batches"]:
                key = {"study": "batches", "rival": name, "batch": batch, "seed": seed}
                rows.append(Cell(key, plan))
    depth = {name: value for name, value in settings["depth"].items() if name != "seeds"}
    return rows + [
        Cell({"study": "depth", "seed": seed}, depth) for seed in settings["depth"]["seeds"]
    ]


def measure(cell: Cell, watch: Callable[[dict[str, Any]], None]) -> Values:
    """Train once, or send noise through a deep stack."""
    return _depth(cell) if cell.key["study"] == "depth" else _trained(cell)


def claims(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Say what the method claims."""
    asked = settings["claims"]
    worst = values(cells, "worst", study="depth")
    wide = (_ranges(settings, cells, name) for name in (BATCHED, ALIGNED))
    return [
        judged(
            "Variance stays near the first layer's",
            worst,
            "<=",
            asked["depth"],
            "x",
        ),
        judged(
            "At batch 2 it beats batch norm", _leads(cells, ALIGNED, BATCHED), ">=", 0, "points"
        ),
        judged("Accuracy moves less from batch to batch", paired(*wide, 100), ">", 0, "points"),
        judged(
            "At batch 2 it does not harm group norm",
            _leads(cells, BOTH, GROUPED),
            ">=",
            -asked["group"],
            "points",
        ),
    ]


def summary(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Give mean and deviation of every setting, and of the variances at the last layer."""
    rows: list[dict[str, Any]] = []
    for name, rival in settings["rivals"].items():
        for batch in rival["batches"]:
            found = _accuracies(cells, name, batch)
            accuracy = {"mean": mean(found), "sd": spread(found), "seeds": len(found)}
            rows.append({"rival": name, "batch": batch, "accuracy": accuracy})
    for name in ("plain", "paper", "aligned"):
        found = values(cells, name, study="depth")
        rows.append({"depth": name, "variance": {"mean": mean(found), "sd": spread(found)}})
    return rows


def tables(settings: Settings, cells: Cells) -> list[Table]:
    """Give accuracies by batch, and the variances behind the last layer."""
    batches = list(dict.fromkeys(b for r in settings["rivals"].values() for b in r["batches"]))
    rows = [
        [
            name,
            f"`{rival['spec']}`" if rival["spec"] else "",
            *(plus_minus([100 * v for v in _accuracies(cells, name, b)]) for b in batches),
        ]
        for name, rival in settings["rivals"].items()
    ]
    depth = [
        [text, *(f"{v:.2g}" if v is not None else "overflows" for v in _bounds(cells, name))]
        for name, text in (
            ("plain", "weights as they are"),
            ("paper", f"`{PAPER}`, the paper's"),
            ("aligned", "`weightalign`"),
        )
    ]
    head = ["least over seeds", "mean", "largest"]
    layers = settings["depth"]["layers"]
    return [
        Table("Accuracy in %", ["network", "method", *(f"batch {b}" for b in batches)], rows),
        Table(f"Variance behind {layers} layers, over the first's", ["filters", *head], depth),
    ]


def _accuracies(cells: Cells, rival: str, batch: int) -> list[float]:
    return values(cells, "accuracy", study="batches", rival=rival, batch=batch)


def _by_seed(cells: Cells, rival: str, batch: int) -> dict[int, float]:
    return by_seed(cells, "accuracy", study="batches", rival=rival, batch=batch)


def _leads(cells: Cells, own: str, other: str, batch: int = 2) -> list[float]:
    return paired(*(_by_seed(cells, name, batch) for name in (own, other)), scale=100)


def _ranges(settings: Settings, cells: Cells, rival: str) -> dict[int, float]:
    """The best accuracy minus the worst over the sizes of the batch, for each seed."""
    found = [_by_seed(cells, rival, batch) for batch in settings["rivals"][rival]["batches"]]
    seeds = [seed for seed in found[0] if all(seed in row for row in found)]
    return {s: max(row[s] for row in found) - min(row[s] for row in found) for s in seeds}


def _bounds(cells: Cells, name: str) -> list[float | None]:
    found = values(cells, name, study="depth")
    return [min(found), statistics.fmean(found), max(found)] if found else [None] * 3


# ---------------------------------------------------------------- the studies


def _trained(cell: Cell) -> Values:
    plan, seed, batch = cell.plan, cell.key["seed"], cell.key["batch"]
    source = SMALL[plan["data"]] if "data" in plan else Small(_digits, 1, "")
    data, channels = source.load(plan["images"]), source.channels
    model = seeded(seed, lambda: cnn(channels, plan["widths"], norm=plan["norm"]))
    settings = {**plan["train"], "lr": plan["train"]["lr"] * batch / BATCH}
    return compress(
        model, data, method_of(plan["spec"]), {}, Train(**settings, batch=batch), seed=seed
    )


def _digits(images: Mapping[str, int]) -> Data:
    return some(replace(load("mnist5k"), val=None), images)


def _depth(cell: Cell) -> Values:
    """The variance behind the last layer over that behind the first, three ways, and the worst."""
    plan, seed = cell.plan, cell.key["seed"]
    noise = torch.randn(4, 3, *[plan["size"]] * 2, generator=torch.Generator().manual_seed(seed))
    found: Values = {}
    for name, spec in (("plain", ""), ("paper", PAPER), ("aligned", "weightalign")):
        model = seeded(seed, lambda: _stack(plan["layers"], plan["width"]))
        start(model, method_of(spec), example=(noise[:1],)).finish()
        ratios = _ratios(model, noise)
        found[name] = ratios[-1] if ratios[-1] < math.inf else None
        if name == "aligned":
            found["worst"] = max(max(ratio, 1 / ratio) for ratio in ratios)
    return found


def _stack(layers: int, width: int) -> nn.Sequential:
    """Convolutions with weights of no sensible mean and scale, rectifiers, and a last layer."""
    parts: list[nn.Module] = []
    for _ in range(layers):
        source = width if parts else 3
        conv = nn.Conv2d(source, width, 3, padding=1, bias=False, padding_mode="circular")
        nn.init.normal_(conv.weight, 0.3, 5.0)
        parts += [conv, nn.ReLU()]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 2))


@torch.no_grad()
def _ratios(model: nn.Sequential, images: Tensor) -> list[float]:
    """The variance of what each convolution gives, over that of the first; inf beyond float32."""
    hidden, variances = images, []
    for layer in model:
        hidden = layer(hidden)
        variances += [float(hidden.double().var())] if isinstance(layer, nn.Conv2d) else []
    finite = [value if math.isfinite(value) else math.inf for value in variances]
    return [value / finite[0] for value in finite]
