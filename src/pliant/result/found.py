"""What the other verbs return: plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from torch import Tensor

Views = tuple[tuple[Tensor, ...], ...]
"""What is clustered: views of the same samples, each sample a matrix (features, columns)."""


@dataclass(frozen=True, eq=False)
class Solution:
    """What `recover` and `cluster` found.

    Args:
        values: named tensors, the wanted one first: ``recovered``, or ``labels``.
        history: a row of plain numbers for each iteration that is worth a row.
        converged: whether the method's own stopping rule was met.
        iterations: how many were made in all.
        seconds: how long it took.
        seed: what randomness began with.
        method: as plain data, options included.
    """

    values: Mapping[str, Any]
    history: tuple[dict[str, Any], ...] = ()
    converged: bool = True
    iterations: int = 0
    seconds: float = 0.0
    seed: int = 0
    method: Mapping[str, Any] = field(default_factory=dict)

    @property
    def value(self) -> Any:
        """What was asked for: the first of the values."""
        return next(iter(self.values.values()))

    def plain(self) -> dict[str, Any]:
        """Return all but the tensors as plain data; of those their shapes."""
        return _described(self)


@dataclass(frozen=True)
class Curves:
    """Lines that a report of a finding draws.

    Args:
        title: its heading.
        caption: what there is to see.
        lines: named points (x, y) from left to right.
        x: what the horizontal axis counts.
        y: what the vertical axis counts.
        bands: (x, low, high) around lines of the same name, where they are known to lie.
    """

    title: str
    caption: str
    lines: Mapping[str, Sequence[tuple[float, float]]]
    x: str
    y: str
    bands: Mapping[str, Sequence[tuple[float, float, float]]] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Heat:
    """Maps over images that a report of a finding draws, such as where a decision comes from.

    Args:
        title: its heading.
        caption: what there is to see.
        images: (images, channels, height, width), in any scale.
        maps: (images, rows, columns), positive for, negative against.
        labels: a line of text below each image.
    """

    title: str
    caption: str
    images: Tensor
    maps: Tensor
    labels: tuple[str, ...]

    def plain(self) -> dict[str, Any]:
        """Return all but the tensors as plain data; of those their shapes."""
        shapes = {"images": _plain(self.images), "maps": _plain(self.maps)}
        return {"title": self.title, "caption": self.caption, "labels": list(self.labels), **shapes}


@dataclass(frozen=True, eq=False)
class Finding:
    """What `analyze` found out about a network.

    Args:
        values: named numbers and tensors, the main one first.
        rows: a table of plain data, a row for each thing looked at.
        text: the finding in one sentence.
        seconds: how long it took.
        seed: what randomness began with.
        method: as plain data, options included.
        figures: what a report of it draws.
    """

    values: Mapping[str, Any]
    rows: tuple[dict[str, Any], ...] = ()
    text: str = ""
    seconds: float = 0.0
    seed: int = 0
    method: Mapping[str, Any] = field(default_factory=dict)
    figures: tuple[Curves | Heat, ...] = ()

    @property
    def value(self) -> Any:
        """What was asked for: the first of the values."""
        return next(iter(self.values.values()))

    def plain(self) -> dict[str, Any]:
        """Return all but the tensors as plain data; of those their shapes."""
        return _described(self)


def _described(found: Solution | Finding) -> dict[str, Any]:
    """Every field as plain data."""
    plain = {f.name: getattr(found, f.name) for f in fields(found)}
    shapes = {name: _plain(value) for name, value in found.values.items()}
    rows = {
        k: [row.plain() if isinstance(row, Curves | Heat) else dict(row) for row in v]
        for k, v in plain.items()
        if isinstance(v, tuple)
    }
    return {**plain, "values": shapes, "method": dict(found.method), **rows}


def _plain(value: Any) -> Any:
    """A number as it is, of anything larger its shape."""
    return value if isinstance(value, int | float | str) else {"shape": list(value.shape)}
