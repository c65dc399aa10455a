"""Divides a network into blocks that can be fitted one by one: residual blocks, or layers."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable

from torch import Tensor, nn

from pliant.cost import Example, call
from pliant.observe.watch import capture

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def blocks(
    model: nn.Module, layers: Collection[str], example: Example, batches: Iterable[Example] = ()
) -> list[str]:
    """Name disjoint modules that together hold all the layers that a forward pass calls.

    A block is an innermost module with a forward of its own (a residual block, a transformer
    layer) that holds some of the layers and gives one tensor. Containers and the model itself
    are divided; layers that lie in no block are blocks of their own.

    Args:
        model: any module; it stays as it is.
        layers: names of the layers that matter.
        example: inputs of one forward call.
        batches: more inputs, looked at as far as needed to see all layers called.
    """
    called: dict[str, bool] = {}  # whether it gives one tensor
    names = [name for name, _ in model.named_modules() if name]

    def see(name: str, inputs: object, output: object) -> None:
        called[name] = isinstance(output, Tensor)

    for inputs in itertools.chain([example], batches):
        with capture(model, names, see):
            call(model, inputs)
        if called.keys() >= set(layers):
            break
    return _divided(model, "", set(layers), called)


def _divided(module: nn.Module, name: str, layers: set[str], called: dict[str, bool]) -> list[str]:
    if name in layers:
        return [name] if called.get(name) else []
    inside = [layer for layer in layers if layer.startswith(f"{name}." if name else "")]
    if not inside:
        return []
    whole = called.get(name) and not isinstance(module, _CONTAINERS)
    if name and whole and not _composite(module, name, inside):
        return [name]
    found = []
    for child, part in module.named_children():
        found += _divided(part, f"{name}.{child}" if name else child, layers, called)
    return found


def _composite(module: nn.Module, name: str, inside: list[str]) -> bool:
    """Say whether another module with a forward of its own, inside this one, holds layers."""
    return any(
        not isinstance(part, _CONTAINERS)
        and any(layer.startswith(f"{name}.{path}.") for layer in inside)
        for path, part in module.named_modules()
        if path
    )
