"""A training on disk: written atomically, read without running anything, refused if foreign.

Behind the file of `torch.save` stands a checksum of all its bytes.
"""

import hashlib
import inspect
import io
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pliant.codecs.disk import regular
from pliant.data import Data, Train
from pliant.data.digest import digest_of, digests
from pliant.data.train import called
from pliant.errors import ArtifactError, OutputError, TrainingError
from pliant.run import Run

NAME, PART = "checkpoint.pt", "checkpoint.part"
CONTROL = "control"  # folder of the control run's checkpoint
_MARK = b"pliant sha256 "
FREE = ("device", "devices", "checkpoint_every")  # what a resumed training may change


def identity(run: Run, data: Data, train: Train) -> dict[str, str]:
    """Describe a training, so that a checkpoint of another one is not taken for it."""
    plan = {name: value for name, value in train.plain().items() if name not in FREE}
    place = run.clock.target.plain() if run.clock else {}
    example = data.example()
    values = example.values() if isinstance(example, Mapping) else example
    first = [round(float(v.double().sum()), 3) for v in values if isinstance(v, Tensor)]
    sizes = [data.size(s) if data.has(s) else None for s in ("train", "val")]
    inputs, labels = digests(data)
    return {
        "model": f"{type(run.model).__name__} with {run.cost.params:,} parameters",
        "method": repr(run.method),
        "budget": repr(run.budget.given() if run.budget else {}),
        "data": f"{data.name} with {sizes[0]} and {sizes[1]} samples, the first being {first}",
        "seed": str(run.seed),
        "task": str(run.task or ""),
        "loss": _described(run.task.loss) if run.task and run.task.loss else "",
        "train": _listed(plan),
        "target": _listed(place) or "none",
        "digest of the weights": run.journal.origin,
        "digest of the inputs": inputs,
        "digest of the labels": labels,
    }


def _described(function: Any) -> str:
    """Name a function, with a digest of what it does where it is one of Python's."""
    inner = inspect.unwrap(function)
    code = getattr(inner, "__code__", None)
    if code is None or str(getattr(inner, "__module__", "")).startswith("pliant."):
        return called(function)
    plain = [each for each in code.co_consts if isinstance(each, bool | int | float | str | None)]
    return f"{called(function)} ({digest_of(code.co_code, plain, list(code.co_names))})"


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


def write(folder: Path, content: dict[str, Any]) -> Path:
    """Replace the checkpoint of a folder; the old one stays until the new one is whole.

    Raises:
        OutputError: the folder cannot be written; the old checkpoint is still there.
    """
    path, part = folder / NAME, folder / PART
    kept = "the last one is kept" if path.exists() else "there was none before"
    buffer = sealed(content)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OutputError(
            f"The checkpoint needs {len(buffer.getbuffer()):,} bytes in {folder}, but writing "
            f"fails: {error}; {kept}: free space and resume."
        ) from error
    return path


def read(folder: Path, expected: dict[str, str]) -> dict[str, Any] | None:
    """Read the checkpoint of a folder; None if there is none yet.

    Warns where it was written with another number of threads: sums are rounded otherwise then.

    Raises:
        ArtifactError: the file is damaged or no checkpoint.
        TrainingError: it belongs to another training.
    """
    path = folder / NAME
    if not os.path.lexists(path):
        return None
    try:
        content = unsealed(path)
        saved = dict(content["identity"])
    except Exception as error:  # torch.load raises what it likes on foreign bytes
        said = str(error) if isinstance(error, ArtifactError | OSError) else type(error).__name__
        raise ArtifactError(
            f"{path} must be a checkpoint of this training, but cannot be read "
            f"({said}); delete it to begin anew."
        ) from error
    for name, value in expected.items():
        if saved.get(name) != value:
            raise TrainingError(
                f"{path} is the checkpoint of another run: its {name} is {saved.get(name)}, here "
                f"it is {value}; use the same {name.removeprefix('digest of the ')}, or another "
                "folder."
            )
    threads = torch.get_num_threads()
    if expected and content.get("threads", threads) != threads:
        warnings.warn(
            f"{path} was written with {content['threads']} threads and goes on with {threads}: "
            "the result will differ in the last digits from an undisturbed run; set "
            f"OMP_NUM_THREADS={content['threads']} for the same.",
            stacklevel=2,
        )
    return dict(content)


def sealed(content: Any) -> io.BytesIO:
    """Write tensors and plain values, and behind them a checksum of the bytes."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    digest = hashlib.sha256(buffer.getbuffer()).digest()
    buffer.seek(0, os.SEEK_END)
    buffer.write(_MARK + digest)
    buffer.seek(0)
    return buffer


def unsealed(path: Path) -> Any:
    """Read what `sealed` wrote, tensors and plain values only.

    Raises:
        ArtifactError: a byte is another one, or there is no checksum.
    """
    with regular(path) as file:
        data = file.read()
    body, end = data[: -len(_MARK) - 32], data[-len(_MARK) - 32 :]
    if end != _MARK + hashlib.sha256(body).digest():
        raise ArtifactError("its bytes are not those that were written: the checksum differs")
    return torch.load(io.BytesIO(body), weights_only=True, map_location="cpu")


def forget(folder: Path) -> None:
    """Remove the checkpoints of earlier runs, and what a kill left of one half written.

    Raises:
        OutputError: they cannot be removed.
    """
    try:
        for place in (folder, folder / CONTROL):
            for name in (NAME, PART):
                (place / name).unlink(missing_ok=True)
        if (folder / CONTROL).is_dir() and not any((folder / CONTROL).iterdir()):
            shutil.rmtree(folder / CONTROL)
    except OSError as error:
        raise OutputError(
            f"The checkpoint in {folder} is of an earlier run and cannot be removed "
            f"({error.strerror or error}): choose another folder."
        ) from error
