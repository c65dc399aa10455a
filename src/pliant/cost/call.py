"""Calls a network: with an example, on its own device, in eval mode."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

_WRAPPED = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
}
"""Classes of wrappers, and where each keeps the network; by name, to load neither."""

Example = tuple[Any, ...] | Mapping[str, Any]


def call(model: nn.Module, example: Example) -> Any:
    """Call a model with an example: a mapping as keyword arguments, a tuple as positions.

    Its tensors go to the device of the model, which may have moved since the example was made.
    They are copied, since a model may write into what it reads.
    """
    device = next((t.device for t in chain(model.parameters(), model.buffers())), None)

    def move(value: Any) -> Any:
        return value.to(device, copy=True) if isinstance(value, Tensor) else value

    if isinstance(example, Mapping):
        return model(**tree_map(move, dict(example)))
    return model(*tree_map(move, tuple(example)))


def tensors(value: Any) -> Iterator[Tensor]:
    """Go through the tensors of a nested value, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors(item)


def bare(model: nn.Module) -> nn.Module:
    """Return the network itself, out of what torch.compile or data parallelism put around it."""
    while isinstance(inner := getattr(model, _inside(model), None), nn.Module):
        model = inner
    return model


def _inside(model: nn.Module) -> str:
    return _WRAPPED.get(type(model).__name__, "")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Keep a model in eval mode inside the block; every flag is put back, also on an error."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in flags:
            module.training = False  # not eval(), which a model may have made its own
        yield
    finally:
        for module, training in flags:
            module.training = training
