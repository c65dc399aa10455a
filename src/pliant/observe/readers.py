"""Finds weights that are read by other modules than the one that owns them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pliant.cost import Example, call, evaluating, tensors


def readers(model: nn.Module, example: Example) -> dict[str, str]:
    """Return the layers whose weight another module reads, and the class of that module.

    An autoencoder may decode by the transposed weight of its encoder, an attention may multiply
    by the weight of a projection that is never called: such a layer cannot be replaced by
    others. One forward pass shows them.

    Args:
        model: any module.
        example: inputs of one forward call.
    """
    owners = {
        id(parameter): (name, module)
        for name, module in model.named_modules()
        for parameter in module.parameters(recurse=False)
    }
    stack: list[nn.Module] = []
    found: dict[str, str] = {}

    def see(tensor: Tensor) -> None:
        name, owner = owners.get(id(tensor), ("", None))
        if owner is not None and stack and not any(one is owner for one in stack):
            found.setdefault(name, type(stack[-1]).__name__)

    with ExitStack() as hooks, evaluating(model), torch.no_grad():
        for module in model.modules():
            enter = module.register_forward_pre_hook(_entering(stack))
            leave = module.register_forward_hook(_leaving(stack), always_call=True)
            hooks.callback(enter.remove)
            hooks.callback(leave.remove)
        with _Watching(see):
            call(model, example)
    return found


def _entering(stack: list[nn.Module]) -> Callable[..., None]:
    return lambda module, args: stack.append(module)


def _leaving(stack: list[nn.Module]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        stack.pop()

    return hook


class _Watching(TorchFunctionMode):
    """Shows the tensors that functions read; what only asks for a shape or a type reads nothing."""

    def __init__(self, see: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.see = see

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if next(tensors(output), None) is not None:
            for tensor in tensors((args, kwargs or {})):
                self.see(tensor)
        return output
