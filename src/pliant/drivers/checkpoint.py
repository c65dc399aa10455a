"""A training on disk: written atomically, read without running anything, refused if foreign."""

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pliant.data import Data, Train
from pliant.errors import ArtifactError, OutputError, TrainingError
from pliant.run import Run

NAME = "checkpoint.pt"
_FREE = ("device", "devices", "checkpoint_every")  # what a resumed training may change


def identity(run: Run, data: Data, train: Train) -> dict[str, str]:
    """Describe a training, so that a checkpoint of another one is not taken for it."""
    plan = {name: value for name, value in train.plain().items() if name not in _FREE}
    place = run.clock.target.plain() if run.clock else {}
    example = data.example()
    values = example.values() if isinstance(example, Mapping) else example
    first = [round(float(v.double().sum()), 3) for v in values if isinstance(v, Tensor)]
    sizes = [data.size(s) if data.has(s) else None for s in ("train", "val")]
    return {
        "model": f"{type(run.model).__name__} with {run.cost.params:,} parameters",
        "method": repr(run.method),
        "budget": repr(run.budget.given() if run.budget else {}),
        "data": f"{data.name} with {sizes[0]} and {sizes[1]} samples, the first being {first}",
        "seed": str(run.seed),
        "task": str(run.task or ""),
        "train": _listed(plan),
        "target": _listed(place) or "none",
    }


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


def write(folder: Path, content: dict[str, Any]) -> Path:
    """Replace the checkpoint of a folder; the old one stays until the new one is whole.

    Raises:
        OutputError: the folder cannot be written; the old checkpoint is still there.
    """
    buffer, path = io.BytesIO(), folder / NAME
    torch.save(content, buffer)
    part = path.with_suffix(".part")
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
            f"fails: {error}; the last one is kept: free space and resume."
        ) from error
    return path


def read(folder: Path, expected: dict[str, str]) -> dict[str, Any] | None:
    """Read the checkpoint of a folder; None if there is none yet.

    Raises:
        ArtifactError: the file is damaged or no checkpoint.
        TrainingError: it belongs to another training.
    """
    path = folder / NAME
    if not path.exists():
        return None
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
        saved = dict(content["identity"])
    except Exception as error:  # torch.load raises what it likes on foreign bytes
        raise ArtifactError(
            f"{path} must be a checkpoint of this training, but cannot be read "
            f"({type(error).__name__}); delete it to begin anew."
        ) from error
    for name, value in expected.items():
        if saved.get(name) != value:
            raise TrainingError(
                f"{path} is the checkpoint of another run: its {name} is {saved.get(name)}, here "
                f"it is {value}; use the same {name}, or another folder."
            )
    return dict(content)
