"""Weights that are rounded while they train, straight through: gradients move what is not rounded.

The network always holds the rounded weights, so a search, a score and a file see what is shipped.
What they are rounded from lies in the state of the run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pliant.math.quantize import span_grid, unit_grid
from pliant.run import Run

KEY = "exact"


def weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights of all convolutions and linear layers by name, shared ones once."""
    found: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules():
        layer: Any = module
        if type(layer) in (nn.Conv2d, nn.Linear):
            found.setdefault(f"{name}.weight", layer.weight)
    return found


@torch.no_grad()
def begin(run: Run, bits: int) -> None:
    """Keep all weights, and round them."""
    found = weights(run.model)
    run.state[KEY] = {name: weight.detach().clone() for name, weight in found.items()}
    for weight in found.values():
        weight.copy_(unit_grid(weight, bits))


@torch.no_grad()
def follow(run: Run, bits: int) -> None:
    """Move what was kept as the optimizer has moved the rounded weights, and round anew."""
    exact = run.state[KEY]
    for name, weight in weights(run.model).items():
        exact[name] += weight - unit_grid(exact[name], bits)
        weight.copy_(unit_grid(exact[name], bits))


@torch.no_grad()
def after(model: nn.Module, bits: int) -> None:
    """Round the convolutions of a trained network between their least and largest weight."""
    for module in model.modules():
        if type(module) is nn.Conv2d:
            module.weight.copy_(span_grid(module.weight, bits))


def end(run: Run, bits: int, *, now: bool) -> None:
    """Forget what weights were rounded from, and note how many bytes they take.

    Args:
        run: whose training is over.
        bits: of a weight, 0 if none was rounded.
        now: round at this moment, by `after`.
    """
    if bits and now:
        after(run.model, bits)
    run.state.pop(KEY, None)
    run.note(memory=memory(run.model, bits or 32), bits=bits)


def memory(model: nn.Module, bits: int) -> float:
    """Return the bytes of all weights at so many bits each."""
    return sum(weight.numel() for weight in weights(model).values()) * bits / 8
