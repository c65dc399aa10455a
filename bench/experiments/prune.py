"""Channel pruning at equal multiply-accumulates and equal epochs, against Torch-Pruning's."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import nn

from bench import tasks
from bench.claim import claim, judged
from bench.compress import compress
from bench.experiments import Cell, Cells, Table, by_seed, paired, pick, values
from bench.stats import mean, plus_minus
from pliant.compose import resolve
from pliant.cost import cost
from pliant.data import Data, Train
from pliant.drivers.loop import evaluate
from pliant.errors import PliantError, require
from pliant.method import Method
from pliant.registry import construct, plain
from pliant.run import Run
from pliant.surgery.batchnorm import recalibrate

Settings = Mapping[str, Any]
Watch = Callable[[dict[str, Any]], None]
DENSE, RIVAL = "dense", "torch-pruning"
LOOKED = 512  # test images on which one fading is looked at
SETTLING = 2048


def cells(settings: Settings) -> list[Cell]:
    """List all measurements: task by task, the dense control first."""
    rows = []
    for task, asked in settings["tasks"].items():
        shared = tasks.plan({**settings, "task": task})
        train = Train(**settings["train"], epochs=asked["epochs"])
        for seed in settings["seeds"]:
            for name, spec in {DENSE: None, **asked["rivals"]}.items():
                plan = {
                    **shared,
                    "train": asdict(train),
                    "macs": None if name == DENSE else settings["macs"],
                    "method": plain(resolve(spec)) if spec else None,
                }
                rows.append(Cell({"task": task, "rival": name, "seed": seed}, plan))
    return rows


def measure(cell: Cell, watch: Watch) -> dict[str, Any]:
    """Cut and train one network."""
    plan, seed, rival = cell.plan, cell.key["seed"], cell.key["rival"]
    model, data = tasks.base(plan, watch), tasks.data_of(plan)
    train, method, extra = Train(**plan["train"]), Method(), dict[str, Any]()
    losses: list[float] = []

    def see(row: dict[str, Any]) -> None:
        losses.append(row["loss"])
        watch(row)

    if rival == RIVAL:
        extra["whole_runs"] = _runs(_cut(copy.deepcopy(model), data, 0.5, whole=True), data)
        model = torch_pruning(model, data, plan["macs"], seed=seed)
        extra["accuracy_before"] = evaluate(model, data, "test").accuracy
    elif plan["method"]:
        method = Looked(construct(**plan["method"]), Notes(data))
    budget = {"macs": plan["macs"]} if plan["method"] else {}
    made = compress(model, data, method, budget, train, seed=seed, watch=see)
    quarter = losses[len(losses) // 5 : 3 * len(losses) // 10 + 1]
    if isinstance(method, Looked):
        extra |= method.notes.seen
    return {**made, **extra, "loss_at_quarter": mean(quarter)}


def claims(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Compare with Torch-Pruning, with random channels, and softer pruning with its ancestor."""
    rows = []
    for task, asked in settings["tasks"].items():
        for name in asked["rivals"]:
            if name not in (RIVAL, "random"):
                text = f"{task}: {name} is no worse than Torch-Pruning's group norms"
                leads = _leads(cells, task, "accuracy", name, RIVAL)
                rows.append(judged(text, leads, ">=", 0, "points"))
        if "group_fisher" in asked["rivals"]:
            text = f"{task}: group_fisher is no worse than Torch-Pruning right after the cut"
            leads = _leads(cells, task, "accuracy_before", "group_fisher", RIVAL)
            rows.append(judged(text, leads, ">=", 0, "points"))
        text = f"{task}: no rival has more MACs than the budget: the largest share of it"
        rows.append(claim(text, _largest_share(settings, cells, task), "<=", 1, "x"))
    return rows + _soft(settings, cells)


