"""Chooses layers by kind, by name, and by what can be done with them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial

from torch import nn

from pliant.errors import MethodError
from pliant.nn.filters import WEIGHTED
from pliant.nn.layers import KERNELS, Factorizable, obstacle, shared_weights, unreadable

UNCALLED = "never called in a forward pass"
READ = "{} reads this weight directly"


def factorizable(
    model: nn.Module,
    *,
    only: Sequence[str] = (),
    exclude: Sequence[str] = (),
    every: bool = False,
) -> tuple[dict[str, Factorizable], dict[str, str]]:
    """Split the weighted layers into those that can be factorized and the rest, with reasons.

    Args:
        model: any module.
        only: shell patterns of layer names to consider; none means all.
        exclude: shell patterns of layer names to leave alone.
        every: see `pliant.nn.layers.obstacle`.

    Returns:
        The factorizable layers by name, and for every other weighted layer why it is not.

    Raises:
        MethodError: a pattern matches no layer.
    """
    kinds = (*KERNELS, nn.Embedding, nn.EmbeddingBag)
    return _split(model, only, exclude, partial(obstacle, every=every), kinds)


def readable(
    model: nn.Module,
    *,
    only: Sequence[str] = (),
    exclude: Sequence[str] = (),
    every: bool = False,
) -> tuple[dict[str, Factorizable], dict[str, str]]:
    """Split the weighted layers into those whose weight may be read and replaced, and the rest.

    Like `factorizable`, but grouped layers and layers of a single channel are among them; with
    ``every`` transposed convolutions too, for what reads weights by `pliant.nn.kinds.to_rows`.
    """
    return _split(model, only, exclude, partial(unreadable, every=every))


def _split(
    model: nn.Module,
    only: Sequence[str],
    exclude: Sequence[str],
    why_not: Callable[[nn.Module, str, dict[int, list[str]]], str | None],
    kinds: tuple[type[nn.Module], ...] = KERNELS,
) -> tuple[dict[str, Factorizable], dict[str, str]]:
    layers: dict[str, Factorizable] = {}
    reasons: dict[str, str] = {}
    shared = shared_weights(model)
    weighted = {n: module for n, module in model.named_modules() if isinstance(module, kinds)}
    check_names(weighted, (*only, *exclude))
    for name, module in weighted.items():
        if only and not matches(name, only):
            reasons[name] = "not selected"
        elif matches(name, exclude):
            reasons[name] = "excluded by name"
        elif reason := why_not(model, name, shared):
            reasons[name] = reason
        else:
            layers[name] = module  # type: ignore[assignment]
    return layers, reasons


def leave_unused(
    layers: dict[str, Factorizable],
    reasons: dict[str, str],
    called: Collection[str],
    readers: Mapping[str, str],
) -> None:
    """Move layers whose weight others read, or that are never called, to those left alone.

    Args:
        layers: by name; changed in place, as the reasons are.
        reasons: why others are left alone.
        called: names of the layers that forward passes call.
        readers: what `pliant.observe.readers` found.
    """
    for name in list(layers):
        if name in readers or name not in called:
            del layers[name]
            reasons[name] = READ.format(readers[name]) if name in readers else UNCALLED


def weighted(
    model: nn.Module, only: Sequence[str] = (), exclude: Sequence[str] = ()
) -> dict[str, nn.Module]:
    """Return the convolutions and linear layers whose names fit.

    Args:
        model: any module.
        only: shell patterns of names to take; none means all.
        exclude: shell patterns of names to leave out.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, WEIGHTED)
        and (not only or matches(name, only))
        and not matches(name, exclude)
    }


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Say whether a name fits one of several shell patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def check_patterns(model: nn.Module, patterns: Sequence[str]) -> None:
    """Refuse a pattern that no convolution or linear layer fits.

    Raises:
        MethodError: a pattern matches nothing.
    """
    check_names(weighted(model), patterns)


def check_names(names: Iterable[str], patterns: Sequence[str]) -> None:
    """Refuse a pattern that no layer of these names fits.

    Raises:
        MethodError: a pattern matches nothing.
    """
    known = list(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise MethodError(
                f"The layer pattern {pattern!r} matches none of the model's layers: "
                f"they are {', '.join(known[:8])}{' and more' if len(known) > 8 else ''}."
            )
