"""Prepares a copy of a network for exporters, which write fewer outputs and operators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from pliant.cost import Example, call_alike
from pliant.observe.outputs import without_caches


def traceable(network: nn.Module, batch: Example) -> None:
    """Let a copy give what exporters can write, in place.

    Keys and values that it keeps for its next call are left out; experts of Transformers are
    computed by a product for which ONNX has an operator.

    Args:
        network: a copy, in evaluation.
        batch: inputs of one forward call.
    """
    for module in network.modules():
        choose = getattr(module, "set_experts_implementation", None)
        if callable(choose):
            with suppress(Exception):  # it knows no other way, or has no experts
                choose("batched_mm")
    output = call_alike(network, batch)
    if without_caches(output) is output:
        return
    compute = network.forward

    @wraps(compute)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return without_caches(compute(*args, **kwargs))

    network.forward = forward


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
