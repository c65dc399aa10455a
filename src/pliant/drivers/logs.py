"""Where people already look: the rows of a run in CSV, TensorBoard, MLflow or W&B."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from pliant.errors import MissingExtraError, OutputError

KINDS = ("csv", "tensorboard", "mlflow", "wandb")


class Logger(Protocol):
    """What is used of Lightning's loggers."""

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Take numbers of one step."""

    def finalize(self, status: str) -> None:
        """End the log."""


def check(where: str | None) -> None:
    """Refuse a log that cannot be opened, before any work.

    Raises:
        OutputError: there is no log of that kind, or it names no folder that can be made.
        MissingExtraError: its library is not installed.
    """
    if where is None:
        return
    kind, _, place = where.partition(":")
    if kind not in KINDS:
        raise OutputError(f"A log is one of {', '.join(KINDS)}, such as csv:logs, not {where!r}.")
    if kind in ("csv", "tensorboard") and not place:
        raise OutputError(f"Name the folder of the log: {kind}:FOLDER.")
    needs = {"csv": "lightning_fabric"}.get(kind, kind)
    try:
        import_module(needs)
    except ImportError as error:
        raise MissingExtraError(f"A log of {kind} needs {needs}: pip install {needs}.") from error
    if kind in ("csv", "tensorboard"):
        _make(Path(place))


def _make(folder: Path) -> None:
    """Make a folder, or refuse it: these loggers only try at the first row."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError as error:
        raise OutputError(f"The folder of the log, {folder}, cannot be made: {error}.") from error
    if not writable:
        raise OutputError(f"The folder of the log, {folder}, cannot be written to.")


def logger(where: str, name: str = "pliant") -> Logger:
    """Open a log.

    Args:
        where: ``csv:FOLDER``, ``tensorboard:FOLDER``, ``mlflow`` or ``mlflow:URI`` (such as
            ``mlflow:sqlite:///mlflow.db``), ``wandb`` or ``wandb:PROJECT``.
        name: of the run.

    Raises:
        OutputError: there is no log of that kind, it names no folder, or it cannot be opened.
        MissingExtraError: its library is not installed.
    """
    check(where)
    kind, _, place = where.partition(":")
    try:
        return _OPEN[kind](place, name)
    except Exception as error:  # each library has its own
        raise OutputError(f"The log {where} cannot be opened: {error}") from error


def _csv(place: str, name: str) -> Logger:
    from lightning_fabric.loggers import CSVLogger

    return CSVLogger(place, name, version="")


def _tensorboard(place: str, name: str) -> Logger:
    from lightning_fabric.loggers import TensorBoardLogger

    return TensorBoardLogger(place, name, version="")


class _Wandb:
    """The client of W&B behind the same two calls."""

    def __init__(self, place: str, name: str) -> None:
        import wandb

        self.run = wandb.init(project=place or "pliant", name=name)
        self.run.define_metric("*", step_metric="step")

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        # Not as W&B's own step: that may only grow, and a control run begins at 0 again.
        self.run.log({**metrics, "step": step})

    def finalize(self, status: str) -> None:
        self.run.finish(exit_code=int(status != "success"))


class _MLflow:
    """MLflow's own client behind the same two calls."""

    def __init__(self, place: str, name: str) -> None:
        from mlflow import MlflowClient

        self.client = MlflowClient(tracking_uri=place or None)
        found = self.client.get_experiment_by_name("pliant")
        experiment = found.experiment_id if found else self.client.create_experiment("pliant")
        self.run = self.client.create_run(experiment, run_name=name).info.run_id

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        for key, value in metrics.items():
            self.client.log_metric(self.run, key, value, step=step or 0)

    def finalize(self, status: str) -> None:
        self.client.set_terminated(self.run, "FINISHED" if status == "success" else "FAILED")


_OPEN: dict[str, Callable[[str, str], Logger]] = {
    "csv": _csv, "tensorboard": _tensorboard, "mlflow": _MLflow, "wandb": _Wandb,
}  # fmt: skip


def write(logger: Logger, history: Iterable[Mapping[str, Any]], after: Mapping[str, Any]) -> None:
    """Write the rows of a run, its control under names of their own, and what came out.

    Args:
        logger: from `logger`.
        history: of a report.
        after: what the network costs and scores in the end.

    Raises:
        OutputError: the log takes no rows.
    """
    try:
        _write(logger, history, after)
    except Exception as error:  # each library has its own
        raise OutputError(
            f"The log takes no rows ({type(error).__name__}: {error}); the run itself is whole."
        ) from error


def _write(logger: Logger, history: Iterable[Mapping[str, Any]], after: Mapping[str, Any]) -> None:
    last = 0
    for row in history:
        step = int(row.get("step", last))
        last = max(last, step)
        prefix = "control/" if row.get("control") else ""
        numbers = {prefix + name: value for name, value in _numbers(row).items() if name != "step"}
        if numbers:
            logger.log_metrics(numbers, step=step)
    logger.log_metrics({f"after/{name}": value for name, value in _numbers(after).items()}, last)
    logger.finalize("success")


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    kept = {n: v for n, v in row.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return {name: float(value) for name, value in kept.items() if math.isfinite(value)}
