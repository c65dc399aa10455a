"""Many compressions of one network as one study, which several processes can work on."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from pliant.api.network import once
from pliant.api.within import measured, silent
from pliant.compose import resolve
from pliant.data import Data
from pliant.data.asking import named_splits, once_only
from pliant.data.digest import digest_of, digests
from pliant.drivers.checkpoint import FREE
from pliant.errors import MissingExtraError, OutputError, PliantError, TrainingError
from pliant.latency import as_target
from pliant.result import Result

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial, Trial

NAME = "pliant"  # of the study in its storage
ALIVE = 10  # seconds between two signs of life of a running trial
TWICE = "made by another process"
OWN = ("case", "began", "mistake")  # what a trial holds and a row does not


@dataclass(frozen=True)
class Case:
    """One compression of a sweep.

    Args:
        method: a spec, such as ``"energy(p=0.9)"``.
        budget: text such as ``"params=0.3"``; empty for none.
        seed: of everything random.
    """

    method: str
    budget: str = ""
    seed: int = 0

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.method, self.budget, f"seed {self.seed}")))


def cases(
    methods: Sequence[str],
    budgets: Sequence[str] = (),
    seeds: Sequence[int] = (0,),
    options: Mapping[str, Sequence[Any]] | None = None,
) -> list[Case]:
    """Combine methods, budgets, options and seeds; an option belongs to methods without options.

    Raises:
        MethodError: a method or an option is unknown.

    >>> [str(case) for case in cases(["energy"], ["params=0.5"], options={"p": [0.8, 0.9]})]
    ['energy(p=0.8), params=0.5, seed 0', 'energy(p=0.9), params=0.5, seed 0']
    """
    specs = [spec for method in methods for spec in _with_options(method, options or {})]
    for spec in specs:
        resolve(spec)
    return [Case(*each) for each in product(specs, budgets or ("",), seeds)]


def _with_options(method: str, options: Mapping[str, Sequence[Any]]) -> Iterator[str]:
    if not options or "(" in method:
        yield method
        return
    for values in product(*options.values()):
        told = ", ".join(f"{k}={v!r}" for k, v in zip(options, values, strict=True))
        yield f"{method}({told})"


def sweep(
    model: nn.Module,
    data: Any,
    plan: Sequence[Case],
    *,
    storage: str | Path = "runs/sweep/study.db",
    keep: Callable[[Case, Result], str | None] = lambda case, result: None,
    watch: Callable[[dict[str, Any]], None] = lambda row: None,
    **asked: Any,
) -> list[dict[str, Any]]:
    """Compress a network in many ways, each once, and return what was measured.

    The cases lie in a study of Optuna. Any number of processes, on any number of machines that
    reach its storage, may call this with the same arguments: each takes cases that nobody has
    taken. A case whose process died is taken again; one that fails is kept with its reason. Called
    again, cases that were stopped or that failed by a mistake are made again, refused ones are not.

    Args:
        model: any network; it stays as it is.
        data: as for `compress`.
        plan: from `cases`.
        storage: a file for SQLite, or any storage URL of Optuna, such as ``postgresql://...``.
        keep: told every result; the text that it returns, such as a path, is kept as ``link``.
        watch: told after every case how many are done of how many, and the seconds left.
        asked: everything else that `compress` takes: ``train``, ``target``, ...

    Returns:
        A row for each case that is over, by all processes together: see `rows`.

    Raises:
        MissingExtraError: Optuna is not installed.
        OutputError: the storage cannot be opened.
        TrainingError: the study in it is of another network, other data or another training.
    """
    data = Data.of(data) if once_only(data) or named_splits(data) else data  # read by every case
    study = open_study(storage)
    _check_same(study, storage, _shared(model, Data.of(data), asked))
    _enqueue(study, plan)
    began, done = time.monotonic(), 0

    def make(trial: Trial) -> tuple[float, float]:
        case = _case(trial, study)
        trial.set_user_attr("began", True)
        try:
            with silent():
                told = {**asked, "seed": case.seed, "strict": False}
                found = once(model, data, case.method, case.budget or None, **told)
        except Exception as error:  # of a network, data or method of the user's own, too
            ours = isinstance(error, PliantError)
            said = str(error) if ours else f"{type(error).__name__}: {error}"
            trial.set_user_attr("refused", said)
            trial.set_user_attr("mistake", not ours)
            raise _Refused from error
        row = {**measured(found), "met": found.report.met, "link": keep(case, found)}
        for name, value in row.items():
            trial.set_user_attr(name, value)
        return _values(found)

    while open_cases := _open(study):
        if "WAITING" not in open_cases:  # another process has it, or one that died
            time.sleep(1)
            continue
        if not _made(study, make):
            continue
        done += 1
        over, left = len(rows(study)), _open(study).count("WAITING")
        seconds = (time.monotonic() - began) / done * left
        watch({"phase": "sweep", "step": over, "steps": over + left, "seconds_left": seconds})
    return rows(study)


class _Refused(Exception):
    """A case has failed, and the study holds its reason."""


def _shared(model: nn.Module, data: Data, asked: Mapping[str, Any]) -> dict[str, str]:
    """Describe what all cases of a sweep have in common."""
    inputs, labels = digests(data, ("train", "val", "test"))
    train, target = asked.get("train"), asked.get("target")
    plan = train.plain().items() if train else ()
    return {
        "weights": digest_of(*model.state_dict().values()),
        "inputs": inputs,
        "labels": labels,
        "training": ", ".join(f"{n}={v}" for n, v in plan if n not in FREE) or "none",
        "target": str(as_target(target)) if target else "none",
        "task": str(asked.get("task")),
    }


def _check_same(study: Study, storage: str | Path, shared: Mapping[str, str]) -> None:
    """Note what the cases have in common, and refuse a study that is of something else."""
    noted = study.user_attrs.get("shared", {})
    for name, value in shared.items():
        if noted.get(name, value) != value:
            raise TrainingError(
                f"The study in {storage} is of another sweep: its {name} is {noted[name]}, here it "
                f"is {value}; use the same {name}, or another storage."
            )
    study.set_user_attr("shared", dict(shared))


def _made(study: Study, make: Callable[[Trial], tuple[float, float]]) -> bool:
    """Make one case; say whether it counts: who is slow to show life is taken for dead."""
    from optuna.exceptions import UpdateFinishedTrialError

    try:
        study.optimize(make, n_trials=1, catch=(_Refused,))
    except UpdateFinishedTrialError:  # another process has taken it over
        return False
    except ValueError as error:  # or has even ended it: Optuna has no class for that
        if not str(error).startswith("Cannot tell a"):
            raise
        return False
    return True


def open_study(storage: str | Path) -> Study:
    """Open or make the study of a storage.

    Raises:
        MissingExtraError: Optuna is not installed.
        OutputError: the storage cannot be opened.
    """
    try:
        import optuna
        from optuna.storages import RDBStorage, RetryFailedTrialCallback
    except ImportError as error:
        raise MissingExtraError("A sweep needs Optuna: pip install 'pliant[sweep]'.") from error
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)  # refusals are rows
    url = str(storage)
    if "://" not in url:
        url = f"sqlite:///{Path(url).resolve()}"
    try:
        if url.startswith("sqlite:///"):
            Path(url.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of features that Optuna calls experimental
            kept = RDBStorage(
                url,
                heartbeat_interval=ALIVE,
                grace_period=3 * ALIVE,
                failed_trial_callback=RetryFailedTrialCallback(),
            )
            return optuna.create_study(
                storage=kept,
                study_name=NAME,
                directions=["maximize", "minimize"],
                load_if_exists=True,
            )
    except Exception as error:  # of SQLAlchemy, of its drivers, of Optuna
        raise OutputError(
            f"The storage {storage} cannot be opened ({str(error).splitlines()[0]}): name a file "
            "that can be written, or a storage URL of Optuna."
        ) from error


def rows(study: Study) -> list[dict[str, Any]]:
    """Return a row for every case that is over.

    ``name``, ``method``, ``budget`` and ``seed`` say what it was; params, macs, bytes, latency_ms,
    accuracy, lost, met and seconds what came out; ``refused`` why nothing did.
    """
    found: dict[str, dict[str, Any]] = {}
    for trial in study.get_trials(deepcopy=False):
        case = trial.user_attrs.get("case")
        if case is None or trial.user_attrs.get("refused") == TWICE:
            continue
        over = trial.state.name == "COMPLETE" or "refused" in trial.user_attrs
        if over and trial.duration is not None:
            kept = {k: v for k, v in trial.user_attrs.items() if k not in OWN}
            took = trial.duration.total_seconds()
            found[str(Case(**case))] = {"name": str(Case(**case)), **case, **kept, "seconds": took}
    return list(found.values())


def _enqueue(study: Study, plan: Sequence[Case]) -> None:
    """Add the cases that are neither waiting, nor being made, nor over for good."""
    known = set()
    for trial in study.get_trials(deepcopy=False):
        refused = trial.user_attrs.get("refused", TWICE) != TWICE
        if trial.state.name in ("WAITING", "RUNNING", "COMPLETE") or (
            refused and not trial.user_attrs.get("mistake")
        ):
            known.add(_key(trial))
    for case in plan:
        if str(case) not in known:
            study.enqueue_trial({}, user_attrs={"case": asdict(case)})


def _key(trial: Trial | FrozenTrial) -> str:
    case = trial.user_attrs.get("case")
    return str(Case(**case)) if case else ""


def _open(study: Study) -> list[str]:
    """Return the states of the cases that are not over, after those of the dead were put back."""
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of features that Optuna calls experimental
        optuna.storages.fail_stale_trials(study)
    for trial in filter(_stillborn, study.get_trials(deepcopy=False)):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL, skip_if_finished=True)
        study.enqueue_trial({}, user_attrs={"case": trial.user_attrs["case"]})
    states = [trial.state.name for trial in study.get_trials(deepcopy=False) if _key(trial)]
    return [state for state in states if state in ("WAITING", "RUNNING")]


def _stillborn(trial: FrozenTrial) -> bool:
    """Say whether the process of a case died before its first sign of life."""
    taken = trial.state.name == "RUNNING" and "began" not in trial.user_attrs and _key(trial)
    if not taken or trial.datetime_start is None:
        return False
    return (datetime.now() - trial.datetime_start).total_seconds() > 3 * ALIVE


def _case(trial: Trial, study: Study) -> Case:
    """Read what a trial is to do; one that nobody asked for, or that another does, is left."""
    import optuna

    key = _key(trial)
    others = [
        other
        for other in study.get_trials(deepcopy=False)
        if other.number != trial.number and key and _key(other) == key
        and (other.state.name == "COMPLETE"
             or (other.state.name == "RUNNING" and other.number < trial.number))
    ]  # fmt: skip
    if not key or others:
        trial.set_user_attr("refused", TWICE)
        raise optuna.TrialPruned
    return Case(**trial.user_attrs["case"])


def _values(found: Result) -> tuple[float, float]:
    """Return what the study compares: accuracy, and the parameters that it takes."""
    after = found.report.after
    accuracy = after.accuracy if after.accuracy is not None else -(after.loss or 0.0)
    return accuracy if math.isfinite(accuracy) else -math.inf, float(after.params)
