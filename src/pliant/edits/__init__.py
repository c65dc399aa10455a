"""Changes to a model as data: they can be applied, predicted, written to JSON and replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, fields
from typing import Any

from torch import nn

from pliant.edits.build import plain as plain_data
from pliant.edits.choose import Choose
from pliant.edits.edit import Edit, Replaced, layer_of
from pliant.edits.encode import Encode
from pliant.edits.factor import Factor
from pliant.edits.fold import Fold
from pliant.edits.insert import Insert
from pliant.edits.merge import Merge
from pliant.edits.multiply import Multiply
from pliant.edits.nest import Nest
from pliant.edits.pack import Pack
from pliant.edits.plain import Plain
from pliant.edits.prune import Prune
from pliant.edits.quantize import Quantize
from pliant.edits.record import apply, complete, made, note
from pliant.edits.remove import Remove
from pliant.edits.rerank import Rerank
from pliant.edits.settle import Settle
from pliant.edits.swap import Swap
from pliant.edits.widen import Widen
from pliant.errors import EditError

__all__ = [
    "EDITS",
    "Choose",
    "Edit",
    "Encode",
    "Factor",
    "Fold",
    "Insert",
    "Merge",
    "Multiply",
    "Nest",
    "Pack",
    "Plain",
    "Prune",
    "Quantize",
    "Remove",
    "Replaced",
    "Rerank",
    "Settle",
    "Swap",
    "Widen",
    "apply",
    "complete",
    "from_json",
    "layer_of",
    "made",
    "note",
    "replay",
    "to_json",
]

EDITS: dict[str, type] = {
    "choose": Choose,
    "encode": Encode,
    "factor": Factor,
    "insert": Insert,
    "merge": Merge,
    "multiply": Multiply,
    "nest": Nest,
    "pack": Pack,
    "plain": Plain,
    "prune": Prune,
    "fold": Fold,
    "quantize": Quantize,
    "remove": Remove,
    "rerank": Rerank,
    "settle": Settle,
    "swap": Swap,
    "widen": Widen,
}
"""The closed set of edits that a file may name."""


def replay(model: nn.Module, edits: Iterable[Edit], *, weights: bool = True) -> None:
    """Apply edits in order; with ``weights=False`` only the shapes change.

    Raises:
        EditError: an edit does not fit the model.
    """
    for edit in edits:
        apply(model, edit, weights=weights)


def to_json(edits: Iterable[Edit]) -> list[dict[str, Any]]:
    """Return the edits as plain data: names, strings and numbers, no tensors."""
    names = {kind: name for name, kind in EDITS.items()}
    return [{"edit": names[type(edit)]} | _written(edit) for edit in edits]


def _written(edit: Any) -> dict[str, Any]:
    """The fields of one edit, without those that are optional and say nothing."""
    values = {f: getattr(edit, f.name) for f in fields(edit) if f.compare}
    return {
        f.name: value
        for f, value in values.items()
        if not f.metadata.get("optional") or value != _default(f)
    }


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def from_json(rows: Any) -> list[Edit]:
    """Read edits from plain data, accepting only known names with the fields they have.

    Raises:
        EditError: the data is not a list of known edits.
    """
    if not isinstance(rows, list):
        raise EditError(f"Edits must be a list, not {type(rows).__name__}.")
    return [_edit(row) for row in rows]


def _edit(row: Any) -> Edit:
    name = row.get("edit") if isinstance(row, dict) else row
    if not isinstance(row, dict) or not isinstance(name, str) or name not in EDITS:
        raise EditError(f"Unknown edit {str(name)[:80]!r}: this version knows {', '.join(EDITS)}.")
    kind = EDITS[name]
    values = {key: value for key, value in row.items() if key != "edit"}
    expected = {f.name: str(f.type) for f in fields(kind) if f.compare}
    optional = {f.name for f in fields(kind) if f.metadata.get("optional")}
    needed = {f.name for f in fields(kind) if f.compare and f.default is MISSING} - optional
    if not needed <= set(values) <= set(expected):
        raise EditError(
            f"The edit {name} takes {', '.join(sorted(expected))}, "
            f"not {', '.join(sorted(map(str, values)))[:200]}."
        )
    for key, value in values.items():
        if not _FITS[expected[key]](value):
            raise EditError(
                f"{key} of the edit {name} must be of type {expected[key]}, "
                f"not {str(value)[:80]!r}."
            )
    return kind(**{key: _frozen(value) for key, value in values.items()})


def _frozen(value: Any) -> Any:
    """What edits hold: tuples where JSON has lists."""
    if isinstance(value, dict):
        return {key: _frozen(item) for key, item in value.items()}
    return tuple(value) if isinstance(value, list) else value


_FITS: dict[str, Callable[[Any], bool]] = {
    "str": lambda value: isinstance(value, str),
    "int": lambda value: type(value) is int,
    "float": lambda value: type(value) in (int, float),
    "bool": lambda value: type(value) is bool,
    "tuple[int, ...]": lambda value: (
        isinstance(value, list | tuple) and all(type(item) is int for item in value)
    ),
    "Spec": plain_data,
}
"""What a field of an edit may hold in a file, by its annotation; a bool is not a number."""
