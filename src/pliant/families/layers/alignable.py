"""Which layers can have aligned filters, and which batch norms can go for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from pliant.edits import Swap
from pliant.errors import ModelError
from pliant.nn.filters import WEIGHTED, filter_size
from pliant.observe.order import Order, order
from pliant.run import Run
from pliant.surgery.select import matches, weighted


def calls(run: Run) -> Order:
    """Follow the network's layers and batch norms."""
    kinds = (*WEIGHTED, _BatchNorm)
    names = [name for name, module in run.model.named_modules() if isinstance(module, kinds)]
    return order(run.model, run.example, names)


def alignable(
    run: Run, seen: Order, only: Sequence[str], exclude: Sequence[str], *, depthwise: bool
) -> list[str]:
    """Name the layers to align, and note why the others are not.

    Args:
        run: of the network.
        seen: its calls.
        only: name patterns of the layers to align.
        exclude: name patterns of those to leave alone.
        depthwise: align depthwise convolutions too.

    Raises:
        ModelError: there is none.
    """
    layers, chosen = weighted(run.model), []
    last = next((name for name in reversed(seen.called) if name in layers), "")
    for name, layer in layers.items():
        reason = "not selected" if only and not matches(name, only) else ""
        reason = reason or ("excluded by name" if matches(name, exclude) else "")
        reason = reason or _obstacle(run.model, name, layer, seen, depthwise=depthwise)
        if not reason and name == last:
            reason = "the last layer gives the scores"
        run.keep(name, reason or "its filters were aligned and folded: the shape is the same")
        chosen += [] if reason else [name]
    if not chosen:
        raise ModelError(
            "weightalign needs a convolution or Linear before the last one, but the model has "
            "none that it may align: see only and exclude."
        )
    return chosen


def without_norms(run: Run, seen: Order, layers: Sequence[str]) -> list[Swap]:
    """Take out every batch norm but those right behind layers that are not aligned.

    Args:
        run: of the network.
        seen: its calls.
        layers: those that are aligned, which get biases.
    """
    swaps, plain = [], set(weighted(run.model)) - set(layers)
    for name in seen.called:
        if not isinstance(run.model.get_submodule(name), _BatchNorm):
            continue
        if seen.reads[name] in plain:
            run.keep(name, "the layer before it is not aligned")
        else:
            swaps.append(Swap(name, "identity"))
    without = [name for name in layers if run.model.get_submodule(name).bias is None]
    return [*swaps, *(Swap(name, "biased") for name in without)]


def _obstacle(model: nn.Module, name: str, layer: Any, seen: Order, *, depthwise: bool) -> str:
    """Say why a layer cannot be aligned; nothing if it can."""
    groups = getattr(layer, "groups", 1)
    owners = [n for n, p in model.named_parameters(remove_duplicate=False) if p is layer.weight]
    reasons = {
        "never called in a forward pass": name not in seen.called,
        "its weight is parametrized: remove the parametrization first": len(owners) == 0
        or parametrize.is_parametrized(layer),
        "its weight is tied to another layer's": len(owners) > 1,
        "a depthwise filter of mean zero cannot smooth": not depthwise
        and groups == getattr(layer, "in_channels", 0) > 1,
        "a filter of one weight has no spread": filter_size(layer) < 2,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")
