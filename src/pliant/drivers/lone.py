"""A last batch of one sample, in which batch norms have nothing to take a variance of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def with_statistics(model: nn.Module) -> Iterator[None]:
    """Let batch norms use their running statistics where a channel has a single number.

    PyTorch refuses to train a batch norm on it. Norms that see more, and those without
    statistics, stay as they are.
    """
    resting: list[nn.Module] = []

    def rest(module: nn.Module, args: Any) -> None:
        given = args[0] if args else None
        single = isinstance(given, Tensor) and given.numel() == given.shape[1]
        if single and module.training and module.running_mean is not None:
            module.training = False
            resting.append(module)

    def wake(module: nn.Module, args: Any, output: Any) -> None:
        if module in resting:
            resting.remove(module)
            module.training = True

    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                hooks.callback(module.register_forward_pre_hook(rest).remove)
                hooks.callback(module.register_forward_hook(wake, always_call=True).remove)
        yield
