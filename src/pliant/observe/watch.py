"""Looks at what flows through layers, with hooks that always come off."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pliant.cost import Example, evaluating, tensors


@contextmanager
def capture(
    model: nn.Module,
    layers: Iterable[str],
    see: Callable[[str, Tensor, Tensor], None],
    *,
    gradients: bool = False,
) -> Iterator[None]:
    """Call ``see(name, input, output)`` at every forward of the named layers, inside the block.

    The model is in eval mode meanwhile; hooks are removed and the training flags restored at the
    end, also after an exception.

    Args:
        model: any module.
        layers: names of submodules that read one tensor, however it is passed, and return one.
        see: gets the tensors as they are, part of the autograd graph if there is one; of several
            inputs the first, None where there is none.
        gradients: whether the block records gradients.
    """

    def hook(name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given: Any = next(tensors((args, kwargs)), None)
            see(name, given, output)

        return look

    handles = [
        model.get_submodule(name).register_forward_hook(hook(name), with_kwargs=True)
        for name in layers
    ]
    try:
        with evaluating(model), torch.set_grad_enabled(gradients):
            yield
    finally:
        for handle in handles:
            handle.remove()


def samples(example: Example) -> int:
    """Count the samples of a batch of inputs."""
    values = example.values() if isinstance(example, Mapping) else example
    return len(next(value for value in values if isinstance(value, Tensor)))
