"""The methods that remove channels or blocks, at one size and equal epochs."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn

from bench import tasks
from bench.claim import claim, judged
from bench.compress import scored
from bench.experiments import Cell, Cells, Table, by_seed, paired, values
from bench.experiments.prune import RIVAL, torch_pruning
from bench.stats import mean, plus_minus
from pliant.budget import Budget
from pliant.compose import resolve
from pliant.data import Data, Epoch, Train
from pliant.drivers.loop import fit
from pliant.edits import Edit
from pliant.latency import Target
from pliant.latency import measure as measured
from pliant.method import Method
from pliant.registry import construct, plain
from pliant.run import Run, start

Settings = Mapping[str, Any]
Watch = Callable[[dict[str, Any]], None]
DENSE, BASELINE = "dense", "magnitude"
MEASURED = ("accuracy", "params", "macs", "method_seconds", "seconds")
SIZES = {"macs": "MACs", "params": "parameters"}
RUNTIMES = {"ms_torch": "torch", "ms_onnxruntime": "onnxruntime"}


def cells(settings: Settings) -> list[Cell]:
    """List all measurements, all of the first seed first, so that a part is of use too."""
    shared = {**tasks.plan(settings), "train": asdict(Train(**settings["train"]))}
    return [
        Cell({"rival": name, "seed": seed}, {**shared, **_asked(settings, name, spec)})
        for seed in settings["seeds"]
        for name, spec in {DENSE: None, **settings["rivals"]}.items()
    ]


def measure(cell: Cell, watch: Watch) -> dict[str, Any]:
    """Cut and train one network."""
    plan, seed = cell.plan, cell.key["seed"]
    model, data = tasks.base(plan, watch), tasks.data_of(plan)
    train, began = Train(**plan["train"]), time.process_time()
    if cell.key["rival"] == RIVAL:
        model = torch_pruning(model, data, plan["macs"], seed=seed)
    axis = _axis(plan)
    cutting = time.process_time() - began
    method = Timed(construct(**plan["method"]) if plan["method"] else Method())
    budget = Budget(**{axis: plan[axis]}) if plan["method"] else None
    steps = train.steps(data.steps(train.batch))
    run = start(model, method, budget, data=data, steps=steps, seed=seed)
    fit(run, data, train, watch=watch)
    after, taken = run.finish(strict=False), time.process_time() - began
    return {
        **scored(model, data),
        "steps": steps,
        "misses": run.misses(after),
        "method_seconds": round(cutting + method.clock.seconds, 2),
        "seconds": round(taken, 2),
        **(_milliseconds(model, data) if plan.get("runtimes") else {}),
    }


def claims(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Compare every rival with pruning by magnitude, and the best of them with the dense network.

    The best is the one of the highest mean, found by the scores it is then judged by: the claim
    about it is a little too kind to it.
    """
    rows = []
    for name in settings["rivals"]:
        if name != BASELINE:
            leads = _leads(cells, name, BASELINE)
            rows.append(judged(f"{name} is better than magnitude", leads, ">", 0, "points"))
    best, most = _best(settings, cells), settings["claims"]["behind"]
    behind = _leads(cells, DENSE, best) if best else []
    text = f"The dense control is more accurate than the best rival ({best or 'none yet'}) by"
    rows.append(judged(text, behind, "<=", most, "points"))
    text = f"No rival has more {SIZES[_axis(settings)]} than the budget: the largest share of it"
    rows.append(claim(text, _largest_share(settings, cells), "<=", 1, "x"))
    for own, other in settings["claims"].get("no_worse", ()):
        text = f"{own} is no worse than {other}"
        rows.append(judged(text, _leads(cells, own, other), ">=", 0, "points"))
    return rows


