"""What a training step costs with NRMF, without it, and with the naive penalty.

All three networks take their steps in turn in one process, so that whatever else the machine
does falls on all of them alike; a repetition's ratio is that of sums over the same stretch.
"""

import copy
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from bench.claim import claim
from bench.experiments import Cell, Cells, Table, values
from bench.stats import median
from pliant import zoo
from pliant.budget import Budget
from pliant.compose import resolve
from pliant.data import Data
from pliant.errors import PliantError
from pliant.method import Method
from pliant.registry import construct, plain
from pliant.run import Run, start
from pliant.surgery.select import factorizable

Settings = Mapping[str, Any]
STEPS = 1_000_000  # of the training that is pretended: its search never ends here
NAIVE, PLAIN = "naive", "plain"


def cells(settings: Settings) -> list[Cell]:
    """List the repetitions of every network."""
    shared = {
        "batch": settings["batch"],
        "block": settings["block"],
        "naive_steps": settings["naive_steps"],
        "precision": settings["precision"],
        "methods": {name: plain(resolve(spec)) for name, spec in settings["rivals"].items()},
    }
    return [
        Cell({"network": network, "repetition": number}, {**shared, "network": network})
        for number in range(settings["repetitions"])
        for network in settings["networks"]
    ]


def measure(cell: Cell, watch: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Time one block of steps of each rival, in turn, after a warm-up."""
    plan = cell.plan
    dense: Any = zoo.build(plan["network"])
    dense = dense.to(memory_format=torch.channels_last)
    data, batch = _noise(plan)
    rivals = {PLAIN: _run(dense, Method(), data)}
    for name, method in plan["methods"].items():
        rivals[name] = _run(dense, construct(**method), data)
    _check_block(plan, rivals)
    naive = _run(dense, Method(), data)
    seconds: dict[str, list[float]] = {name: [] for name in (*rivals, NAIVE)}
    for run in rivals.values():
        _step(run, batch, plan)
    run_naive = plan["naive_steps"]
    for number in range(plan["block"]):
        for name, run in rivals.items():
            seconds[name].append(_step(run, batch, plan))
        if number < run_naive:
            seconds[NAIVE].append(_step(naive, batch, plan, naive=True))
    means = {name: sum(row) / len(row) for name, row in seconds.items() if row}
    ratios = {f"ratio_{name}": value / means[PLAIN] for name, value in means.items()}
    return {f"ms_{name}": round(1000 * value, 2) for name, value in means.items()} | {
        name: round(value, 4) for name, value in ratios.items() if name != f"ratio_{PLAIN}"
    }


def claims(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Say what the champion's step costs, and that the naive penalty's costs several times that."""
    asked, rows = settings["claims"], []
    for network in settings["networks"]:
        ratio = median(values(cells, f"ratio_{asked['champion']}", network=network))
        text = f"A training step of {network} with {asked['champion']} over a plain one"
        rows.append(claim(text, ratio, "<=", asked["most"], "x"))
        ratio = median(values(cells, f"ratio_{NAIVE}", network=network))
        text = f"A training step of {network} with autograd through svdvals over a plain one"
        rows.append(claim(text, ratio, ">=", asked["naive_least"], "x"))
    return rows


def summary(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Give the median, least and largest of every repetition's ratio."""
    rows = []
    for network in settings["networks"]:
        for name in (PLAIN, *settings["rivals"], NAIVE):
            row: dict[str, Any] = {"network": network, "rival": name}
            for kind in ("ms", "ratio"):
                found = values(cells, f"{kind}_{name}", network=network)
                if found:
                    row[kind] = {"median": median(found), "min": min(found), "max": max(found)}
            rows.append(row)
    return rows


def tables(settings: Settings, cells: Cells) -> list[Table]:
    """Give milliseconds and ratios, medians with least and largest."""
    head = ["network", "step", "milliseconds", "over plain"]
    rows = [
        [row["network"], row["rival"], _range(row.get("ms"), 1), _range(row.get("ratio"), 3)]
        for row in summary(settings, cells)
    ]
    count = settings["repetitions"]
    title = f"One training step, batch {settings['batch']}, median (least to largest) of {count}"
    return [Table(title, head, rows)]


def _range(found: Mapping[str, float] | None, digits: int) -> str:
    if not found:
        return ""
    middle, least, most = (f"{found[k]:.{digits}f}" for k in ("median", "min", "max"))
    return f"{middle} ({least} to {most})"


def _noise(plan: Mapping[str, Any]) -> tuple[Data, tuple[Tensor, Tensor]]:
    """Random images: their values do not change what a step costs."""
    random = torch.Generator().manual_seed(0)
    shape = zoo.NETWORKS[plan["network"]].input
    images = torch.randn(plan["batch"], *shape, generator=random)
    labels = torch.randint(0, 10, (plan["batch"],), generator=random)
    data = Data((images, labels), classes=10, name="noise")
    return data, (images.contiguous(memory_format=torch.channels_last), labels)


def _run(dense: nn.Module, method: Method, data: Data) -> Run:
    model = copy.deepcopy(dense).train()
    optimizer = SGD(model.parameters(), lr=0.02, momentum=0.9, nesterov=True, weight_decay=5e-4)
    budget = None if type(method) is Method else Budget(params=0.4)
    return start(model, method, budget, data=data, optimizer=optimizer, steps=STEPS)


def _check_block(plan: Mapping[str, Any], rivals: Mapping[str, Run]) -> None:
    """A block must hold whole intervals, or the work at their ends is counted wrongly."""
    for name, run in rivals.items():
        interval = getattr(run.method, "interval", 1)
        if plan["block"] % interval:
            raise PliantError(
                f"A block of steps must hold whole intervals of {name}, {interval} steps each, "
                f"but it has {plan['block']}; change it in the settings."
            )


def _step(
    run: Run, batch: tuple[Tensor, Tensor], plan: Mapping[str, Any], *, naive: bool = False
) -> float:
    """Take one step and return its seconds."""
    assert run.optimizer is not None
    images, labels = batch
    began = time.perf_counter()
    run.optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=plan["precision"] == "bf16-mixed"):
        loss = F.cross_entropy(run.model(images), labels)
    if naive:
        loss = loss + 1e-4 * nuclear_norms(run.model)
    loss.backward()
    run.before_step()
    run.optimizer.step()
    run.after_step()
    return time.perf_counter() - began


def nuclear_norms(model: nn.Module) -> Tensor:
    """Sum the singular values of both unfoldings of every kernel, within autograd."""
    total = torch.zeros(())
    for layer in factorizable(model)[0].values():
        weight = layer.weight
        rows = [weight.flatten(1)]
        if weight.dim() > 2:
            rows.append(weight.transpose(0, 1).flatten(1))
        total = total + sum(torch.linalg.svdvals(row).sum() for row in rows)
    return total
