"""Bytes of a super-resolution network by the quality it keeps: rounded and coded, beside nncodec.

Ours is fitted to a few patches without sharp originals, nncodec's to nothing. Every file is read
again before it is scored.
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import bench
from bench.claim import claim
from bench.data import part
from bench.experiments import Cell, Cells, Table, pick
from pliant.data import Data
from pliant.errors import PliantError, require
from pliant.files import artifact
from pliant.registry import build
from pliant.run import start

Settings = Mapping[str, Any]
LIBRARIES = ("numba", "pillow")
OURS, THEIRS, DENSE = "groupwise_ptq and ANS", "nncodec", "float32"
DEPTH, WIDTH = 18, 64  # convolutions between the first and the last, and their channels
LUMA = (65.481, 128.553, 24.966)  # ITU-R BT.601, from 0..1 to 16..235


def cells(settings: Settings) -> list[Cell]:
    """List the network as it is, then every width of ours and every step of nncodec."""
    shared = {name: settings[name] for name in ("scale", "images", "patches")}
    rows = [Cell({"rival": DENSE, "point": ""}, shared)]
    for point, spec in settings["ours"].items():
        rows.append(Cell({"rival": OURS, "point": point}, {**shared, "spec": spec}))
    for qp in settings["nncodec"]:
        rows.append(Cell({"rival": THEIRS, "point": f"qp {qp}"}, {**shared, "qp": qp}))
    return rows


def measure(cell: Cell, watch: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Write one file, read it, and score what was read."""
    plan, model = cell.plan, network()
    found: dict[str, Any] = {"bytes": sum(p.numel() * 4 for p in model.parameters())}
    if "spec" in plan:
        model, found["bytes"] = _coded(model, plan)
    elif "qp" in plan:
        found = _nncodec(model, plan["qp"])
    return {**found, "psnr": psnr(model, plan["scale"], plan["images"])}


