"""What samples of one class, and teachers, are worth beside labels: four small studies."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bench.claim import claim, judged
from bench.compress import Values, compress
from bench.data import cifar10, some
from bench.experiments import Cell, Cells, Table, by_seed, paired, values
from bench.small import cnn, method_of, seeded, step_ratio
from bench.stats import mean, median, plus_minus, spread
from pliant import zoo
from pliant.compose import together
from pliant.data import Data, Train, load, unpack
from pliant.method import Method
from pliant.observe.outputs import logits
from pliant.observe.watch import capture
from pliant.run import Run
from pliant.surgery.select import weighted

Settings = Mapping[str, Any]
PLAIN, OSKD, ALL = "plain", "oskd", "oskd, all of a class"
STUDIES = {"subclass": "fine", "scratch": "accuracy", "compressed": "accuracy"}  # and their score


@dataclass(frozen=True)
class Smoothing(Method):
    """The control: a tenth of every label is spread over all classes, without looking at any."""

    share: float = 0.1

    def loss(self, run: Run, loss: Tensor, output: Any, batch: Any) -> Tensor:
        even = -logits(output).log_softmax(-1).mean()
        return (1 - self.share) * loss + self.share * even


def cells(settings: Settings) -> list[Cell]:
    """List all measurements, all of the first seed first."""
    rows = []
    for seed in settings["seeds"]:
        for study in STUDIES:
            asked = {k: v for k, v in settings[study].items() if k != "rivals"}
            if study == "scratch" and seed >= settings["few"]:
                continue
            rows += [
                Cell({"study": study, "rival": name, "seed": seed}, {**asked, "teach": spec})
                for name, spec in settings[study]["rivals"].items()
            ]
    step = {**settings["step"], "teach": settings["scratch"]["rivals"][OSKD]}
    return rows + [Cell({"study": "step", "seed": seed}, step) for seed in settings["seeds"]]


def measure(cell: Cell, watch: Callable[[dict[str, Any]], None]) -> Values:
    """Measure one cell of one study."""
    studies = {"subclass": _subclass, "scratch": _scratch, "compressed": _compressed, "step": _step}
    return studies[cell.key["study"]](cell)


def claims(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Say what the card of the method asks for."""
    steps = median(values(cells, "ratio", study="step"))
    rows = (
        ("Digits merged in pairs stay as distinct with oskd", "subclass", OSKD, PLAIN, ">="),
        ("Pulled to the class mean they are less distinct", "subclass", OSKD, ALL, ">"),
        ("From scratch oskd is no worse than plain training", "scratch", OSKD, PLAIN, ">="),
        ("Compressed, kd is better than plain training", "compressed", "kd", PLAIN, ">"),
    )
    ratio = claim("A step with oskd over a plain one", steps, "<=", settings["claims"]["step"], "x")
    leads = (
        judged(text, _leads(cells, study, own, other), how, 0, "points")
        for text, study, own, other, how in rows
    )
    return [*leads, ratio]


