"""Sees where a network cuts an axis of a tensor: in equal parts, or into heads and their width.

And whether it calls any function that might take not-a-number out on its way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_CUTS = {
    *(torch.chunk, Tensor.chunk, torch.split, Tensor.split),
    *(torch.tensor_split, Tensor.tensor_split),
}


_SHAPES = {Tensor.view, Tensor.reshape, torch.reshape, Tensor.unflatten, torch.unflatten}

_NAMES = (
    "__get__ __getitem__ __len__ dim size numel stride is_floating_point is_contiguous contiguous "
    "clone detach to float double type_as "
    "add add_ __radd__ sub sub_ __rsub__ mul mul_ __rmul__ div div_ __rdiv__ neg mean sum abs exp "
    "sqrt square pow sigmoid sigmoid_ tanh relu relu_ relu6 leaky_relu elu gelu silu mish hardtanh "
    "hardsigmoid hardswish softplus prelu batch_norm dropout dropout2d "
    "pad cat concat concatenate stack chunk split tensor_split flatten view reshape unflatten "
    "permute transpose movedim squeeze unsqueeze expand expand_as narrow unbind "
    "pixel_shuffle pixel_unshuffle channel_shuffle interpolate upsample "
    "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_avg_pool3d max_pool1d max_pool2d max_pool3d boolean_dispatch "
    "adaptive_max_pool1d adaptive_max_pool2d"
)
_PASSING = frozenset(_NAMES.split())
"""Functions of which not-a-number comes out wherever it is computed with."""


class Parted(TorchFunctionMode):
    """Calls ``see(parts, axis)`` wherever a tensor is cut in equal parts, not along its first axis.

    Args:
        see: gets the parts and the axis along which they lay side by side.
        heads: whether an axis that becomes two, heads and their width, is cut too: its parts are
            what lies at one place of every head, so that heads leave whole.

    Attributes:
        headed: how wide heads are, by the size of the axis that became them.
        lossy: whether a function was called that is not known to let not-a-number through.
    """

    def __init__(self, see: Callable[[Sequence[Tensor], int], None], *, heads: bool) -> None:
        super().__init__()
        self.see, self.heads = see, heads
        self.headed: dict[int, int] = {}
        self.lossy = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call the function, and look at its parts."""
        found = func(*args, **(kwargs or {}))
        self.lossy |= getattr(func, "__name__", "") not in _PASSING
        if func in _CUTS and len(found) > 1:
            whole: Tensor = args[0] if args else kwargs["input"]
            axes = [
                axis
                for axis, size in enumerate(whole.shape)
                if axis and all(size == len(found) * part.shape[axis] for part in found)
            ]
            if len(axes) == 1:
                self.see(found, axes[0])
        if func in _SHAPES and isinstance(found, Tensor):
            given: Tensor = args[0] if args else kwargs["input"]
            axis = _split(given.shape, found.shape)
            if axis:
                self.headed[given.shape[axis]] = found.shape[axis + 1]
            if axis and self.heads:
                self.see(found.unbind(axis + 1), axis)
        return found


def _split(before: Sequence[int], after: Sequence[int]) -> int:
    """The axis that became two, the first of which is of more than one; 0 if there is none."""
    if len(after) != len(before) + 1:
        return 0
    axis = next((i for i, size in enumerate(before) if after[i] != size), 0)
    whole = axis and after[axis] * after[axis + 1] == before[axis]
    same = list(before[axis + 1 :]) == list(after[axis + 2 :])
    return axis if whole and same and min(after[axis : axis + 2]) > 1 else 0


def unseen(work: Callable[..., Any]) -> Callable[..., Any]:
    """Let what watches functions see nothing of work that is not the network's."""

    @wraps(work)
    def done(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return work(*args, **kwargs)

    return done