def summary(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Give the measured figures, a row per rival."""
    rows = []
    for rival in (DENSE, *settings["rivals"]):
        row: dict[str, Any] = {"rival": rival}
        for name in (*MEASURED, *RUNTIMES):
            if found := values(cells, name, rival=rival):
                row[name] = {"mean": mean(found), "seeds": len(found)}
        rows.append(row)
    return rows


def tables(settings: Settings, cells: Cells) -> list[Table]:
    """Give one table, the most accurate first."""
    head = ["rival", "method", "at the end, %", "over magnitude, points", "parameters", "MACs"]
    head += ["seconds in the method", "seconds in all"]
    timed = [name for name in RUNTIMES if values(cells, name)]
    head += [f"ms, {RUNTIMES[name]}" for name in timed]
    order = sorted(settings["rivals"], key=lambda name: -_accuracy(cells, name))
    rows = []
    for rival in (DENSE, *order):
        spec = settings["rivals"].get(rival)
        text = {DENSE: "nothing removed", RIVAL: "group norms, within blocks only"}
        leads = _leads(cells, rival, BASELINE) if rival != BASELINE else []
        row = [rival, text.get(rival, f"`{spec}`")]
        row.append(plus_minus([100 * v for v in values(cells, "accuracy", rival=rival)]))
        row.append(plus_minus(leads) if leads else "")
        for name in ("params", "macs"):
            found = mean(values(cells, name, rival=rival))
            row.append("" if found is None else f"{found:,.0f}")
        for name in ("method_seconds", "seconds"):
            row.append(plus_minus(values(cells, name, rival=rival), digits=1))
        row += [plus_minus(values(cells, name, rival=rival)) for name in timed]
        rows.append(row)
    return [Table(f"{settings['task']}, {settings['train']['epochs']:g} epochs in all", head, rows)]


# ---------------------------------------------------------------- the time of a method


@dataclass
class Clock:
    """Adds up the processor seconds of what it is put around."""

    seconds: float = 0.0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        began = time.process_time()
        yield
        self.seconds += time.process_time() - began


@dataclass(frozen=True)
class Timed(Method):
    """Another method, unchanged, with a clock around all of its hooks."""

    method: Method
    clock: Clock = field(default_factory=Clock)

    @property
    def parts(self) -> tuple[Method, ...]:
        return (self.method,)

    def uses(self, hook: str) -> bool:
        return self.method.uses(hook)

    def refuse(self, run: Run) -> None:
        self.method.refuse(run)

    def resume(self, run: Run, state: Mapping[str, Any], edits: Sequence[Edit]) -> None:
        self.method.resume(run, state, edits)

    def prepare(self, run: Run) -> None:
        with self.clock():
            self.method.prepare(run)

    def epoch(self, epoch: Epoch, data: Data) -> Epoch:
        with self.clock():
            return self.method.epoch(epoch, data)

    def weigh(self, run: Run, losses: Tensor, output: Any, batch: Any) -> Tensor | None:
        with self.clock():
            return self.method.weigh(run, losses, output, batch)

    def loss(self, run: Run, loss: Tensor, output: Any, batch: Any) -> Tensor:
        with self.clock():
            return self.method.loss(run, loss, output, batch)

    def penalty(self, run: Run) -> Tensor | None:
        with self.clock():
            return self.method.penalty(run)

    def before_step(self, run: Run) -> None:
        with self.clock():
            self.method.before_step(run)

    def after_step(self, run: Run) -> None:
        with self.clock():
            self.method.after_step(run)

    def after_epoch(self, run: Run) -> None:
        with self.clock():
            self.method.after_epoch(run)

    def finalize(self, run: Run) -> None:
        with self.clock():
            self.method.finalize(run)


# ---------------------------------------------------------------- figures


def _axis(settings: Settings) -> str:
    """What the budget counts."""
    return next(axis for axis in SIZES if axis in settings)


def _asked(settings: Settings, name: str, spec: str | None) -> dict[str, Any]:
    """What one rival is asked for."""
    axis = _axis(settings)
    asked = {
        axis: None if name == DENSE else settings[axis],
        "method": plain(resolve(spec)) if spec else None,
    }
    return asked | ({"runtimes": True} if settings.get("runtimes") else {})


def _milliseconds(model: nn.Module, data: Data) -> dict[str, float]:
    """How long one image takes on one thread, in each runtime: the median."""
    example = data.example(1)
    return {
        name: round(measured(model, example, Target(runtime, threads=1)).median_ms, 3)
        for name, runtime in RUNTIMES.items()
    }


def _leads(cells: Cells, own: str, other: str) -> list[float]:
    """By how many points one rival is ahead of another, for each seed."""
    mine, theirs = (by_seed(cells, "accuracy", rival=rival) for rival in (own, other))
    return paired(mine, theirs, scale=100)


def _accuracy(cells: Cells, rival: str) -> float:
    return mean(values(cells, "accuracy", rival=rival)) or 0.0


def _best(settings: Settings, cells: Cells) -> str | None:
    """The rival of the highest mean accuracy."""
    name = max(settings["rivals"], key=lambda name: _accuracy(cells, name))
    return name if _accuracy(cells, name) else None


def _largest_share(settings: Settings, cells: Cells) -> float | None:
    axis = _axis(settings)
    dense = values(cells, axis, rival=DENSE)
    found = [size for name in settings["rivals"] for size in values(cells, axis, rival=name)]
    return max(found) / (settings[axis] * dense[0]) if found and dense else None
