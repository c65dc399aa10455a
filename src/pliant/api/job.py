"""One call of `compress`: from what was asked to a result with a report."""

from __future__ import annotations

import copy
import math
import os
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pliant.api.asked import copied, patterns
from pliant.api.measured import Control, first_inputs, known, phases, scored_split, short
from pliant.api.report import cuts, layer_rows, side, timed, versions, where_timed
from pliant.api.verdict import alike, far, judge, said
from pliant.budget import LOSE, Budget
from pliant.compose import Stage, bounds, check_axes
from pliant.cost import Example, cost, device_of, twin
from pliant.data import Data, Train
from pliant.data.splits import Split
from pliant.data.task import Task
from pliant.drivers import checkpoint
from pliant.drivers.check import check_call, check_data
from pliant.drivers.loop import Watch, epochs_of, evaluate, fit
from pliant.drivers.score import Score, fidelity
from pliant.drivers.settle import settle
from pliant.edits import from_json, to_json
from pliant.edits import sizes as elastic
from pliant.errors import AccuracyWarning, BudgetError, DataError
from pliant.files import artifact
from pliant.latency import Target
from pliant.method import Method
from pliant.observe.finite import check_left
from pliant.plan.remember import fingerprint, kept, trying
from pliant.result import Fidelity, Report, Result, Side
from pliant.run import RECALIBRATED, Run, start
from pliant.surgery.batchnorm import recalibrate

COMPARED = 1024  # samples whose outputs are compared with the dense network's
CONTROL = checkpoint.CONTROL  # folder of the control run's checkpoint, its phase in the history
REFERENCE = "the same network trained for as many epochs without compression"
LATE = (
    "The layers were changed when the training was over, and nothing has trained them since: add "
    "passes afterwards (finetune)."
)

Methods = Method | Stage | str | Sequence[Any]