class VDSR(nn.Module):
    """Twenty convolutions that predict what a bicubic enlargement lacks (Kim et al., CVPR 2016)."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [1, *[WIDTH] * (DEPTH + 1), 1]
        pairs = zip(sizes, sizes[1:], strict=False)
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in pairs)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self.layers[:-1]:
            y = layer(y).relu()
        found: Tensor = x + self.layers[-1](y)
        return found


def network() -> nn.Module:
    """Read the trained network."""
    saved, model = load_file(part("vdsr") / "vdsr.safetensors"), VDSR()
    names = ["input.weight", *(f"residual_layer.{i}.conv.weight" for i in range(DEPTH))]
    state = {f"layers.{i}.weight": saved[n] for i, n in enumerate([*names, "output.weight"])}
    model.load_state_dict(state)
    return model.eval()


# ---------------------------------------------------------------- files


def _coded(model: nn.Module, plan: Mapping[str, Any]) -> tuple[nn.Module, int]:
    """Round the weights, save the whole network coded, and load it."""
    inputs = patches(**plan["patches"], scale=plan["scale"])
    data = Data((inputs, torch.zeros(len(inputs)).long()))
    run = start(model, build(plan["spec"]), data=data)
    run.finish()
    with tempfile.TemporaryDirectory() as folder:
        path = artifact.save(Path(folder) / "vdsr.pliant", model, run.edits, encode="ans")
        size = path.stat().st_size
        return artifact.load(path, VDSR()).eval(), size


def patches(photographs: list[str], count: int, size: int, scale: int) -> Tensor:
    """Cut enlarged patches, as the network reads them, out of photographs that skimage brings."""
    random, found = np.random.default_rng(0), []
    for place in range(count):
        image = getattr(require("skimage.data", "bench"), photographs[place % len(photographs)])()
        blurred = _blurred(_luma_of(image, scale), scale)
        down, right = (random.integers(0, length - size) for length in blurred.shape)
        found.append(blurred[down : down + size, right : right + size])
    return torch.from_numpy(np.stack(found))[:, None]


def _nncodec(model: nn.Module, qp: int) -> dict[str, Any]:
    """Let nncodec write the weights, and take what it reads; it has no other tools switched on."""
    python = os.environ.get("NNCODEC_PYTHON")
    if not python:
        raise PliantError(
            "nncodec is compared with and needs an environment of its own: make one, "
            "pip install nncodec there, and name its interpreter in NNCODEC_PYTHON."
        )
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        given, stream, back = (str(Path(folder) / name) for name in ("in.npz", "nnc", "out.npz"))
        np.savez(given, **weights)
        command = [python, str(Path(bench.__file__).parent / "code_by_nncodec.py")]
        done = subprocess.run(
            [*command, given, stream, back, str(qp)], capture_output=True, text=True
        )
        if done.returncode:
            raise PliantError(f"nncodec failed: {done.stderr.strip().splitlines()[-1]}")
        with np.load(back) as file:
            model.load_state_dict({name: torch.as_tensor(file[name]) for name in file.files})
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


# ---------------------------------------------------------------- quality


@torch.no_grad()
def psnr(model: nn.Module, scale: int, names: list[str]) -> float:
    """Enlarge the luma of Set5, made small by bicubic interpolation; the mean in dB."""
    found = []
    for name in names:
        photograph = require("PIL.Image", "data").open(part("set5") / f"{name}.png")
        sharp = _luma_of(photograph.convert("RGB"), scale)
        image = model(torch.from_numpy(_blurred(sharp, scale))[None, None])[0, 0].clamp(0, 1)
        gap = (image - torch.from_numpy(sharp))[scale:-scale, scale:-scale]
        found.append(-10 * float(gap.double().square().mean().log10()))
    return sum(found) / len(found)


def _luma_of(image: Any, scale: int) -> Any:
    """Return the luma of an RGB image in 0..1, cut to sizes that the scale divides."""
    rows = np.asarray(image, np.float64) / 255
    luma = (rows @ np.array(LUMA) + 16) / 255
    height, width = (size - size % scale for size in luma.shape)
    return luma[:height, :width].astype(np.float32)


def _blurred(sharp: Any, scale: int) -> Any:
    """Make an image small, and enlarge it again."""
    height, width = sharp.shape
    return _resized(_resized(sharp, width // scale, height // scale), width, height)


def _resized(luma: Any, width: int, height: int) -> Any:
    pillow = require("PIL.Image", "data")
    image = pillow.fromarray(luma).resize((width, height), pillow.Resampling.BICUBIC)
    return np.array(image, np.float32)


# ---------------------------------------------------------------- what came out


def claims(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """At each quality: our smallest file that is no worse, beside the other's."""
    dense = next((c["values"] for c in pick(cells, rival=DENSE)), None)
    rows = []
    for ratio, lost in settings["claims"]["points"]:
        ours, theirs = (_ratio(cells, dense, rival, lost) for rival in (OURS, THEIRS))
        text = f"VDSR, at most {lost:g} dB lost"
        rows.append(claim(f"{text}: times smaller than float32", ours, ">", ratio, "x"))
        lead = ours / theirs if ours and theirs else None
        rows.append(claim(f"{text}: times smaller than {THEIRS} here", lead, ">", 1, "x"))
    return rows


def _ratio(cells: Cells, dense: Any, rival: str, lost: float) -> float | None:
    if dense is None:
        return None
    rows = [c["values"] for c in pick(cells, rival=rival)]
    fit = [row["bytes"] for row in rows if dense["psnr"] - row["psnr"] <= lost]
    return dense["bytes"] / min(fit) if fit else None


def summary(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Give bytes and quality of every file."""
    return [{**cell["key"], **cell["values"]} for cell in cells if "refused" not in cell]


def tables(settings: Settings, cells: Cells) -> list[Table]:
    """Give a row for every file."""
    dense = next((c["values"] for c in pick(cells, rival=DENSE)), None)
    rows = []
    for cell in [c for c in cells if "refused" not in c]:
        size, quality = cell["values"]["bytes"], cell["values"]["psnr"]
        smaller = f"{dense['bytes'] / size:.2f}" if dense else ""
        lost = f"{dense['psnr'] - quality:+.3f}" if dense else ""
        rows.append([*cell["key"].values(), f"{size:,}", smaller, f"{quality:.3f}", lost])
    head = ["by", "point", "bytes", "times smaller", "PSNR, dB", "dB lost"]
    return [Table(f"VDSR on Set5, x{settings['scale']}", head, rows)]
