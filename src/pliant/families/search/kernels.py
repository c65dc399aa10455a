"""Which convolutions can be searched for the size of their kernels, and what was found."""

from __future__ import annotations

from torch import nn

from pliant.edits import Swap
from pliant.errors import MethodError
from pliant.families.search.bilevel import choices
from pliant.nn.layers import shared_weights
from pliant.nn.meta_kernel import unfit
from pliant.run import Run


def searchable(run: Run, *, everything: bool) -> list[str]:
    """Return the names of convolutions whose kernels can have other sizes, and why others cannot.

    Args:
        run: about to start.
        everything: take dense convolutions too, not only those with a filter for each channel.

    Raises:
        MethodError: there is none.
    """
    found, tied = [], shared_weights(run.model)
    for name, layer in run.model.named_modules():
        if not isinstance(layer, nn.Conv2d) or name not in run.layers:
            continue
        reason = _reason(layer, everything) or ("its weight is shared" * (id(layer.weight) in tied))
        if not name:
            reason = "the model is this single layer: wrap it in nn.Sequential"
        if reason:
            run.keep(name, reason)
        else:
            found.append(name)
    if not found:
        kind = "convolution" if everything else "depthwise convolution"
        raise MethodError(
            f"A search for the sizes of kernels needs a {kind} of two dimensions whose kernel is "
            f"odd, square and padded by half its size, but {type(run.model).__name__} has none."
        )
    return found


def _reason(layer: nn.Conv2d, everything: bool) -> str:
    depthwise = layer.groups == layer.in_channels > 1
    if not everything and not depthwise:
        return "it is no depthwise convolution"
    if layer.kernel_size == (1, 1):
        return "it looks at single pixels"
    return (reason := unfit(layer)) and f"its kernel cannot grow: {reason}"


def report(run: Run) -> dict[str, int]:
    """Note the best size of every kernel, and by how much it leads; return the sizes."""
    parts = choices(run.model)
    sizes = {name: int(part.best()) for name, part in parts.items()}
    margins = {}
    for name, part in parts.items():
        first, second = part.probabilities().detach().topk(2).values.tolist()
        margins[name] = round(first - second, 4)
    run.note(sizes=sizes, margins=margins)
    return sizes


def crop(run: Run) -> None:
    """Leave every kernel its best size, and note the sizes."""
    for name, size in report(run).items():
        bias = run.model.get_submodule(name).bias is not None
        run.apply(Swap(name, "cropped", {"size": size, "bias": bias}))
