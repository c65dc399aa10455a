"""The memory and time that a large decoder takes: factorized, then rounded, without training."""

import resource
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor, nn

import pliant
from bench.claim import claim
from bench.experiments import Cell, Cells, Table, pick

Settings = Mapping[str, Any]
UNIT = 1 if sys.platform == "darwin" else 1024  # bytes of one unit of the peak that is reported
HEADS, TIMES = 16, 4  # of attention; width of the perceptron over that of the stream


class Block(nn.Module):
    """Causal attention, and a gated perceptron."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.between = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, TIMES * width, bias=False) for _ in range(2))
        self.down = nn.Linear(TIMES * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, length, width) to the same shape."""
        seen = self.before(x)
        parts = [f(seen).unflatten(-1, (HEADS, -1)) for f in (self.q, self.k, self.v)]
        q, k, v = (part.transpose(1, 2) for part in parts)
        found = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(found.transpose(1, 2).flatten(2))
        seen = self.between(x)
        return x + self.down(nn.functional.silu(self.gate(seen)) * self.up(seen))


class Decoder(nn.Module):
    """A table of tokens, blocks, and scores of the next token."""

    def __init__(self, tokens: int, width: int, depth: int) -> None:
        super().__init__()
        self.table = nn.Embedding(tokens, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, tokens, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Map (N, length) to (N, length, tokens)."""
        return self.head(self.norm(self.blocks(self.table(ids))))


def cells(settings: Settings) -> list[Cell]:
    """List the one measurement."""
    names = ("width", "depth", "tokens", "sequences", "length", "method", "budget")
    return [Cell({"seed": settings["seed"]}, {name: settings[name] for name in names})]


def measure(cell: Cell, watch: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Compress the decoder in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_measured, cell.key["seed"], cell.plan).result()


def _measured(seed: int, plan: Mapping[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = Decoder(plan["tokens"], plan["width"], plan["depth"]).eval()
    ids = torch.randint(0, plan["tokens"], (plan["sequences"], plan["length"]))
    began = time.process_time()
    result = pliant.compress(model, ids, plan["method"], plan["budget"])
    report = result.report
    return {
        "seconds": time.process_time() - began,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT / 1e9,
        "params_before": report.before.params,
        "params": report.after.params,
        "bytes_before": report.before.bytes,
        "bytes": report.after.bytes,
    }


def claims(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Check that the decoder is as large as said, and the peak."""
    found = next((cell["values"] for cell in pick(cells)), None)
    asked = settings["claims"]
    size, peak = (found["params_before"] / 1e9, found["peak_gb"]) if found else (None, None)
    return [
        claim("parameters of the decoder", size, ">=", asked["params"], "billion"),
        claim("peak of resident memory", peak, "<", asked["gigabytes"], "GB"),
    ]


def summary(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Give what was measured."""
    return [cell["values"] for cell in pick(cells)]


def tables(settings: Settings, cells: Cells) -> list[Table]:
    """Give one row."""
    head = ["million parameters", "left", "MB", "left", "seconds of CPU", "peak GB"]
    rows = []
    for cell in pick(cells):
        found = cell["values"]
        sizes = [f"{found[name] / 1e6:.1f}" for name in ("params_before", "params")]
        sizes += [f"{found[name] / 1e6:.1f}" for name in ("bytes_before", "bytes")]
        rows.append([*sizes, f"{found['seconds']:.0f}", f"{found['peak_gb']:.2f}"])
    return [Table("A decoder", head, rows)]
