"""Which layers can be read and replaced, and how a layer takes the place of another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

Factorizable = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear


_PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_REVERSED = (*_TRANSPOSED, nn.Embedding)
"""Kinds that can be factorized, whose weight has its inputs first."""


KERNELS = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.MultiheadAttention, nn.RNNBase)


Shared = dict[int, list[str]]
"""The names of every parameter that several layers have, by its identity."""


_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook"),
)


def obstacle(
    model: nn.Module, name: str, shared: Shared | None = None, *, every: bool = False
) -> str | None:
    """Say why the layer of this name cannot be factorized, or None if it can.

    Args:
        model: holds the layer.
        name: of the layer.
        shared: what `shared_weights` gives, where many layers are asked about.
        every: whether transposed convolutions and tables, whose weights have their inputs first,
            can be: a method that only replaces layers takes them.

    Raises:
        AttributeError: the model has no such module.
    """
    module: Any = model.get_submodule(name)
    if name and type(module) in _REVERSED and not parametrize.is_parametrized(module):
        reason = _reversed_obstacle(module, every=every)
        if not reason and not heads_of(model, name, shared):
            reason = _own(model, name, shared)
    else:
        reason = unreadable(model, name, shared)
    if reason and isinstance(module, nn.RNNBase):
        return f"{reason}, which takes them whole and not as factors"
    if reason:
        return reason
    if getattr(module, "groups", 1) != 1:
        return "a grouped convolution has no cross-channel rank"
    if min(module.weight.shape[:2]) < 2:
        return "a single channel has no rank to lower"
    return None


def heads_of(model: nn.Module, name: str, shared: Shared | None = None) -> list[str]:
    """Return the plain Linear layers whose weight is that of a table, if nothing else has it.

    Args:
        model: holds the layers.
        name: of the table.
        shared: what `shared_weights` gives, where many layers are asked about.
    """
    table: Any = model.get_submodule(name)
    if type(table) is not nn.Embedding:
        return []
    tied = shared_weights(model) if shared is None else shared
    owners = tied.get(id(table.weight), ())
    others = [other.rpartition(".")[0] for other in owners if other != f"{name}.weight"]
    plain = all(type(model.get_submodule(other)) is nn.Linear for other in others)
    return others if plain else []


def _reversed_obstacle(module: Any, *, every: bool) -> str | None:
    """Say why a layer whose weight has its inputs first cannot be factorized."""
    if not every:
        kind = type(module).__name__
        return (
            f"{kind} is factorized once, by energy, evbmf, nrmf, trp or cuttlefish: this method "
            "changes the ranks of factors afterwards, which it can of no layer with inputs first"
        )
    if getattr(module, "max_norm", None) is not None:
        return "its rows are scaled to max_norm while they are looked up"
    if getattr(module, "sparse", False) or getattr(module, "scale_grad_by_freq", False):
        return "its gradients are those of single rows, which a factorized table has not"
    return None


def unreadable(
    model: nn.Module, name: str, shared: Shared | None = None, *, every: bool = False
) -> str | None:
    """Say why the weight of the layer of this name cannot be read and replaced, None if it can.

    Args:
        model: holds the layer.
        name: of the layer.
        shared: what `shared_weights` gives, where many layers are asked about.
        every: whether those of transposed convolutions, which have their inputs first, can be.

    Raises:
        AttributeError: the model has no such module.
    """
    module: Any = model.get_submodule(name)
    if not name:
        return "the model is this single layer: wrap it in nn.Sequential"
    if parametrize.is_parametrized(module):
        return "its weight is parametrized: remove the parametrization first"
    if type(module) not in ((*_PLAIN, *_TRANSPOSED) if every else _PLAIN):
        return _foreign(module)
    if reason := unowned(module):
        return reason
    if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention):
        return "MultiheadAttention reads this weight directly"
    return _own(model, name, shared)


def _own(model: nn.Module, name: str, shared: Shared | None) -> str | None:
    """Say why the weight of a layer is not its own, or no matrix of real numbers."""
    module: Any = model.get_submodule(name)
    if not module.weight.is_floating_point():
        return f"its weight is of {str(module.weight.dtype).removeprefix('torch.')}, not real"
    tied = shared_weights(model) if shared is None else shared
    owners = tied.get(id(module.weight), ())
    if others := [other for other in owners if other != f"{name}.weight"]:
        return f"its weight is tied to {others[0]}"
    return None


def shared_weights(model: nn.Module) -> Shared:
    """Return the names of all parameters that more than one layer has.

    A layer that is registered under several names is one layer.
    """
    owners: dict[int, list[tuple[str, str]]] = {}
    for path, module in model.named_modules():
        for child, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((path, child))
    several = ((key, places) for key, places in owners.items() if len(places) > 1)
    return {key: [".".join(place).lstrip(".") for place in places] for key, places in several}


def _foreign(module: nn.Module) -> str:
    """Say why a layer of a class that is none of the plain ones is left alone."""
    kind = type(module).__name__
    if isinstance(module, nn.MultiheadAttention):
        return "its projections are packed in one tensor, which was not split"
    if isinstance(module, nn.RNNBase):
        return f"{kind} multiplies its matrices within one fused operation, step by step"
    if isinstance(module, nn.EmbeddingBag):
        return f"{kind} sums rows while it looks them up, and has no factorized form here"
    if type(module) in _TRANSPOSED:
        return f"{kind} has its inputs first: its weight cannot be read as that of a convolution"
    if isinstance(module, (*_PLAIN, *_REVERSED)):
        return f"{kind} computes something else than its base class"
    if next(module.parameters(), None) is None:
        return f"{kind} has no weights"
    return f"{kind} uses its weight in a way of its own"


def unowned(module: Any) -> str | None:
    """Say why the weight of a layer is no parameter of its own, or None if it is one."""
    if isinstance(getattr(module, "weight", None), nn.Parameter):
        return None
    if "weight" in module._buffers:
        return "its weight is a buffer, which nothing trains: make it a parameter first"
    return "its weight is computed by a forward-pre hook: remove it first"


def in_layout_of(dense: Tensor, kernel: Tensor) -> Tensor:
    """Keep 2-d kernels in channels_last, where the dense one is: that is faster on many CPUs."""
    if dense.dim() == 4 and not dense.is_contiguous():
        return kernel.contiguous(memory_format=torch.channels_last)
    return kernel


def drop_hooks(model: nn.Module) -> None:
    """Take all hooks of calls out of a model and its parts: a copy has no handles for them."""
    for module in model.modules():
        for kind in _HOOKS:
            held = getattr(module, kind)
            if isinstance(held, dict):
                held.clear()


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place of the submodule called ``name``, under all names that it has.

    Hooks of the old layer go on with the new one, and their handles stay good. The transformer
    blocks around it leave their fused inference path, which would read the weight of a layer that
    is no longer there; the plain path computes the same.
    """
    *path, _ = name.split(".")
    old = model.get_submodule(name)
    if not any(part is old for part in module.modules()):
        for kind in _HOOKS:
            setattr(module, kind, getattr(old, kind))
    for parent in list(model.modules()):
        for child, layer in list(parent._modules.items()):
            if layer is old and parent is not module:
                setattr(parent, child, module)
    for depth in range(len(path) + 1):
        around = model.get_submodule(".".join(path[:depth]))
        if isinstance(around, nn.TransformerEncoderLayer):
            around.activation_relu_or_gelu = 0  # PyTorch's own sign for "cannot be fused"
        if isinstance(around, nn.TransformerEncoder):
            around.use_nested_tensor = False
