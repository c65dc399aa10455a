"""What a cut costs without any training: seconds and peak memory to score a network and cut it."""

import resource
import statistics
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from time import process_time as clock
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from bench.claim import claim
from bench.data import cifar10, part, some
from bench.experiments import Cell, Cells, Table, pick, values
from pliant import zoo
from pliant.budget import Budget
from pliant.compose import resolve
from pliant.cost import Cost
from pliant.data import Data
from pliant.families.prune.allocate import by_ratios
from pliant.families.prune.channels import removable, remove
from pliant.families.prune.scores import importance
from pliant.method import Method
from pliant.observe.rows import Rows
from pliant.registry import construct, plain
from pliant.run import Run, start
from pliant.surgery.prove import edits_of, prove
from pliant.surgery.select import weighted
from pliant.testing.memory import Peak

Settings = Mapping[str, Any]
Values = dict[str, Any]
UNIT = 1 if sys.platform == "darwin" else 1024  # bytes of one unit of the peak that is reported
SURGERY, ROWS = "surgery", "rows"
EACH = 8  # images of one forward call that only warms up


def cells(settings: Settings) -> list[Cell]:
    """List a cell per method, one for surgery in mid-training and one for activations."""
    shared = {key: settings[key] for key in ("network", "weights", "images", "macs")}
    rows = [
        Cell({"rival": name, "seed": 0}, {**shared, "method": plain(resolve(spec))})
        for name, spec in settings["rivals"].items()
    ]
    rows.append(Cell({"rival": SURGERY, "seed": 0}, {**shared, **settings[SURGERY]}))
    rows.append(Cell({"rival": ROWS, "seed": 0}, {**shared, **settings[ROWS]}))
    return rows


def measure(cell: Cell, watch: Callable[[dict[str, Any]], None]) -> Values:
    """Measure one thing in a process of its own, whose peak of memory is the work's."""
    images, labels = some(cifar10(), {"train": cell.plan["images"], "test": EACH}).train
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_measured, cell.key["rival"], cell.plan, images, labels).result()


def _measured(rival: str, plan: Mapping[str, Any], images: Tensor, labels: Tensor) -> Values:
    torch.set_num_threads(1)
    data = Data((images, labels), (images[:EACH], labels[:EACH]), classes=10)
    if rival == SURGERY:
        return _surgery(plan, data)
    return _rows(plan, data) if rival == ROWS else _cut(plan, data)


# ---------------------------------------------------------------- what is measured


def _network(plan: Mapping[str, Any]) -> nn.Module:
    return zoo.build(plan["network"], weights=part("pretrained") / plan["weights"])


