"""Prepares a copy of a network for exporters, which write fewer outputs and operators."""

from __future__ import annotations

from contextlib import suppress
from functools import wraps
from typing import Any

from torch import nn

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
