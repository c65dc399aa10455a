"""Finds layers that are plain ones in another class, and proves it by what they compute."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pliant.cost import Example, call, evaluating, tensors, twin
from pliant.edits.plain import Plain, computed, hidden
from pliant.math.alone import forked
from pliant.nn.layers import shared_weights
from pliant.surgery.passes import slow_attention

CLOSE = 1e-5  # largest difference that rounding may make, relative to the largest output

_PRODUCTS: tuple[Any, ...] = (
    *(F.linear, F.conv1d, F.conv2d, F.conv3d),
    *(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
)


def plain(model: nn.Module, example: Example) -> list[Plain]:
    """Return the edits that put plain layers in the place of those that compute the same.

    A ``Conv1D`` of Transformers becomes a Linear, a packed ``nn.MultiheadAttention`` four of them;
    a class that derives from a Linear, a convolution or a table becomes this, with the weight
    that it computes, where that gives the same on what it reads, and on other inputs. So does a
    layer whose weight comes from a parametrization, or from a hook of an older one: what it would
    keep to while it trains, such as a spectral norm, holds for factors no more.

    Args:
        model: not touched.
        example: the inputs of one forward call.
    """
    tied = {name for names in shared_weights(model).values() for name in names}
    found = {
        name: module
        for name, module in model.named_modules()
        if name
        and (hidden(module) or computed(module) or type(module) is nn.MultiheadAttention)
        and not any(f"{name}.{own}" in tied for own, _ in module.named_parameters())
    }
    if not found:
        return []
    inputs = _inputs(model, found, example)
    edits = (_proven(name, found[name], *given) for name, given in inputs.items())
    return [edit for edit in edits if edit is not None]


def _inputs(model: nn.Module, layers: dict[str, nn.Module], example: Example) -> dict[str, Any]:
    """What each layer reads in its first call."""
    seen: dict[str, Any] = {}

    def hook(name: str) -> Any:
        def look(module: nn.Module, args: Any, kwargs: Any) -> None:
            seen.setdefault(name, (args, kwargs))

        return look

    handles = [m.register_forward_pre_hook(hook(n), with_kwargs=True) for n, m in layers.items()]
    try:
        with evaluating(model), torch.no_grad(), slow_attention():
            call(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _proven(name: str, module: nn.Module, args: Any, kwargs: Any) -> Plain | None:
    """The edit for one layer, None if it computes something else."""
    with torch.no_grad(), forked(), slow_attention(), evaluating(module):
        edits = [Plain(name)]
        if computed(module):
            weight, bias = (getattr(module, own) for own in ("weight", "bias"))
            edits = [Plain(name, values=(weight.detach().clone(), bias))]
        elif not isinstance(module, nn.MultiheadAttention):
            weight = _weight_in_use(module, args, kwargs)
            own: Any = module
            if weight is not None and weight[0].shape == own.weight.shape:
                edits.append(Plain(name, values=weight))
        for edit in edits:
            if _same(module, edit, args, kwargs):
                return edit
    return None


def _same(module: nn.Module, edit: Plain, args: Any, kwargs: Any) -> bool:
    holder = nn.Module()
    try:
        holder.layer = twin(module)
        Plain("layer", edit.values).apply(holder)
        for more in (args, _larger(module, args)):
            wanted, found = (list(tensors(m(*more, **kwargs))) for m in (module, holder.layer))
            if len(wanted) != len(found) or not all(map(_close, wanted, found)):
                return False
        for mode in (True, False):  # and where it trains, but for dropout of attention
            if isinstance(module, nn.MultiheadAttention) or computed(module):
                break
            module.train(mode)
            holder.layer.train(mode)
            if not _close(module(*args, **kwargs), holder.layer(*args, **kwargs)):
                return False
    except Exception:  # a layer of another class may fail in any way
        return False
    return True


def _larger(module: nn.Module, args: Any) -> Any:
    """Images one pixel larger, as padding may depend on their size; all rows of a table."""
    if isinstance(module, nn.Embedding) and args:
        return torch.arange(module.num_embeddings, device=module.weight.device), *args[1:]
    if not isinstance(module, nn.modules.conv._ConvNd) or not args:
        return args
    x, *rest = args
    return F.pad(x, (0, 1) * (x.dim() - 2)), *rest


def _close(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    scale = one.abs().max().clamp_min(1e-12) if one.numel() else 1.0
    return bool(((one - other).abs() <= CLOSE * scale).all())


class _Used(TorchFunctionMode):
    """Remembers weight and bias of the last product."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Tensor, Tensor | None]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call the function; look at what it multiplies by."""
        if func in _PRODUCTS:
            given = dict(zip(("input", "weight", "bias"), args, strict=False)) | (kwargs or {})
            self.found.append((given["weight"], given.get("bias")))
        return func(*args, **(kwargs or {}))


def _weight_in_use(
    module: nn.Module, args: Any, kwargs: Any
) -> tuple[Tensor, Tensor | None] | None:
    used = _Used()
    try:
        with used:
            module(*args, **kwargs)
    except Exception:
        return None
    return used.found[0] if len(used.found) == 1 else None
