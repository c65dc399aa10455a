"""Picks a size of an elastic network when its file is loaded: no data, no training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import nn

from pliant import artifact, elastic
from pliant.budget import Budget
from pliant.cost import Example
from pliant.errors import ArtifactError, ModelError
from pliant.latency import Target, measure
from pliant.ops.edits import Nest


def load_at(
    path: str | Path,
    model: nn.Module | Callable[[], nn.Module] | None,
    at: Budget | str | float,
    *,
    example: Example = (),
    target: Target | None = None,
) -> nn.Module:
    """Rebuild the largest size of an elastic network that a budget allows.

    Args:
        path: a file of an elastic network.
        model: the dense architecture, or a function that builds it.
        at: a budget, or a share of the dense network's parameters.
        example: inputs of one forward call, to count multiply-accumulates and to measure.
        target: where milliseconds are measured; PyTorch here if None.

    Raises:
        ArtifactError: the file holds one size only, or what `artifact.load` raises.
        BudgetError: even the smallest size is too large.
        ModelError: the budget bounds what cannot be known without an example.
    """
    budget = _budget(at)
    if {"macs", "latency"} & set(budget.given()) and not example:
        raise ModelError(
            f"A size for {', '.join(budget.given())} needs the inputs of one forward call: pass "
            "example=(inputs,), or bound params or bytes."
        )
    edits = artifact.inspect(path).edits
    if not any(isinstance(edit, Nest) for edit in edits):
        raise ArtifactError(
            f"{path} holds a network of one size: leave at= out, or compress with 'elastic'."
        )
    place = target or Target("torch")
    network = model() if callable(model) and not isinstance(model, nn.Module) else model
    if not isinstance(network, nn.Module):
        return artifact.load(path, network)  # which says what it needs
    dense = elastic.counted(network, example)
    if budget.latency is not None:
        dense = replace(dense, latency_ms=measure(network, example, place).median_ms)
    loaded = artifact.load(path, network)

    def milliseconds(size: int) -> float:
        smaller = copy.deepcopy(loaded)
        elastic.shrink(smaller, edits, size)
        return measure(smaller, example, place).median_ms

    sizes = elastic.costs(loaded, edits, example)
    elastic.shrink(loaded, edits, elastic.choose(sizes, budget, dense, milliseconds))
    return loaded


def _budget(at: Budget | str | float) -> Budget:
    if isinstance(at, str):
        return Budget.parse(at)
    return at if isinstance(at, Budget) else Budget(params=at)
