"""Recovering tensors: planted ones, where the answer is known, then pictures."""

import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

import pliant
from bench.claim import claim, judged
from bench.experiments import Cell, Cells, Table, by_seed, paired, pick, values
from bench.stats import mean, plus_minus
from pliant.errors import require
from pliant.families.solve.tsvd import tprod

Settings = Mapping[str, Any]
LIBRARIES = ("tensorly", "scikit-image")
DAMAGES = ("errors", "missing")
OURS, TENSORLY, PLANTED = "nonconvex_tsvd", "tensorly", "planted"
SIDE = 128  # pixels of a photograph
CROP = (slice(40, 104), slice(40, 104), slice(20, 84))  # of Indian Pines


def cells(settings: Settings) -> list[Cell]:
    """List the planted tensors, then every picture, damage, rival and seed."""
    rows, plan = [], settings["planted"]
    for seed in settings["seeds"]:
        for damage in DAMAGES:
            for rank, share in plan[damage]:
                key = {"task": PLANTED, "damage": damage, "rank": rank, "share": share}
                own = {name: plan[name] for name in ("size", "tubes", "method")}
                rows.append(Cell({**key, "seed": seed}, own))
        for picture, asked in settings["pictures"].items():
            for damage in DAMAGES:
                for share in asked[damage]:
                    key = {"task": picture, "damage": damage, "share": share, "seed": seed}
                    rows += [
                        Cell({**key, "rival": OURS, "variant": number}, {"method": spec})
                        for number, spec in enumerate(settings["methods"][damage])
                    ]
                    grid = asked["tensorly"] if damage == "errors" else [1.0]
                    rows += [
                        Cell({**key, "rival": TENSORLY, "variant": number}, {"strength": strength})
                        for number, strength in enumerate(grid)
                    ]
    return rows