@dataclass
class Job:
    """One call of `compress`: what was asked, and the seconds that its stages took."""

    model: nn.Module
    data: Data
    method: Method
    budget: Budget | None
    train: Train | None
    seed: int
    example: Example
    resume: bool
    folder: Path | None = None
    watch: Watch = lambda row: None
    target: Target | None = None
    split: Split | None = None  # where scores are measured
    task: Task | None = None  # what is trained and scored
    seconds: dict[str, float] = field(default_factory=dict)

    def go(self, *, control: bool, strict: bool, name: str) -> Result:
        """Refuse or begin, measure, train, finish, measure, report."""
        with self._stage("prepare"):
            run = self._begin()
        reference, rows = self._reference(control=control)
        before, dense = self._before(reference, run, own=bool(rows))
        with self._stage("finish", show=False):
            if self.train is not None and self._epochs():
                self._fit(run, self.train, self.folder, self.watch, reference)
            else:
                self.watch({"phase": "factorize"})
                run.finish(strict=False)
        self.seconds |= phases(run.log, self.seconds.pop("finish"))
        run.finish(strict=strict)
        return self.result(run, reference, (before, dense), rows, name)

    def result(
        self,
        run: Run,
        reference: nn.Module | None,
        dense: tuple[Side, Score | None],
        rows: list[dict[str, Any]],
        name: str,
    ) -> Result:
        """Measure, judge and report what a finished run has made.

        Args:
            run: finished.
            reference: the dense network, None if nobody kept it.
            dense: what it costs and scores.
            rows: the history of its training, where there was one.
            name: what the report calls it.
        """
        check_left(run.model, type(self.method).__name__)  # what fine-tuning leaves
        after, small = self._side(run.model, run)
        if not run.edits and alike(self.model, run.model):
            dense = after, small  # batch norms were not re-estimated either
        with self._stage("measure"):
            sides = timed(run, dense[0], after)
        near = None if trying() or reference is None else self._fidelity(reference, run)
        found = self._sizes(run)
        bound = LOSE if self.budget is None or self.budget.drop is None else self.budget.drop
        verdict = judge(dense[1], small, bound)
        report = replace(self._report(run, name, sides, rows), sizes=found, verdict=verdict)
        findings = self._findings(run, lost=verdict.holds is False)
        if verdict.holds is None and self.train is None:  # no score tells what is left
            findings += far(near)
        report = replace(report, findings=findings)
        report = replace(report, fidelity=near, task=str(self.task or ""), metrics=self._metrics())
        if verdict.holds is False:
            warnings.warn(said(verdict), AccuracyWarning, stacklevel=4)
        edits = tuple(from_json(to_json(run.edits)))  # a plan: without the tensors of factors
        return Result(run.model.to(device_of(self.model)).eval(), edits, report)

    def _begin(self) -> Run:
        """All refusals, then a run on a copy of the model."""
        train, data = self.train, self.data
        if train is not None and not isinstance(train, Train):
            raise DataError(f"train must be a Train or None, not {type(train).__name__}.")
        check_axes(self.method, self.budget)
        network = copied(self.model).to(self._device())
        if self.target and train and train.devices > 1:
            raise BudgetError(
                f"Milliseconds are measured by one process, and {train.devices} would each find "
                "their own: train on one device, or drop the target."
            )
        if self._epochs():
            check_data(network, data)
        elif data.has("train"):
            data.check(labelled=False)
        self.split = scored_split(data, self.task)
        self.settle(network)
        run = start(
            network,
            self.method,
            self.budget,
            data=data if data.has("train") else None,
            example=self.example,
            steps=self._steps(train, self.method),
            seed=self.seed,
            task=self.task,
            target=self.target,
            saved=self._saved() if self.target else None,
        )
        run.observe = self._observe
        return run

    def _saved(self) -> dict[str, Any] | None:
        """Read the run to go on with, if there is one."""
        found = checkpoint.read(self.folder, {}) if self.resume and self.folder else None
        return found and found["run"]

    def _reference(self, *, control: bool) -> tuple[nn.Module, list[dict[str, Any]]]:
        """The dense network to compare with: as it came, or trained without the method."""
        network = copied(self.model).to(self._device())
        if not control or self.train is None or not self._epochs():
            return network, []
        plan = replace(self.train, epochs=self._epochs(), finetune=0, distill=0.0)
        with self._stage(CONTROL, show=False):
            method = Control(*patterns(self.method))
            run = start(
                network,
                method,
                data=self.data,
                example=self.example,
                steps=self._steps(plan, method),
                seed=self.seed,
                task=self.task,
            )
            folder = self.folder / CONTROL if self.folder else None
            self._fit(run, plan, folder, lambda row: self.watch({**row, "phase": CONTROL}))
        return run.model, [{**row, "phase": CONTROL, "control": True} for row in run.log]

    def _fit(
        self,
        run: Run,
        plan: Train,
        folder: Path | None,
        watch: Watch,
        teacher: nn.Module | None = None,
    ) -> None:
        asked: dict[str, Any] = {"folder": folder, "resume": self.resume, "watch": watch}
        fit(run, self.data, plan, teacher=teacher if plan.distill else None, **asked)

    def _before(self, network: nn.Module, run: Run, *, own: bool) -> tuple[Side, Score | None]:
        """Measure the dense network, once for all sizes of it that are tried."""
        mark = fingerprint(network)
        if own or not mark:  # a control has weights of its own
            return self.fair(network, run)

        def make() -> tuple[Side, Score | None, dict[str, Tensor]]:
            return *self.fair(network, run), copy.deepcopy(network.state_dict())

        found, score, state = kept(("before", mark, self.split), make)
        network.load_state_dict(state)
        return found, score

    def fair(self, network: nn.Module, run: Run) -> tuple[Side, Score | None]:
        """Measure the dense network with what any network gets: batch norms of these inputs.

        It counts as the better of itself and of a copy whose batch norms were re-estimated from
        the inputs that the smaller network is re-estimated from.
        """
        found, score = self._side(network, run)
        if score is None or not run.has_inputs or not math.isfinite(score.value):
            return found, score
        again = twin(network)
        if not recalibrate(again, run.inputs(RECALIBRATED)):
            return found, score
        anew, better = self._side(again, run)
        if better is None or not better.better(score):
            return found, score
        network.load_state_dict(again.state_dict())
        return anew, better

    def _side(self, network: nn.Module, run: Run) -> tuple[Side, Score | None]:
        with self._stage("measure"):
            return self._measured(network, run)

    def _measured(self, network: nn.Module, run: Run) -> tuple[Side, Score | None]:
        """Measure costs and, if there is a split to measure on, the score."""
        costs = cost(network, run.example)
        if self.split is None:
            return side(costs), None
        score = evaluate(network, self.data, self.split, task=self.task)
        values = {name: known(value) for name, value in score.values.items()}
        found = {"accuracy": known(score.accuracy), "loss": known(score.loss)}
        return replace(side(costs, **found), metrics=values), score

    def _metrics(self) -> dict[str, dict[str, str]]:
        known = self.task.metrics if self.task is not None else {}
        return {name: {"better": m.better, "unit": m.unit} for name, m in known.items()}

    def settle(self, network: nn.Module) -> None:
        """Find out what is trained and scored, and refuse what cannot be."""
        splits: list[Split] = ["train"] if self._epochs() else []
        if self._epochs() and self.data.has("val"):
            splits.append("val")
        if self.split is not None and self.split not in splits:
            splits.append(self.split)
        if splits:
            check_call(network, self.data)
            self.task = settle(self.task, network, self.data, splits, trains=bool(self._epochs()))

    def _fidelity(self, dense: nn.Module, run: Run) -> Fidelity | None:
        """Compare outputs with the dense network's, on inputs held out if there are any."""
        splits: tuple[Split, ...] = ("test", "val")
        where = next((split for split in splits if self.data.has(split)), None)
        with self._stage("measure"):
            if where is not None:
                inputs = first_inputs(self.data, where, COMPARED)
                return fidelity(dense, run.model, inputs, where, self.task)
            name = "train" if run.has_inputs else "example"
            seen = run.inputs(COMPARED) if run.has_inputs else [run.example]
            return fidelity(dense, run.model, seen, name, self.task)

    def _sizes(self, run: Run) -> tuple[Side, ...]:
        """Measure every size that the file of an elastic network holds."""
        if not elastic.cuttable(run.edits):
            return ()
        with self._stage("sizes"):
            return cuts(run, lambda network: self._measured(network, run)[0])

    def _observe(self, run: Run) -> dict[str, Any]:
        """Measure between the stages of a chain: costs, score, and the size of a file."""
        now = asdict(self._side(run.model, run)[0])
        with tempfile.TemporaryDirectory() as folder:
            for name, encode in (("file", None), ("coded", "auto")):
                path = artifact.save(Path(folder) / name, run.model, run.edits, encode=encode)
                now[name] = path.stat().st_size
        return {key: now[key] for key in ("params", "macs", "accuracy", "file", "coded")}

    def _report(
        self, run: Run, name: str, sides: tuple[Side, Side], rows: list[dict[str, Any]]
    ) -> Report:
        misses = tuple(run.misses(run.finish(strict=False)))
        plan = self.train.plain() if self.train else {}
        if rows:
            plan["reference"] = REFERENCE
        if self.split is not None:
            plan["scored_on"] = f"{self.data.size(self.split) or 'all'} samples of {self.split}"
        return Report(
            model=name,
            data=self.data.name if self.data.has("train") or self.split else "",
            method=self.method.plain(),
            budget=bounds(self.method, self.budget),
            before=sides[0],
            after=sides[1],
            layers=layer_rows(run),
            met=not misses,
            misses=misses,
            history=tuple(short(row) for row in (*run.log, *rows)),
            seconds={stage: round(took, 3) for stage, took in self.seconds.items()},
            seed=self.seed,
            device=str(device_of(run.model)),
            versions=versions(),
            train=plan,
            target=where_timed(run),
            inputs=self._inputs(run),
        )

    def _findings(self, run: Run, *, lost: bool) -> tuple[str, ...]:
        """Return what went wrong in the training, and what to do."""
        found = [row["finding"] for row in run.log if "finding" in row]
        late = run.called.begun and len(run.edits) > run.called.followed
        if lost and late and self.train is not None and not self.train.finetune:
            found.append(LATE)
        return tuple(found)

    def _inputs(self, run: Run) -> dict[str, str]:
        """Say how inputs were prepared, and what was counted as one sample where that was asked."""
        asked = run.planner.dense.sample
        return self.data.prepared() | ({"one sample": asked} if asked else {})

    @contextmanager
    def _stage(self, name: str, *, show: bool = True) -> Iterator[None]:
        began = time.monotonic()
        if show:
            self.watch({"phase": name})
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began

    def _epochs(self) -> float:
        return self.train.epochs + self.train.finetune if self.train else 0

    def _steps(self, train: Train | None, method: Method) -> int:
        if train is None or not train.epochs:
            return 0
        world = int(os.environ.get("WORLD_SIZE", train.devices)) if train.devices > 1 else 1
        return epochs_of(method, self.data, train, seed=self.seed, world=world).steps

    def _device(self) -> torch.device:
        """Where to work; what is not there is refused by the training, with its reasons."""
        asked = self.train.device if self.train and self.train.devices == 1 else ""
        cuda = torch.cuda.is_available()
        if asked == "auto" and cuda:
            return torch.device("cuda", 0)
        known = asked == "cpu" or (asked.startswith("cuda") and cuda)
        return torch.device(asked) if known else device_of(self.model)