def _peak() -> float:
    """The most memory that this process has held so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT / 1e6


def _small(model: nn.Module, method: Method, plan: Mapping[str, Any], data: Data) -> Cost:
    """Cut without training; return what the network costs then."""
    return start(model, method, Budget(macs=plan["macs"]), data=data).finish()


def _cut(plan: Mapping[str, Any], data: Data) -> Values:
    """Score and cut by one method; most of what is imported at first use is no cost of it."""
    _small(zoo.build("resnet20"), resolve("magnitude"), plan, data.subset(train=EACH))
    model = _network(plan)
    before, began = _peak(), clock()
    after = _small(model, construct(**plan["method"]), plan, data)
    return {
        "seconds": round(clock() - began, 3),
        "peak_mb": round(_peak() - before, 1),
        "network_mb": _megabytes(_network(plan)),
        "macs": after.macs,
    }


def _surgery(plan: Mapping[str, Any], data: Data) -> Values:
    """Time a training step, and cuts between steps; medians of several networks."""
    inputs, labels = next(iter(data.batches("train", plan["batch"])))
    rows = [_cuts(plan, data, inputs, labels) for _ in range(plan["repetitions"])]
    return {
        f"{name}_ms": round(1000 * statistics.median(row[name] for row in rows), 1)
        for name in rows[0]
    }


def _cuts(plan: Mapping[str, Any], data: Data, inputs: Tensor, labels: Tensor) -> dict[str, float]:
    """Train one network by a few steps with two cuts between them, in seconds."""
    model = _network(plan).train()
    optimizer = SGD(model.parameters(), 0.01, momentum=0.9)
    run = start(model, Method(), data=data, optimizer=optimizer, steps=4)
    step = partial(_step, run, inputs, labels)
    step()
    found, taken = {"step": _seconds(step)}, list[float]()
    for name in ("first", "next"):
        found[name] = _seconds(lambda: taken.append(_planned(run)))
        step()  # it goes on
    return {**found, "apply": taken[0]}


def _step(run: Run, inputs: Tensor, labels: Tensor) -> None:
    (optimizer,) = run.optimizers
    optimizer.zero_grad()
    F.cross_entropy(run.model(inputs), labels).backward()
    optimizer.step()


def _planned(run: Run) -> float:
    """Score by norms, prove a third of all channels away, take them out; seconds of the last."""
    groups = removable(run)
    scores = {group.name: importance(run.model, group) for group in groups}
    leaving = by_ratios(scores, dict.fromkeys(scores, 0.3), least=0.1)
    edits = edits_of(run.model, groups, leaving)
    prove(run.model, run.example, edits)
    return _seconds(lambda: remove(run, edits, recalibrate=False))


def _seconds(work: Callable[[], Any]) -> float:
    began = clock()
    work()
    return clock() - began


def _rows(plan: Mapping[str, Any], data: Data) -> Values:
    """Sum products of activations of all layers for the same samples, and run the network alone."""
    model = zoo.build(plan["of"]).eval()
    batches = [(images,) for images, _ in data.batches("train", plan["batch"])]
    with Peak() as alone, torch.no_grad():
        model(*batches[0])
    rows, began = Rows(model, list(weighted(model)), form="pixels", pixels=plan["pixels"]), clock()
    with Peak() as peak:
        rows.grams(batches)
    return {
        "seconds": round(clock() - began, 3),
        "peak_mb": round(peak.bytes / 1e6, 1),
        "forward_mb": round(alone.bytes / 1e6, 1),
        "beyond_mb": round((peak.bytes - alone.bytes) / 1e6, 1),
        "network_mb": _megabytes(model),
    }


def _megabytes(model: nn.Module) -> float:
    return round(sum(p.nbytes for p in model.parameters()) / 1e6, 2)


# ---------------------------------------------------------------- what is said of it


def claims(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Check that every method stays within seconds and memory, and surgery within a step."""
    asked, rows = settings["claims"], []
    for what, text, unit in (("seconds", "seconds", "s"), ("peak_mb", "memory", "MB")):
        found = [v for name in settings["rivals"] for v in values(cells, what, rival=name)]
        most = max(found) if len(found) == len(settings["rivals"]) else None
        rows.append(claim(f"The most {text} of any method", most, "<=", asked[what], unit))
    for what, text in (("apply", "Taking channels out"), ("next", "A whole cut but the first")):
        share = _over_step(cells, what)
        rows.append(claim(f"{text} between two steps, over one step", share, "<=", 1, "x"))
    (peak,) = values(cells, "beyond_mb", rival=ROWS) or (None,)
    text = "Products of the activations of all layers: memory above a forward call"
    rows.append(claim(text, peak, "<=", asked["rows_mb"], "MB"))
    return rows


def _over_step(cells: Cells, what: str) -> float | None:
    for cell in pick(cells, rival=SURGERY):
        return float(cell["values"][f"{what}_ms"] / cell["values"]["step_ms"])
    return None


def summary(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Give all figures, a row per cell."""
    return [{"rival": cell["key"]["rival"], **cell["values"]} for cell in pick(cells)]


def tables(settings: Settings, cells: Cells) -> list[Table]:
    """Give one table of the methods, the quickest first, and one of surgery."""
    found = [cell for cell in pick(cells) if cell["key"]["rival"] in settings["rivals"]]
    found.sort(key=lambda cell: cell["values"]["seconds"])
    rows = [
        [
            cell["key"]["rival"],
            f"`{settings['rivals'][cell['key']['rival']]}`",
            *(f"{cell['values'][name]:.1f}" for name in ("seconds", "peak_mb", "network_mb")),
        ]
        for cell in found
    ]
    head = ["rival", "method", "seconds", "peak MB", "network MB"]
    middle = [
        [name, f"{cell['values'][key]:.1f}"]
        for cell in pick(cells, rival=SURGERY)
        for key, name in (
            ("step_ms", "one training step"),
            ("apply_ms", "taking three tenths of all channels out"),
            ("first_ms", "the first cut: groups found and proven, channels scored, proven, taken"),
            ("next_ms", "the next cut: the same with the groups that are left"),
        )
    ]
    return [
        Table("To score ResNet-56 and cut it to half of its MACs", head, rows),
        Table("In the middle of training, one thread", ["work", "milliseconds"], middle),
    ]
