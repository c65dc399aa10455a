"""Prepares a copy of a network for exporters, which write fewer outputs and operators."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pliant.cost import Example, call_alike, tensors
from pliant.observe.outputs import without_caches

_MANY = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
ROUNDINGS = 8  # in units of the precision: how far two runtimes may be apart in 16 bits


def traceable(network: nn.Module, batch: Example) -> None:
    """Let a copy give what exporters can write, in place.

    Keys and values that it keeps for its next call are left out; experts of Transformers are
    computed by a product for which ONNX has an operator. An exporter is told every input by name.

    Args:
        network: a copy, in evaluation.
        batch: inputs of one forward call.
    """
    for module in network.modules():
        choose = getattr(module, "set_experts_implementation", None)
        if callable(choose):
            with suppress(Exception):  # it knows no other way, or has no experts
                choose("batched_mm")
    output, compute = call_alike(network, batch), network.forward
    named = _signature(compute, batch)
    if written(output) is output and named is None:
        return

    @wraps(compute)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return written(compute(*args, **kwargs))

    if named is not None:
        vars(forward)["__signature__"] = named
    network.forward = forward


def written(output: Any) -> Any:
    """Return an output as exporters can write it; itself, if it is so already.

    What a network keeps for its next call is left out. Where there are numbers, words or objects
    of classes that PyTorch cannot look into, such as dataclasses, the tensors alone are taken.
    """
    kept = without_caches(output)
    plain = all(leaf is None or isinstance(leaf, Tensor) for leaf in tree_leaves(kept))
    return kept if plain else _tensors_of(kept)


def _tensors_of(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, list | tuple):
        return tuple(_tensors_of(part) for part in value if _holds(part))
    parts = value if isinstance(value, Mapping) else getattr(value, "__dict__", {})
    return {name: _tensors_of(part) for name, part in parts.items() if _holds(part)}


def _holds(value: Any) -> bool:
    return not isinstance(value, nn.Module | type) and any(True for _ in tensors(value))


def _signature(compute: Any, batch: Example) -> Signature | None:
    """Name every input of a forward that takes ``*args`` or ``**kwargs``; None for any other."""
    known = list(signature(compute).parameters.values())
    many = [each for each in known if each.kind in _MANY]
    if not many:
        return None
    own = [each.name for each in known if each.kind not in _MANY]
    given = range(len(own), len(batch))
    names = list(batch) if isinstance(batch, Mapping) else own + [f"input_{i}" for i in given]
    kind = Parameter.POSITIONAL_OR_KEYWORD
    return Signature([Parameter(name, kind) for name in names[: len(batch)]])


def coarse(network: nn.Module) -> float:
    """Return the share of the largest output that 16 bits leave open; 0 for networks of more."""
    narrow = {p.dtype for p in network.parameters() if p.is_floating_point() and p.itemsize == 2}
    return max((ROUNDINGS * torch.finfo(dtype).eps for dtype in narrow), default=0.0)


@contextmanager
def four_axes() -> Iterator[None]:
    """Let attention over more than four axes be computed over four: exporters write no other."""
    compute = F.scaled_dot_product_attention

    @wraps(compute)
    def attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **more: Any) -> Tensor:
        mask = args[0] if args else more.get("attn_mask")
        if query.dim() < 5 or mask is not None:
            return compute(query, key, value, *args, **more)
        before = query.shape[:-2]
        q, k, v = (each.flatten(0, -4) for each in (query, key, value))
        return compute(q, k, v, *args, **more).reshape(*before, query.shape[-2], value.shape[-1])

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = compute
