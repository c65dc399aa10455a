"""What goes wrong on purpose: spoilt inputs, and networks that fail in the middle of a training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def must_fail(action: Callable[[], object], what: str) -> None:
    """Call what must raise."""
    try:
        action()
    except Exception:  # which one is the loop's affair
        return
    raise AssertionError(f"{what} went through without an error")


def spoilt(inputs: Any) -> Any:
    """Return inputs with NaN in the place of their numbers."""
    if isinstance(inputs, Tensor):
        return inputs * math.nan if inputs.is_floating_point() else inputs
    if isinstance(inputs, Mapping):
        return {name: spoilt(value) for name, value in inputs.items()}
    return type(inputs)(spoilt(value) for value in inputs)


@contextmanager
def failing(model: nn.Module) -> Iterator[None]:
    """Let the third training step of a model raise, as running out of memory would."""
    forward, calls = model.forward, [0]

    def raising(*args: Any, **kwargs: Any) -> Any:
        calls[0] += model.training
        if calls[0] == 3:
            raise RuntimeError("out of memory")
        return forward(*args, **kwargs)

    model.forward = raising
    try:
        yield
    finally:
        del model.forward
