"""The report of `compress` for a run that a loop of one's own has trained."""

from __future__ import annotations

from typing import Any

from torch import nn

from pliant.api.job import Job
from pliant.api.measured import scored_split
from pliant.api.report import side
from pliant.cost import bare, twin
from pliant.data import Data
from pliant.drivers.devices import own_randomness
from pliant.drivers.score import Score, device_of
from pliant.errors import MethodError, ModelError, must_be
from pliant.result import Result, Side
from pliant.run import Run


def conclude(
    run: Run,
    data: Any = None,
    *,
    dense: nn.Module | None = None,
    name: str = "",
    strict: bool = True,
) -> Result:
    """Finish a run, measure and judge what came out, and report it as `compress` does.

    For a loop of your own, Lightning and Transformers: call it in the place of `run.finish()`, or
    after the trainer. The network stays where it is and is put into eval mode.

    Args:
        run: from `start`, trained.
        data: where scores are measured, on the test split or validation: as for `compress`; the
            run's own if None.
        dense: a copy of the network as it was before `start`; without one nothing is known of what
            was lost, and costs alone are compared.
        name: what the report calls the network; its class if not given.
        strict: raise where the budget is missed, or the training ended before the method did.

    Returns:
        The network, its edits and the report; its history holds what was noted by `run.note`.

    Raises:
        BudgetError: the budget is missed, if strict.
        TrainingError: as for `Run.finish`.
        ModelError: the dense network is the one that was compressed.
        DataError: the data do not fit.
    """
    must_be(Run, "run", run, MethodError, "a run from pliant.start(...)")
    if dense is not None and bare(dense) is run.model:
        raise ModelError(
            "The dense network must be a copy from before start(...), but it is the network that "
            "was compressed: keep copy.deepcopy(model) before you start."
        )
    run.finish(strict=strict)
    given = Data.of(run.data if data is None else data, seed=run.seed).read_by(run.model)
    method: Any = run.method
    network = run.model if dense is None else twin(bare(dense)).to(device_of(run.model))
    with own_randomness(run.seed, device_of(run.model)):
        job = Job(network, given, method, run.budget, None, run.seed, run.example, resume=False)
        job.task, job.split = run.task, scored_split(given, run.task)
        job.settle(run.model)
        before: tuple[Side, Score | None] = side(run.cost), None
        if dense is not None:
            before = job.fair(network, run)
        reference = None if dense is None else network
        return job.result(run, reference, before, [], name or type(run.model).__name__)
