"""BasicMotions: forty sequences of a smart watch to learn from and forty to score, four classes."""

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from pliant.errors import DataError

NAMES = ("standing", "running", "walking", "badminton")


def basic_motions() -> dict[str, tuple[Tensor, Tensor]]:
    """Read the files that come in the package aeon, which is not imported.

    Returns:
        for "train" and "test": sequences (40, 2, 3, 100), accelerometer and gyroscope of three axes
        each, every channel in units of its deviation in training, and classes (40,).

    Raises:
        DataError: the package is not installed.
    """
    spec = find_spec("aeon")
    places = [] if spec is None else spec.submodule_search_locations or []
    folders = [Path(place) / "datasets" / "data" / "BasicMotions" for place in places]
    folder = next((folder for folder in folders if folder.is_dir()), None)
    if folder is None:
        raise DataError(
            "BasicMotions comes with aeon, which is missing: pip install --no-deps aeon."
        )
    found = {s: _read(folder / f"BasicMotions_{s.upper()}.ts") for s in ("train", "test")}
    scale = found["train"][0].std((0, 3), keepdim=True)
    return {name: (x / scale, labels) for name, (x, labels) in found.items()}


def _read(path: Path) -> tuple[Tensor, Tensor]:
    """Each line is a sequence: six channels of numbers, then the class, parted by colons."""
    lines = [line for line in path.read_text().splitlines() if line and line[0] not in "#@"]
    rows = [line.split(":") for line in lines]
    x = torch.tensor([[[float(v) for v in part.split(",")] for part in r[:-1]] for r in rows])
    labels = torch.tensor([NAMES.index(row[-1].strip().lower()) for row in rows])
    return x.unflatten(1, (2, 3)), labels
