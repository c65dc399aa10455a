"""Measures of work that no clock takes part in: calls of functions, bytes that are allocated."""

import sys
import tracemalloc
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def calls(work: Callable[[], object]) -> int:
    """Count the calls of functions that some work takes: a measure of time without a clock."""
    count = 0

    def see(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(see)
    try:
        work()
    finally:
        sys.setprofile(before)
    return count


def most(work: Callable[[], object]) -> int:
    """Measure the most bytes of objects and arrays, not of tensors, that some work holds."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


class _Largest(TorchDispatchMode):
    """Looks at every tensor that an operation makes."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return made


def largest(work: Callable[[], object]) -> int:
    """Measure the bytes of the largest tensor that some work makes."""
    with _Largest() as seen:
        work()
    return seen.bytes