def summary(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Give mean and standard deviation of every study's scores."""
    rows = []
    for study, name in STUDIES.items():
        for rival in settings[study]["rivals"]:
            row: dict[str, Any] = {"study": study, "rival": rival}
            for score in dict.fromkeys((name, "accuracy")):
                found = values(cells, score, study=study, rival=rival)
                if found:
                    row[score] = {"mean": mean(found), "sd": spread(found), "seeds": len(found)}
            rows.append(row)
    return rows


def tables(settings: Settings, cells: Cells) -> list[Table]:
    """Give a table per study."""
    titles = {
        "subclass": "Digits merged in pairs: accuracy of the pairs, and of digits inside a pair",
        "scratch": "From scratch on few images",
        "compressed": "LeNet-5 at a fifth of its parameters",
    }
    return [_table(settings, cells, study, title) for study, title in titles.items()]


def _table(settings: Settings, cells: Cells, study: str, title: str) -> Table:
    names = list(dict.fromkeys(("accuracy", STUDIES[study])))
    head = ["training", "method", *({"fine": "inside a pair"}.get(n, n) + ", %" for n in names)]
    rows = []
    for rival, spec in settings[study]["rivals"].items():
        scores = [
            plus_minus([100 * v for v in values(cells, name, study=study, rival=rival)])
            for name in names
        ]
        rows.append([rival, f"`{spec}`" if spec else "", *scores])
    return Table(title, head, rows)


def _leads(cells: Cells, study: str, own: str, other: str) -> list[float]:
    """Points of a study's score by which one training is ahead of another, for each seed."""
    pair = (by_seed(cells, STUDIES[study], study=study, rival=name) for name in (own, other))
    return paired(*pair, scale=100)


def _method(spec: str) -> Method:
    return Smoothing() if spec == "smoothing" else method_of(spec)


# ---------------------------------------------------------------- the studies


def _subclass(cell: Cell) -> Values:
    """Train on pairs of digits; then tell the digits of a pair apart by their neighbours."""
    plan, data = cell.plan, load(cell.plan["data"])
    pairs = {split: (part[0], part[1] // 2) for split, part in _splits(data).items()}
    merged = some(replace(data, **{**pairs, "val": None}, classes=5), plan["images"])
    model = seeded(cell.key["seed"], lambda: zoo.build("lenet5", classes=5))
    method, train = _method(plan["teach"]), Train(**plan["train"])
    found = compress(model, merged, method, {}, train, seed=cell.key["seed"])
    return {**found, "fine": _fine(model, data, plan["neighbours"])}


def _splits(data: Data) -> dict[str, tuple[Tensor, Tensor]]:
    return {"train": data.train, "val": data.val, "test": data.test}


@torch.no_grad()
def _fine(model: nn.Module, data: Data, neighbours: int) -> float:
    """The share of digits whose nearest others of the same pair have, by majority, their label."""
    seen: list[Tensor] = []
    digits: list[Tensor] = []
    last = list(weighted(model))[-1]
    for split in ("val", "test"):
        for batch in data.batches(split, 256):
            inputs, labels = unpack(batch)
            with capture(model, [last], lambda name, given, output: seen.append(given)):
                model(*inputs)
            digits.append(labels)
    rows, fine = torch.cat(seen), torch.cat(digits)
    apart = torch.cdist(rows, rows).masked_fill(fine[:, None] // 2 != fine // 2, torch.inf)
    near = apart.fill_diagonal_(torch.inf).topk(neighbours, largest=False).indices
    return float((fine[near].mode(1).values == fine).double().mean())


def _scratch(cell: Cell) -> Values:
    """Train a small network from the start; a teacher is trained before, if there is one."""
    plan, seed = cell.plan, cell.key["seed"]
    data, train = some(cifar10(), plan["images"]), Train(**plan["train"])
    model, teacher = (seeded(seed + more, lambda: cnn(3, plan["widths"])) for more in (0, 100))
    if plan["teach"] != "kd":
        return compress(model, data, _method(plan["teach"]), {}, train, seed=seed)
    compress(teacher, data, Method(), {}, train, seed=seed + 100)
    taught = replace(train, distill=0.5)
    return compress(model, data, Method(), {}, taught, seed=seed, teacher=teacher)


def _compressed(cell: Cell) -> Values:
    """Factorize a trained network, and train on with the method in the same loop."""
    plan, seed, data = cell.plan, cell.key["seed"], replace(load("mnist5k"), val=None)
    model = seeded(seed, lambda: zoo.build("lenet5"))
    compress(model, data, Method(), {}, Train(**plan["before"]), seed=seed)
    method = together(_method(plan["teach"]), plan["method"])  # kd copies what it finds
    return compress(model, data, method, plan["budget"], Train(**plan["train"]), seed=seed)


def _step(cell: Cell) -> Values:
    plan = cell.plan
    model, method = seeded(0, lambda: cnn(3, plan["widths"])), _method(plan["teach"])
    return step_ratio(model, method, batch=plan["batch"], steps=plan["steps"], decay=0.0)
