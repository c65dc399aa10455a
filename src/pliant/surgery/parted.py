"""Sees where a network cuts a tensor in equal parts: their middle moves when channels leave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_CUTS = {
    *(torch.chunk, Tensor.chunk, torch.split, Tensor.split),
    *(torch.tensor_split, Tensor.tensor_split),
}


class Parted(TorchFunctionMode):
    """Calls ``see(parts, axis)`` wherever a tensor is cut in equal parts, not along its first axis.

    Args:
        see: gets the parts and the axis along which they lay side by side.
    """

    def __init__(self, see: Callable[[Sequence[Tensor], int], None]) -> None:
        super().__init__()
        self.see = see

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call the function, and look at its parts."""
        found = func(*args, **(kwargs or {}))
        if func in _CUTS and len(found) > 1:
            whole: Tensor = args[0] if args else kwargs["input"]
            axes = [
                axis
                for axis, size in enumerate(whole.shape)
                if axis and all(size == len(found) * part.shape[axis] for part in found)
            ]
            if len(axes) == 1:
                self.see(found, axes[0])
        return found
