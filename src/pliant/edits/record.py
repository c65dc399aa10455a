"""What has been done to a network goes with it, so that a file of it can tell."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from typing import Any

from torch import nn

from pliant.edits.edit import LAYER, Edit, Replaced
from pliant.errors import EditError

_RECORD = "_edits_made"  # an attribute of the module whose layers the edits name


def apply(model: nn.Module, edit: Edit, *, weights: bool = True) -> Replaced:
    """Change a model, and note in it that this was done.

    Raises:
        EditError: the edit does not fit the model.
    """
    replaced = edit.apply(model, weights=weights)
    setattr(model, _RECORD, (*vars(model).get(_RECORD, ()), _plan(edit)))
    return replaced


def note(model: nn.Module, edits: Iterable[Edit]) -> None:
    """Let a model say that these edits, and no others, have been made of it."""
    setattr(model, _RECORD, tuple(_plan(edit) for edit in edits))


def forget(model: nn.Module) -> None:
    """Let a copy of a part of a model not say what was made of the part itself."""
    for module in model.modules():
        vars(module).pop(_RECORD, None)


def made(model: nn.Module) -> tuple[Edit, ...]:
    """Return all edits that made a model, and the modules it was put together from, in order."""
    found: list[Edit] = []
    for name, module in model.named_modules():
        if name:
            found += [_inside(name, edit) for edit in vars(module).get(_RECORD, ())]
    return (*found, *vars(model).get(_RECORD, ()))


def complete(model: nn.Module, edits: Sequence[Edit]) -> tuple[Edit, ...]:
    """Put those edits before some that were made of a model before them.

    Args:
        model: as all edits have made it.
        edits: the last ones, or all.

    Raises:
        EditError: others have been made of the model, after these or instead of them.
    """
    given, known = tuple(_plan(edit) for edit in edits), made(model)
    if known[max(0, len(known) - len(given)) :] == given:
        return (*known[: max(0, len(known) - len(given))], *edits)
    # What was changed by hand, before or after, is known to the caller only.
    if known in (given[: len(known)], given[len(given) - len(known) :]):
        return tuple(edits)
    raise EditError(
        f"The network was made by {len(known)} edits, of which the {len(given)} given ones are "
        "not the last: pass those of its last compression."
    )


def _plan(edit: Any) -> Any:
    """The edit without its tensors."""
    return replace(edit, **{f.name: None for f in fields(edit) if not f.compare})


def _inside(name: str, edit: Any) -> Any:
    """The same edit, for a model of which the edited one is a part."""
    own = [f.name for f in fields(edit) if f.name == "layer" or f.metadata.get(LAYER)]
    paths = {field: f"{name}.{getattr(edit, field)}".rstrip(".") for field in own}
    return replace(edit, **paths)
