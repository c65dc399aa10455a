"""Makes the layers that edits put in, from a closed table of kinds and plain settings."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pliant.errors import EditError
from pliant.math.alone import forked
from pliant.nn.catalogue import Filled, Kind, Spec
from pliant.nn.layers import in_layout_of

_SCALARS = (bool, int, float, str)


def kind_of(table: Mapping[str, type[Kind]], layer: str, form: str, spec: Spec) -> type[Kind]:
    """Return the kind of a name, after checking what is set of it.

    Raises:
        EditError: there is no such kind, or it takes other settings.
    """
    if form not in table:
        raise EditError(f"Unknown form {form!r} for {layer}: one of {', '.join(table)}.")
    wanted = table[form].spec
    if set(spec) != set(wanted):
        raise EditError(
            f"{form} for {layer} takes {', '.join(sorted(wanted)) or 'no settings'}, "
            f"not {', '.join(sorted(map(str, spec)))[:200] or 'none'}."
        )
    for name, kind in wanted.items():
        if not _is(spec[name], kind):
            raise EditError(
                f"{name} of {form} for {layer} must be of type {kind.__name__}, "
                f"not {str(spec[name])[:80]!r}."
            )
    return table[form]


def _is(value: Any, kind: type) -> bool:
    if kind is tuple:
        return isinstance(value, tuple) and all(_is(item, type(item)) for item in value)
    fits = type(value) is kind or (kind is float and type(value) is int)
    return fits and kind in _SCALARS and (not isinstance(value, float) or math.isfinite(value))


def plain(value: Any) -> bool:
    """Say whether a file may hold these settings: names and numbers, words, or lists of them."""
    return isinstance(value, dict) and all(
        isinstance(name, str)
        and all(type(i) in _SCALARS for i in (item if isinstance(item, list | tuple) else [item]))
        for name, item in value.items()
    )


def build(
    kind: type[Kind],
    model: nn.Module,
    name: str,
    spec: Spec,
    *,
    seed: int,
    weights: bool,
    freeze: bool = True,
) -> nn.Module:
    """Make a new layer for the layer of a name: on its device, in its type, layout and mode.

    Args:
        kind: of the new layer.
        model: holds the old one.
        name: of the old layer.
        spec: what is set of the new one.
        seed: of its random numbers; the random state outside stays as it is.
        weights: whether it begins with what the old layer has learned.
        freeze: whether it does not learn where the old layer does not.

    Raises:
        EditError: the kind does not fit the layer.
    """
    layer = model.get_submodule(name)
    if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention):
        raise EditError(f"{name} is never called: MultiheadAttention reads its weight directly.")
    old = list(layer.parameters())
    like = next((p for p in (*old, *model.parameters()) if p.is_floating_point()), torch.empty(0))
    try:
        with drawing(seed, name, like.device), like.device:
            new = kind.build(layer, spec)
        new.to(like.dtype).train(layer.training)
        _lay_out(new, [p for p in model.parameters() if p.dim() == 4])
        if weights and isinstance(new, Filled):
            with torch.no_grad():
                new.fill(layer)
    except EditError as error:
        raise EditError(f"{name} {error}") from None
    known = {id(parameter) for parameter in old}
    if freeze and old and not any(parameter.requires_grad for parameter in old):
        for parameter in new.parameters():
            parameter.requires_grad_(parameter.requires_grad and id(parameter) in known)
    return new


def _lay_out(new: nn.Module, kernels: list[nn.Parameter]) -> None:
    """Keep 2-d kernels in channels_last where a network has its own so."""
    dense = next((kernel for kernel in kernels if not kernel.is_contiguous()), None)
    if dense is not None:
        for kernel in [p for p in new.parameters() if p.dim() == 4]:
            kernel.data = in_layout_of(dense, kernel.data)


@contextmanager
def drawing(seed: int, name: str, device: torch.device | None = None) -> Iterator[None]:
    """Draw random numbers that depend on the seed and the name only."""
    devices = [device] if device is not None and device.type == "cuda" else []
    with forked(devices, zlib.crc32(f"{seed} {name}".encode())):
        yield
