"""Networks whose filters have several sizes at once: merged into one kernel, or side by side."""

import time

import torch.nn.functional as F
from torch import Tensor, nn

from pliant.edits import Swap
from pliant.families.search.bilevel import architecture
from pliant.nn.mixed import MixedOp
from pliant.nn.mobile import MobileNetwork


def merged(model: MobileNetwork, sizes: tuple[int, ...]) -> nn.Module:
    """Make every depthwise filter the sum of kernels of all sizes, in place."""
    for name in deep(model):
        Swap(name, "meta_kernel", {"sizes": sizes, "nested": False}).apply(model)
    return _asking(model)


def mixture(model: MobileNetwork, sizes: tuple[int, ...]) -> nn.Module:
    """Run depthwise filters of all sizes and add up what they give, in place."""
    for name in deep(model):
        old = model.get_submodule(name)
        assert isinstance(old, nn.Conv2d)
        holder, _, child = name.rpartition(".")
        found = MixedOp({f"k{size}": _like(old, size) for size in sizes})
        setattr(model.get_submodule(holder), child, found)
    return _asking(model)


def step_seconds(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    """Go forward and back once, and return the seconds."""
    began = time.perf_counter()
    model.zero_grad()
    F.cross_entropy(model(x), labels).backward()
    return time.perf_counter() - began


def deep(model: nn.Module) -> list[str]:
    """Name the depthwise convolutions."""
    named = model.named_modules()
    return [n for n, m in named if isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1]


def _like(old: nn.Conv2d, size: int) -> nn.Conv2d:
    stride, sides = old.stride[0], (old.in_channels, old.out_channels)
    return nn.Conv2d(*sides, size, stride, size // 2, groups=old.groups, bias=False)


def _asking(model: nn.Module) -> nn.Module:
    """Let logits ask for gradients, as in an architecture step."""
    for logits in architecture(model):
        logits.requires_grad_(True)
    return model
