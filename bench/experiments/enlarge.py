"""Networks that enlarge photographs, beside the same with other skip connections and bicubic."""

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import skimage
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor

from bench.claim import judged
from bench.compress import Values
from bench.data import part
from bench.experiments import Cell, Cells, Table, by_seed, paired, values
from bench.small import seeded
from bench.stats import mean, plus_minus, spread
from pliant.data.ready import super_resolution
from pliant.zoo.dran import DRAN

Settings = Mapping[str, Any]
SCALE = 2
BICUBIC, FIXED, MEANS = "bicubic", "fixed", "means"
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")


def cells(settings: Settings) -> list[Cell]:
    """List the trainings, all of the first seed first."""
    plan = settings["train"]
    return [
        Cell({"wiring": name, "seed": seed}, dict(plan))
        for seed in settings["seeds"]
        for name in settings["wirings"]
    ]


def measure(cell: Cell, watch: Callable[[dict[str, Any]], None]) -> Values:
    """Train on patches of photographs, and score the five photographs of Set5."""
    plan = cell.plan
    model: Any = seeded(
        cell.key["seed"], lambda: DRAN(SCALE, blocks=plan["blocks"], width=plan["width"])
    )
    fixed = wiring(plan["blocks"]) if cell.key["wiring"] == FIXED else None
    train(model, fixed, plan, cell.key["seed"])
    with torch.no_grad():
        given = [model.trunk.coefficients(coarse(x)) for x in photographs("set5")]
    middle = torch.stack(given).mean(0) if fixed is None else fixed
    found: Values = {"params": sum(p.numel() for p in model.parameters())}
    for name, weights in (("", fixed), (f"_{MEANS}", middle)):
        found |= {f"psnr{name}": scored(lambda x, w=weights: model(x, w))}
    return found | {"bicubic": scored(bicubic), "spread": float(torch.cat(given).std(0).mean())}


def claims(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Compare wirings by the seeds that they share."""
    rows = []
    for asked in settings["claims"]:
        own, other = (
            by_seed(cells, value, wiring=name) for name, value in (asked["own"], asked["other"])
        )
        found = paired(own, other)
        rows.append(judged(asked["text"], found, asked["how"], asked["target"], "dB"))
    return rows


def summary(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Give mean and deviation of every wiring."""
    rows = []
    for name in settings["wirings"]:
        row: dict[str, Any] = {"wiring": name}
        for value in ("psnr", f"psnr_{MEANS}", "bicubic", "spread"):
            found = values(cells, value, wiring=name)
            row[value] = {"mean": mean(found), "sd": spread(found), "seeds": len(found)}
        rows.append(row)
    return rows


def tables(settings: Settings, cells: Cells) -> list[Table]:
    """Give one row per wiring."""
    head = ["skip connections", "parameters", "PSNR-Y, dB", "at their means, dB", "bicubic, dB"]
    head += ["spread of coefficients"]
    rows = []
    for name in settings["wirings"]:
        found = [values(cells, v, wiring=name) for v in ("psnr", f"psnr_{MEANS}", "bicubic")]
        size = f"{mean(values(cells, 'params', wiring=name)) or 0:,.0f}"
        differ = plus_minus(values(cells, "spread", wiring=name), 3)
        rows.append([name, size, *(plus_minus(v, 2) for v in found), differ])
    return [Table("Set5, enlarged twice", head, rows)]


# ---------------------------------------------------------------- what is trained, and on what


def wiring(blocks: int) -> Tensor:
    """Return coefficients of 1 for each block's own input, and 0 for all before it, (1, pairs)."""
    found = torch.zeros(1, blocks * (blocks + 1) // 2)
    found[0, [i * (i + 1) // 2 + i for i in range(blocks)]] = 1.0
    return found


def train(model: Any, weights: Tensor | None, plan: Mapping[str, Any], seed: int) -> None:
    """Lower the absolute error on random patches, turned and mirrored."""
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), plan["lr"])
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, plan["steps"])
    for _ in range(plan["steps"]):
        sharp = patches(plan["batch"], plan["side"], random)
        optimizer.zero_grad()
        (model(coarse(sharp), weights) - sharp).abs().mean().backward()
        optimizer.step()
        rates.step()


def patches(count: int, side: int, random: torch.Generator) -> Tensor:
    """Cut patches out of the training photographs, (count, 3, side, side)."""

    def drawn(below: int) -> int:
        return int(torch.randint(below, (1,), generator=random))

    found = []
    images = photographs("train")
    for _ in range(count):
        image = images[drawn(len(images))][0]
        top, left = (drawn(size - side + 1) for size in image.shape[1:])
        patch = image[:, top : top + side, left : left + side]
        patch = torch.rot90(patch, drawn(4), (1, 2))
        found.append(patch.flip(2) if drawn(2) else patch)
    return torch.stack(found)


@cache
def photographs(which: str) -> list[Tensor]:
    """Give photographs (1, 3, H, W) in 0..1, of even sides."""
    if which == "train":
        folder = Path(skimage.data.__file__).parent
        arrays = [np.array(Image.open(folder / name).convert("RGB")) for name in PHOTOGRAPHS]
        arrays += list(load_sample_images().images)
    else:
        files = sorted(part(which).glob("*.png"))
        arrays = [np.array(Image.open(file).convert("RGB")) for file in files]
    even = [array[: len(array) // 2 * 2, : array.shape[1] // 2 * 2] for array in arrays]
    return [torch.tensor(array).permute(2, 0, 1)[None].float() / 255 for array in even]


def coarse(sharp: Tensor) -> Tensor:
    """Halve the sides by bicubic interpolation, and round to 8 bits."""
    found = F.interpolate(sharp, scale_factor=0.5, mode="bicubic", antialias=True)
    return (found.clamp(0, 1) * 255).round() / 255


def bicubic(x: Tensor) -> Tensor:
    """Double the sides."""
    return F.interpolate(x, scale_factor=2, mode="bicubic")


@torch.no_grad()
def scored(enlarge: Callable[[Tensor], Tensor]) -> float:
    """Return the mean PSNR-Y over Set5, rounded to 8 bits, without the border."""
    psnr = super_resolution(border=SCALE).metrics["PSNR"].of
    found = []
    for sharp in photographs("set5"):
        given = coarse(sharp)
        made = (enlarge(given).clamp(0, 1) * 255).round() / 255
        found.append(float(psnr(made, (given, sharp)).mean()))
    return sum(found) / len(found)
