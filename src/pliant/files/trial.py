"""The edits of a file are tried on shapes before a model is touched, and bounded as they go.

A file comes from anywhere: what a network made of it takes at any time is bounded by what is
there already, the dense network and the bytes of the file.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from pliant.cost import twin
from pliant.edits import Insert, Settle, Swap, Widen, layer_of, replay
from pliant.errors import ArtifactError
from pliant.files.manifest import Manifest

MOST_LEVELS = 64  # dots in a name
FEW_EDITS, MOST_EDITS = 2000, 32  # edits of any model, and more for each of its modules
MOST_MODULES = 8  # for each module of the model and each tensor of the file
GROWN, SLACK = 4, 2**20  # a network takes at most as often the bytes of the dense one and the file


def tried(
    manifest: Manifest,
    built: nn.Module,
    model: nn.Module | Callable[[], nn.Module] | None,
    *,
    most: int,
) -> nn.Module:
    """Return what the edits make of a network, on shapes alone; the network stays as it is.

    Args:
        manifest: of the file.
        built: the dense network.
        model: it, or the function that built it.
        most: bytes that it may take at any time.

    Raises:
        ArtifactError: part of a sentence about the file: what is wrong with it.
        EditError: an edit does not fit.
    """
    trial = _trial(manifest, built, model)
    _check_edits(manifest, trial)
    _replay(manifest, trial, most=most)
    return trial


def bound(path: Path, built: nn.Module) -> int:
    """Return the bytes that a network may take at any time: in proportion to what is there."""
    dense = sum(t.nbytes for t in (*built.parameters(), *built.buffers()))
    return GROWN * (dense + path.stat().st_size) + SLACK


def _check_edits(manifest: Manifest, model: nn.Module) -> None:
    """Refuse edits that would keep a small model busy without end."""
    most = FEW_EDITS + MOST_EDITS * sum(1 for _ in model.modules())
    deep = any(edit.layer.count(".") > MOST_LEVELS for edit in manifest.edits)
    if len(manifest.edits) > most or deep:
        raise ArtifactError(
            f"has {len(manifest.edits):,} edits, more or deeper ones than this "
            f"{type(model).__name__} has layers for: it was made from another architecture."
        )


def _trial(
    manifest: Manifest, built: nn.Module, model: nn.Module | Callable[[], nn.Module] | None
) -> nn.Module:
    """Return what edits are tried on first: shapes, lest a model is spoilt or fills the memory.

    Args:
        manifest: of the file.
        built: the dense network.
        model: it, or the function that built it: that is called for shapes alone, where the
            network cannot be copied.
    """
    try:
        return _without_data(built)
    except ArtifactError:
        if isinstance(model, nn.Module) or not callable(model):
            raise
    try:
        with torch.device("meta"):
            return model()
    except Exception as error:  # somebody's function may ask a tensor for its numbers
        if any(isinstance(edit, Insert | Settle | Swap | Widen) for edit in manifest.edits):
            raise ArtifactError(
                "has edits that let a network grow, which are tried on shapes alone, but this "
                f"{type(built).__name__} can neither be copied nor built on the meta device "
                f"({type(error).__name__}): make one of both possible."
            ) from error
        return built


def _replay(manifest: Manifest, trial: nn.Module, *, most: int) -> None:
    """Replay the edits, and stop where a network would become larger than it can honestly be."""
    modules = sum(1 for _ in trial.modules())
    many = MOST_MODULES * (modules + len(manifest.tensors))
    size = _size(trial)[0]
    for edit in manifest.edits:
        if (claim := _claim(edit)) > most:
            raise _harmful(f"{claim:,} numbers at {edit.layer}", most)
        part = layer_of(trial, edit.layer)
        before = _size(part)
        replay(trial, [edit], weights=False)
        after = _size(layer_of(trial, edit.layer))
        size, modules = size + after[0] - before[0], modules + after[1] - before[1]
        if modules > many:
            raise ArtifactError(f"asks for more than {many:,} modules: it was made to do harm.")
        if size > most:
            raise _harmful(f"{size:,} bytes at {edit.layer}", most)


def check_bytes(manifest: Manifest, most: int) -> None:
    """Refuse tensors that take more than a network may.

    Raises:
        ArtifactError: part of a sentence about the file.
    """
    if manifest.bytes > most:
        raise _harmful(f"{manifest.bytes:,} bytes of tensors", most)


def _harmful(what: str, most: int) -> ArtifactError:
    return ArtifactError(
        f"asks for {what}, and {most:,} bytes are possible with a file and a dense network of this "
        "size: it is damaged or made to do harm."
    )


def _size(module: nn.Module) -> tuple[int, int]:
    """Count the bytes of all tensors within a module, and its modules."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(t.nbytes for t in tensors), sum(1 for _ in module.modules())


def _claim(edit: Any) -> int:
    """Return how many numbers an edit asks for at least, by its settings alone."""
    if isinstance(edit, Settle):
        return edit.sizes
    if not isinstance(edit, Insert | Swap):
        return 0
    whole = {name: n for name, n in edit.spec.items() if type(n) is int}
    rows = max(whole.get("channels", 0), whole.get("features", 0))
    taps = whole.get("kernel", 1) ** max(0, min(3, whole.get("dims", 1)))
    return max(rows * rows * taps, whole.get("of", 0))


def _without_data(model: nn.Module) -> nn.Module:
    """Copy a model with the shapes of its tensors only: nothing is allocated."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
            raise ArtifactError("is loaded into layers with shapes: run the model once before.")
        empty = torch.empty_like(tensor, device="meta")
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = empty
    try:
        return twin(model, memo)
    except Exception as error:  # a model's own attributes may refuse to be copied in any way
        raise ArtifactError(
            f"needs a model that copy.deepcopy can copy, and this one fails ({error}): pass the "
            "function that builds it instead of the model."
        ) from error