def measure(cell: Cell, watch: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Damage one tensor and recover it."""
    key = cell.key
    if key["task"] == PLANTED:
        low = planted(key["rank"], cell.plan["size"], cell.plan["tubes"], key["seed"])
        noise = torch.Generator().manual_seed(1000 + key["seed"])
        x, known = _damaged(low, key["damage"], key["share"], noise, planted=True)
        found = pliant.recover(x, known, cell.plan["method"])
        errors = {"error": found.value, "error_tnn": found.values["convex"]}
        return {name: _error(value, low) for name, value in errors.items()} | _facts(found)
    picture = _picture(key["task"])
    noise = torch.Generator().manual_seed(key["seed"])
    x, known = _damaged(picture, key["damage"], key["share"], noise, planted=False)
    if key["rival"] == TENSORLY:
        return {"psnr": _psnr(_tensorly(x, known, cell.plan["strength"]), picture)}
    found = pliant.recover(x, known, cell.plan["method"])
    scores = {"psnr": found.value, "psnr_tnn": found.values["convex"]}
    return {name: _psnr(value, picture) for name, value in scores.items()} | _facts(found)


def claims(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Say where planted tensors came back, and by how much pictures are better than rivals'."""
    asked, rows = settings["claims"], []
    for damage in DAMAGES:
        for name, most in asked[damage].items():
            rank, share = name.split()
            where = f"rank {rank}, {_said(damage, float(share), planted=True)}"
            own = {"task": PLANTED, "damage": damage, "rank": int(rank), "share": float(share)}
            worst = max(values(cells, "error", **own), default=None)
            text = f"Planted tensor, {where}: largest relative error"
            rows.append(_of_error(text, worst, "<=", most))
            tnn = values(cells, "error_tnn", **own)
            if asked["convex_too"][damage] == name:
                text = f"Planted tensor, {where}: the nuclear norm recovers it too, largest error"
                rows.append(_of_error(text, max(tnn, default=None), "<=", most))
            else:
                text = f"Planted tensor, {where}: the nuclear norm fails, smallest error"
                rows.append(_of_error(text, min(tnn, default=None), ">=", asked["fails"]))
    for row in summary(settings, cells):
        if row["task"] != PLANTED:
            where = f"{row['task']}, {_said(row['damage'], row['share'], planted=False)}"
            key = {name: row[name] for name in ("task", "damage", "share")}
            best = _best_of_each(cells, key)
            for rival, name in (("tnn", "TNN"), (TENSORLY, "TensorLy's robust_pca")):
                leads = paired(best[OURS], best[rival])
                rows.append(judged(f"{where}: PSNR over that of {name}", leads, ">", 0, "dB"))
    return rows


def summary(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Give mean errors of planted tensors, and of pictures the best mean PSNR of each rival."""
    rows: list[dict[str, Any]] = []
    for damage in DAMAGES:
        for rank, share in settings["planted"][damage]:
            key = {"task": PLANTED, "damage": damage, "rank": rank, "share": share}
            found = {name: mean(values(cells, name, **key)) for name in ("error", "error_tnn")}
            rows.append({**key, **found})
    for picture, asked in settings["pictures"].items():
        for damage in DAMAGES:
            for share in asked[damage]:
                key = {"task": picture, "damage": damage, "share": share}
                best = _best_of_each(cells, key)
                said = {
                    f"{name} said": plus_minus(list(row.values())) for name, row in best.items()
                }
                means = {name: mean(list(row.values())) for name, row in best.items()}
                rows.append({**key, **means, **said})
    return rows


def tables(settings: Settings, cells: Cells) -> list[Table]:
    """Give a table of planted tensors and one of pictures."""
    head = ["rank", "damage", "TNN, relative error", "nonconvex_tsvd"]
    first = [
        [
            str(row["rank"]),
            _said(row["damage"], row["share"], planted=True),
            _short(row["error_tnn"]),
            _short(row["error"]),
        ]
        for row in summary(settings, cells)
        if row["task"] == PLANTED
    ]
    rows = [
        [row["task"], _said(row["damage"], row["share"], planted=False)]
        + [row[f"{rival} said"] for rival in (TENSORLY, "tnn", OURS)]
        for row in summary(settings, cells)
        if row["task"] != PLANTED
    ]
    names = ["picture", "damage", "TensorLy robust_pca", "TNN", "nonconvex_tsvd"]
    return [
        Table("Planted tensors, mean over seeds", head, first),
        Table("Pictures, PSNR in dB, each rival at its best strength of the grid", names, rows),
    ]


def planted(rank: int, size: int, tubes: int, seed: int) -> Tensor:
    """Multiply two random factors in the t-product."""
    random = torch.Generator().manual_seed(seed)
    left = torch.randn(size, rank, tubes, generator=random, dtype=torch.float64)
    right = torch.randn(rank, size, tubes, generator=random, dtype=torch.float64)
    return tprod(left / math.sqrt(size), right / math.sqrt(tubes))


def _damaged(
    x: Tensor, damage: str, share: float, random: torch.Generator, *, planted: bool
) -> tuple[Tensor, Tensor | None]:
    """Replace or hide a share of the entries; of planted tensors `share` is what is *known*."""
    hit = torch.rand(x.shape, generator=random) < share
    coin = torch.rand(x.shape, generator=random) < 0.5
    if damage == "errors":
        if planted:
            return x + hit * torch.where(coin, 1.0, -1.0), None
        return torch.where(hit, coin.to(x.dtype), x), None
    known = hit if planted else ~hit
    return torch.where(known, x, math.nan), known


@cache
def _picture(name: str) -> Tensor:
    if name == "indian-pines":
        cube = np.asarray(require("tensorly.datasets", "bench").load_indian_pines()["tensor"])
        cube = cube[CROP].astype(float)
        return torch.as_tensor((cube - cube.min()) / (cube.max() - cube.min()))
    photograph = getattr(require("skimage.data", "bench"), name)() / 255.0
    side = min(photograph.shape[:2])
    resize = require("skimage.transform", "bench").resize
    return torch.as_tensor(resize(photograph[:side, :side], (SIDE, SIDE), anti_aliasing=True))


def _tensorly(x: Tensor, known: Tensor | None, strength: float) -> Tensor:
    """TensorLy's robust_pca with its own defaults; what is known is kept as it came."""
    robust = require("tensorly.decomposition", "bench").robust_pca
    require("tensorly", "bench").set_backend("numpy")
    mask = None if known is None else known.numpy()
    low, _ = robust(x.nan_to_num().numpy(), mask=mask, reg_E=strength, verbose=0)
    found = torch.as_tensor(low)
    return found if known is None else torch.where(known, x, found)


def _of_error(text: str, error: float | None, how: str, target: float) -> dict[str, Any]:
    """A claim on a relative error, in millionths: claims are kept to five decimals."""
    value = None if error is None else 1e6 * error
    return claim(text, value, how, 1e6 * target, "millionths")


def _facts(found: pliant.Solution) -> dict[str, Any]:
    return {
        "iterations": found.iterations,
        "rounds": len(found.history) - 1,
        "converged": found.converged,
        "seconds": found.seconds,
    }


def _error(found: Tensor, low: Tensor) -> float:
    return float((found - low).norm() / low.norm())


def _psnr(found: Tensor, picture: Tensor) -> float:
    return float(-10 * torch.log10((found - picture).square().mean()))


def _best_of_each(cells: Cells, key: dict[str, Any]) -> dict[str, dict[Any, float]]:
    """Of each rival the variant with the best mean, by seed."""
    found: dict[str, dict[Any, float]] = {}
    for name, rival, column in (
        (OURS, OURS, "psnr"),
        ("tnn", OURS, "psnr_tnn"),
        (TENSORLY, TENSORLY, "psnr"),
    ):
        variants = {c["key"]["variant"] for c in pick(cells, **key, rival=rival)}
        rows = [by_seed(cells, column, **key, rival=rival, variant=v) for v in sorted(variants)]
        found[name] = max(rows, key=lambda row: mean(list(row.values())) or -math.inf, default={})
    return found


def _said(damage: str, share: float, *, planted: bool) -> str:
    if damage == "errors":
        return f"{share:.0%} gross errors" if planted else f"{share:.0%} salt and pepper"
    return f"{share:.0%} known" if planted else f"{share:.0%} missing"


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}"