def summary(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Give the measured figures, a row per task and rival."""
    rows = []
    for task, asked in settings["tasks"].items():
        for rival in (DENSE, *asked["rivals"]):
            row: dict[str, Any] = {"task": task, "rival": rival}
            for name in ("accuracy", "accuracy_before", "params", "macs", "seconds"):
                found = values(cells, name, task=task, rival=rival)
                if found:
                    row[name] = {"mean": mean(found), "seeds": len(found)}
            rows.append(row)
    return rows


def tables(settings: Settings, cells: Cells) -> list[Table]:
    """Give one table per task, and one of what each fading cost."""
    found = [_table(cells, task, asked) for task, asked in settings["tasks"].items()]
    return [*found, _fadings(settings, cells)]


# ---------------------------------------------------------------- what is looked at


@dataclass
class Notes:
    """What is seen of one compression besides its scores."""

    data: Data
    seen: dict[str, Any] = field(default_factory=lambda: {"fadings": [], "kept": {}})

    def fading(self, run: Run, before: dict[str, torch.Tensor]) -> None:
        """Score the network before and after filters faded, on some test images."""
        after = copy.deepcopy(run.model.state_dict())
        if any(after[name].shape != tensor.shape for name, tensor in before.items()):
            return
        rows = [row for row in run.log if "rate" in row]
        run.model.load_state_dict(before)
        first = _right(run.model, self.data)
        run.model.load_state_dict(after)
        last = _right(run.model, self.data)
        self.seen["fadings"].append(
            {"step": run.step, "alpha": rows[-1]["alpha"], "before": first, "after": last}
        )


@dataclass(frozen=True)
class Looked(Method):
    """Another method, unchanged, with a look at every fading and at the channels kept."""

    method: Method
    notes: Notes

    @property
    def parts(self) -> tuple[Method, ...]:
        return (self.method,)

    def prepare(self, run: Run) -> None:
        self.method.prepare(run)

    def after_step(self, run: Run) -> None:
        rows = len(run.log)
        before = copy.deepcopy(run.model.state_dict())
        self.method.after_step(run)
        if len(run.log) > rows:
            self.notes.fading(run, before)

    def after_epoch(self, run: Run) -> None:
        self.method.after_epoch(run)

    def finalize(self, run: Run) -> None:
        self.method.finalize(run)
        for edit in run.edits:
            if getattr(edit, "side", "") == "out":
                k, n = edit.kept  # type: ignore[attr-defined]
                self.notes.seen["kept"][edit.layer] = f"{k} of {n}"


def _right(model: nn.Module, data: Data) -> float:
    """The share of some test images that is classified rightly, in evaluation."""
    device, training = next(model.parameters()).device, model.training
    model.eval()
    with torch.no_grad():
        inputs, labels = next(iter(data.batches("test", LOOKED)))
        right = (model(inputs.to(device)).argmax(1).cpu() == labels.cpu()).float().mean()
    model.train(training)
    return round(float(right), 4)


# ---------------------------------------------------------------- Torch-Pruning


def torch_pruning(model: nn.Module, data: Data, share: float, *, seed: int) -> nn.Module:
    """Cut to a share of the multiply-accumulates, and let batch norms settle."""
    smaller = _to_budget(model, data, share)
    recalibrate(smaller, data.calibration(SETTLING, batch=256, seed=seed))
    return smaller


def _cut(model: nn.Module, data: Data, ratio: float, *, whole: bool = False) -> nn.Module:
    """Let Torch-Pruning remove a share of the channels that stay within a block, or of all."""
    pruning = require("torch_pruning", "bench")
    inner = [m.conv1 for m in model.modules() if hasattr(m, "conv2")]
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    classifier = layers[-1]
    pruner = pruning.pruner.GroupNormPruner(
        model.eval(),
        tuple(data.example(1)),
        importance=pruning.importance.GroupMagnitudeImportance(p=2),
        global_pruning=True,
        pruning_ratio=ratio,
        max_pruning_ratio=0.9,
        ignored_layers=[
            layer
            for layer in layers
            if layer is classifier or not (whole or any(layer is conv for conv in inner))
        ],
    )
    pruner.step()
    return model


def _to_budget(model: nn.Module, data: Data, share: float) -> nn.Module:
    """The least cut network whose multiply-accumulates are within a share of the dense one's."""
    bound = share * cost(model, data.example(1)).macs
    low, high = 0.0, 0.9
    for _ in range(9):
        middle = (low + high) / 2
        found = cost(_cut(copy.deepcopy(model), data, middle), data.example(1)).macs
        low, high = (low, middle) if found <= bound else (middle, high)
    return _cut(copy.deepcopy(model), data, high)


def _runs(model: nn.Module, data: Data) -> bool:
    try:
        cost(model, data.example(1))
    except PliantError:
        return False
    return True


# ---------------------------------------------------------------- claims and tables


def _leads(
    cells: Cells, task: str, name: str, own: str, other: str, scale: float = 100
) -> list[float]:
    """By how much one rival is ahead of another, for each seed; accuracies in points."""
    pair = (by_seed(cells, name, task=task, rival=rival) for rival in (own, other))
    return paired(*pair, scale=scale)


def _largest_share(settings: Settings, cells: Cells, task: str) -> float | None:
    dense = values(cells, "macs", task=task, rival=DENSE)
    found = [
        macs
        for rival in settings["tasks"][task]["rivals"]
        for macs in values(cells, "macs", task=task, rival=rival)
    ]
    return max(found) / (settings["macs"] * dense[0]) if found and dense else None


def _soft(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """What the paper of softer pruning says, on the first task."""
    task = next(iter(settings["tasks"]))
    gaps = _leads(cells, task, "accuracy", "asrfp", "sfp")
    later = _leads(cells, task, "loss_at_quarter", "asrfp", "sfp", scale=1)
    milder = paired(*(_drops(cells, task, name) for name in ("sfp", "asrfp")), scale=100)
    whole = [c["values"]["whole_runs"] for c in pick(cells, task=task, rival=RIVAL)]
    luck = _leads(cells, task, "accuracy", "magnitude", "random")
    return [
        judged(f"{task}: magnitude is better than random channels", luck, ">", 0, "points"),
        judged(f"{task}: softer pruning ends no worse than soft pruning", gaps, ">=", 0, "points"),
        judged(
            f"{task}: the last fading with a factor above 0 loses less than soft pruning's then",
            milder,
            ">",
            0,
            "points",
        ),
        judged(
            f"{task}: after a quarter of the steps its training loss is not lower (slower start)",
            later,
            ">=",
            0,
            "",
        ),
        claim(
            f"{task}: Torch-Pruning's whole-network cut runs: 1 if it does (expected: it does not)",
            float(whole[0]) if whole else None,
            "<=",
            0,
            "",
        ),
    ]


def _drops(cells: Cells, task: str, rival: str) -> dict[int, float]:
    """Accuracy lost at the last fading whose factor was above 0 in softer pruning, by seed."""
    softer = _seen(cells, task, "asrfp")[:1]
    last = [row["step"] for rows in softer for row in rows if 0 < row["alpha"] < 1][-1:]
    return {
        cell["key"]["seed"]: row["before"] - row["after"]
        for cell in pick(cells, task=task, rival=rival)
        for row in cell["values"].get("fadings", ())
        if row["step"] in last
    }


def _seen(cells: Cells, task: str, rival: str) -> list[list[dict[str, Any]]]:
    """The fadings of a rival, a list per seed."""
    found = pick(cells, task=task, rival=rival)
    return [c["values"]["fadings"] for c in found if c["values"].get("fadings")]


def _table(cells: Cells, task: str, asked: Mapping[str, Any]) -> Table:
    head = ["rival", "method", "right after the cut, %", "at the end, %", "parameters", "MACs"]
    rows = []
    for rival, spec in {DENSE: "nothing removed", **asked["rivals"]}.items():
        text = {DENSE: spec, RIVAL: "group norms, global, channels within blocks only"}
        row = [rival, text.get(rival, f"`{spec}`")]
        for name in ("accuracy_before", "accuracy"):
            found = values(cells, name, task=task, rival=rival)
            row.append(plus_minus([100 * v for v in found]) if found else "")
        for name in ("params", "macs"):
            found = values(cells, name, task=task, rival=rival)
            row.append(f"{found[0]:,.0f}" if found else "")
        rows.append(row)
    return Table(f"{task}, {asked['epochs']:g} epochs in all", head, rows)


def _fadings(settings: Settings, cells: Cells) -> Table:
    """Accuracy on some test images around every fading of both soft methods."""
    task = next(iter(settings["tasks"]))
    found = [rows for name in ("asrfp", "sfp") for rows in _seen(cells, task, name)[:1]]
    rows = []
    for soft, hard in islice(zip(*found, strict=False), 100) if len(found) == 2 else ():
        row = [str(soft["step"]), f"{soft['alpha']:.2g}"]
        for one in (soft, hard):
            row += [f"{100 * one['before']:.1f}", f"{100 * one['after']:.1f}"]
        rows.append(row)
    head = ["step", "factor", "asrfp before", "after", "sfp before", "after"]
    title = f"Accuracy around each fading on {LOOKED} test images, %, {task}, the first seed"
    return Table(title, head, rows)
