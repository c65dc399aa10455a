"""What planning from data costs: seconds of CPU and peak memory over depth and width, untrained."""

import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor, nn

import pliant
from bench.claim import claim
from bench.experiments import Cell, Cells, Table, pick, plain

Settings = Mapping[str, Any]
TOKENS = 16  # of one sample
UNIT = 1 if sys.platform == "darwin" else 1024  # bytes of one unit of the peak that is reported


class Block(nn.Module):
    """Attention whose projections read one tensor, and a perceptron of twice the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, tokens, width) to the same shape."""
        seen = self.before(x)
        heads = (f(seen).unflatten(-1, (-1, 64)).transpose(1, 2) for f in (self.q, self.k, self.v))
        found = nn.functional.scaled_dot_product_attention(*heads)
        x = x + self.out(found.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.between(x))))


class Answer(nn.Module):
    """Blocks in a row, and class scores of the mean token."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, tokens, width) to (N, 10)."""
        return self.head(self.blocks(x).mean(1))


def cells(settings: Settings) -> list[Cell]:
    """List every rival at every depth of one width, and every width of one depth."""
    sizes = [(depth, settings["width"]) for depth in settings["depths"]]
    sizes += [(settings["depth"], width) for width in settings["widths"]]
    plan = {key: settings[key] for key in ("samples", "share")}
    return [
        Cell(
            {"rival": rival, "depth": depth, "width": width, "seed": seed},
            {**plan, "method": method, "budget": settings["budgets"].get(rival)},
        )
        for seed in settings["seeds"]
        for depth, width in dict.fromkeys(sizes)
        for rival, method in settings["rivals"].items()
    ]


def measure(cell: Cell, watch: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Plan and change one network in a process of its own, whose peak of memory is the work's."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_measured, cell.key, cell.plan).result()


def _measured(key: Mapping[str, Any], plan: Mapping[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.manual_seed(key["seed"])
    model = Answer(key["depth"], key["width"]).eval()
    basis = torch.randn(key["width"] // 4, key["width"])  # what it reads is no white noise
    x = torch.randn(2 * plan["samples"], TOKENS, len(basis)) @ basis / len(basis) ** 0.5
    seen, held = x.split(plan["samples"])
    labels = torch.randint(0, 10, (len(seen),))
    with torch.no_grad():
        model(seen[:8])
        began = time.process_time()
        model(seen)
        forward = time.process_time() - began
        wanted = model(held)
    if plan["method"] is not None:  # what is imported at first use is no cost of the method
        few = torch.randn(8, TOKENS, 64), torch.randint(0, 10, (8,))
        pliant.compress(Answer(1, 64), few, plan["method"], plan["budget"], strict=False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    if plan["method"] is None:
        found = _rival(key["rival"], model, seen, plan["share"])
        params = sum(p.numel() for p in found.parameters())
    else:
        result = pliant.compress(model, (seen, labels), plan["method"], plan["budget"])
        found, params = result.model.eval(), result.report.after.params
    seconds = time.process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.no_grad():
        error = float((found(held) - wanted).square().mean() / wanted.var())
    return {
        "seconds": seconds,
        "forwards": seconds / forward,
        "peak_mb": (peak - before) * UNIT / 1e6,
        "network_mb": sum(p.nbytes for p in model.parameters()) / 1e6,
        "params": params,
        "error": error,
    }


def _rival(name: str, model: nn.Module, x: Tensor, share: float) -> nn.Module:
    """Change a network by plain code: a whitened SVD at one share, or BALF's procedure."""
    batches = [(batch,) for batch in x.split(128)]
    if name == "plain":
        plain.whitened(model, batches, share, skip=("head",))
        return model
    layers = plain.layers_of(model, ("head",))
    limit = share * sum(layer.weight.numel() for layer in layers.values())
    plain.balf(model, batches, limit, dict.fromkeys(layers, 1), skip=("head",))
    return model


# ---------------------------------------------------------------- what is said of it


def claims(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Check how seconds grow with depth, and what planning costs beside the plain way."""
    asked, rows = settings["claims"], []
    for rival in settings["rivals"]:
        text = f"{rival}: exponent of the seconds over depth"
        rows.append(claim(text, _exponent(settings, cells, rival), "<=", asked["exponent"], ""))
    for rival, most in asked["times"].items():
        text = f"{rival}: seconds over those of a plain whitened SVD, the most"
        rows.append(claim(text, _over(cells, rival, "seconds"), "<=", most, "x"))
        text = f"{rival}: error over that of a plain whitened SVD, the most"
        rows.append(claim(text, _over(cells, rival, "error"), "<=", 1, "x"))
    text = "group_fisher: seconds in forward passes over its samples, the most"
    most = max((c["values"]["forwards"] for c in pick(cells, rival="group_fisher")), default=None)
    rows.append(claim(text, most, "<=", asked["forwards"], "passes"))
    return rows


def _exponent(settings: Settings, cells: Cells, rival: str) -> float | None:
    found = pick(cells, rival=rival, width=settings["width"])
    known = {d: _mean(found, d) for d in {c["key"]["depth"] for c in found}}
    if len(known) < len(settings["depths"]):
        return None
    low, high = min(known), max(known)
    return math.log(known[high] / known[low]) / math.log(high / low)


def _mean(found: Iterable[Mapping[str, Any]], depth: int) -> float:
    return statistics.fmean(c["values"]["seconds"] for c in found if c["key"]["depth"] == depth)


def _over(cells: Cells, rival: str, what: str) -> float | None:
    ratios = []
    for cell in pick(cells, rival=rival):
        same = {key: cell["key"][key] for key in ("depth", "width", "seed")}
        ratios += [
            cell["values"][what] / other["values"][what]
            for other in pick(cells, rival="plain", **same)
        ]
    return max(ratios, default=None)


def summary(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Give the exponent of every rival."""
    return [
        {"rival": rival, "exponent": _exponent(settings, cells, rival)}
        for rival in settings["rivals"]
    ]


def tables(settings: Settings, cells: Cells) -> list[Table]:
    """Give one table: a row per rival and size."""
    head = ["rival", "blocks", "width", "seconds", "forward passes", "peak MB", "network MB"]
    rows = [
        [
            str(cell["key"]["rival"]),
            str(cell["key"]["depth"]),
            str(cell["key"]["width"]),
            *(f"{cell['values'][name]:.4g}" for name in ("seconds", "forwards", "peak_mb")),
            f"{cell['values']['network_mb']:.4g}",
            f"{cell['values']['params'] / 1e6:.3f}",
            f"{cell['values']['error']:.4f}",
        ]
        for cell in pick(cells)
    ]
    return [Table("What planning costs", [*head, "million parameters left", "error"], rows)]
