"""The check of ONNX files: once for all compressions that end in layers of the same kinds."""

from __future__ import annotations

import copy
import re
import tempfile
from pathlib import Path
from typing import Any

from pliant.edits import to_json
from pliant.errors import MissingExtraError
from pliant.files.onnx import to_onnx
from pliant.testing.trial import Trial

_EXPORTED: set[str] = set()


def exports(found: Trial) -> None:
    """As ONNX the result gives equal outputs; skipped where one of its kind has done so."""
    toy, kind = found.toy, kind_of(found)
    if kind in _EXPORTED and toy.given is None:
        return
    model = copy.deepcopy(found.result.model)
    with tempfile.TemporaryDirectory() as folder:
        try:
            to_onnx(model, Path(folder) / "toy.onnx", toy.inputs(2))
        except MissingExtraError:
            return
    _EXPORTED.add(kind)


def kind_of(found: Trial) -> str:
    """Write the network, its layers and what edits say in words, with "#" for sizes above 1."""
    rows = [
        sorted((key, value) for key, value in row.items() if not _is_size(value))
        for row in to_json(found.result.edits)
    ]
    edits = sorted({str(row) for row in rows})
    return re.sub(r"[2-9]|\d\d+", "#", f"{found.toy.name} {edits} {found.result.model}")


def _is_size(value: Any) -> bool:
    return isinstance(value, int | float | list | tuple) and not isinstance(value, bool)
