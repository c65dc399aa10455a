"""A convolution whose kernel is a mixture of kernels of several sizes, and what becomes of it.

Convolution is additive: kernels of odd sizes that are centred in the largest one can be added
before they are applied, so that a mixture of sizes costs one convolution.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.cost import LayerCost
from pliant.errors import EditError
from pliant.math.alone import forked
from pliant.nn.mixed import Mixed

LARGEST = 11  # size of a kernel


class MetaKernel(Mixed):
    """One convolution by the sum of kernels of several sizes, weighted by the shares of the sizes.

    Nested, the small kernels are the centres of the largest one, and logits are thresholds: a
    ring of taps belongs to the kernel where the mean over filters of its squared norm is above
    its threshold and all rings within belong to it (Stamoulis et al., "Single-Path NAS", ECML
    PKDD 2019). The gradient of this step is that of a sigmoid.

    Args:
        layer: the convolution to stand for; its bias is taken over as the parameter it is.
        sizes: odd, rising.
        nested: see above.
    """

    spec: ClassVar[Mapping[str, type]] = {"sizes": tuple, "nested": bool}

    def __init__(self, layer: Any, sizes: tuple[int, ...], *, nested: bool = False) -> None:
        super().__init__([str(size) for size in sizes])
        self.sizes, self.nested, self.size = sizes, nested, layer.kernel_size[0]
        self.stride, self.groups = layer.stride, layer.groups
        self.in_channels, self.out_channels = layer.in_channels, layer.out_channels
        for size in sizes[-1:] if nested else sizes:  # each drawn for the taps that it has
            drawn = self.plain(size, bias=False).weight
            self.register_parameter(_name(size, sizes), nn.Parameter(drawn.detach()))
        self.bias = layer.bias
        rings = len(sizes) - nested
        self.logits = nn.Parameter(torch.zeros(rings), requires_grad=False)
        self.prior = torch.zeros(rings)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in, H, W) to (N, out, H / stride, W / stride), rounded up."""
        reach = self.sizes[-1] // 2
        return F.conv2d(x, self.merged(), self.bias, self.stride, reach, 1, self.groups)

    def merged(self) -> Tensor:
        """Return the kernel that is applied, (out, in / groups, size, size) of the largest size."""
        shares = self.probabilities().unbind()
        rows = zip(shares, self.kernels().values(), strict=True)
        return torch.stack([share * self._centred(kernel) for share, kernel in rows]).sum(0)

    def kernels(self) -> dict[int, Tensor]:
        """Return the kernel of every size."""
        if self.nested:
            whole: Any = self.weight
            return {size: _crop(whole, size) for size in self.sizes}
        return {size: getattr(self, _name(size, self.sizes)) for size in self.sizes}

    def probabilities(self) -> Tensor:
        """Return the shares of the sizes; of nested ones a single 1, with gradients."""
        if not self.nested:
            return super().probabilities()
        inside, shares = self.logits.new_ones(()), []
        for gate in self._gates().unbind():
            shares.append(inside * (1 - gate))
            inside = inside * gate
        return torch.stack([*shares, inside])

    def _gates(self) -> Tensor:
        """1 for every ring that belongs to the kernel; backwards, a sigmoid."""
        whole: Any = self.weight
        sums = [_crop(whole, size).square().sum() for size in self.sizes]
        norms = torch.stack([b - a for a, b in zip(sums, sums[1:], strict=False)]) / len(whole)
        above = (norms - self.logits - self.prior) / self.temperature
        soft = above.sigmoid()
        return (above > 0).to(soft) + soft - soft.detach()

    def best(self) -> str:
        """Return the size with the largest share."""
        return self.names[int(self.probabilities().argmax())]

    def candidates(self) -> Mapping[str, nn.Module]:
        """Return a convolution of every size, with values of its own."""
        bias = self.bias is not None
        with forked():
            return {str(size): self.plain(size, bias=bias) for size in self.sizes}

    def cropped(self, size: int) -> Tensor:
        """Return the centre of the kernel that is applied."""
        return _crop(self.merged().detach(), size)

    def plain(self, size: int, *, bias: bool) -> nn.Conv2d:
        """Return an ordinary convolution of one size, with weights that are drawn."""
        ends = self.in_channels, self.out_channels
        return nn.Conv2d(*ends, size, self.stride, size // 2, groups=self.groups, bias=bias)

    def _centred(self, kernel: Tensor) -> Tensor:
        return F.pad(kernel, [(self.sizes[-1] - kernel.shape[-1]) // 2] * 4)

    # As a kind that is swapped in: see `pliant.edits.swap`.

    @classmethod
    def build(cls, layer: Any, spec: Mapping[str, Any]) -> MetaKernel:
        """Make it for a convolution."""
        sizes = tuple(spec["sizes"])
        if reason := unfit(layer):
            raise EditError(f"must be a convolution that keeps a centre, but {reason}.")
        if reason := wrong(sizes):
            raise EditError(f"takes {reason}.")
        return cls(layer, sizes, nested=spec["nested"])

    def fill(self, layer: Any) -> None:
        """Let the kernel of the layer's own size begin as the layer's, the others as drawn."""
        if self.nested:
            whole: Any = self.weight
            _crop(whole, min(self.size, self.sizes[-1])).copy_(_crop(layer.weight, self.sizes[-1]))
        elif self.size in self.sizes:
            self.kernels()[self.size].copy_(layer.weight)

    @classmethod
    def predict(cls, before: LayerCost, spec: Mapping[str, Any]) -> LayerCost:
        """The kernels of all sizes, and one convolution by the largest."""
        sizes, nested = tuple(spec["sizes"]), spec["nested"]
        *ends, size, _ = before.weight
        pairs, largest = math.prod(ends), sizes[-1]
        taps = largest**2 if nested else sum(size * size for size in sizes)
        rings = len(sizes) - nested
        params = before.params + pairs * (taps - size**2) + rings
        return replace(
            before,
            kind=cls.__name__,
            params=params,
            macs=before.macs * largest**2 // size**2,
            bytes=(params + rings + 1) * before.itemsize,  # prior and temperature
            weight=(*ends, largest, largest),
        )


class Cropped:
    """A plain convolution: the centre of a meta-kernel as it was applied."""

    spec: ClassVar[Mapping[str, type]] = {"size": int, "bias": bool}

    @classmethod
    def build(cls, layer: Any, spec: Mapping[str, Any]) -> nn.Module:
        """Make it for a meta-kernel."""
        if not isinstance(layer, MetaKernel) or spec["bias"] != (layer.bias is not None):
            raise EditError("must be a meta-kernel, with a bias or without, to be cropped.")
        if spec["size"] not in layer.sizes:
            raise EditError(f"has kernels of {layer.sizes}, and none of {spec['size']}.")
        new = layer.plain(spec["size"], bias=False)
        new.bias = layer.bias
        with torch.no_grad():  # where a file is read, its values replace these
            new.weight.copy_(layer.cropped(spec["size"]))
        return new

    @classmethod
    def predict(cls, before: LayerCost, spec: Mapping[str, Any]) -> LayerCost:
        """A kernel of one size."""
        *ends, largest, _ = before.weight
        params = math.prod(ends) * spec["size"] ** 2 + spec["bias"] * before.output[0]
        return replace(
            before,
            kind="Conv2d",
            params=params,
            macs=before.macs * spec["size"] ** 2 // largest**2,
            bytes=params * before.itemsize,
            weight=(*ends, spec["size"], spec["size"]),
        )


def unfit(layer: nn.Module) -> str:
    """Say why the kernel of a layer cannot be one of several sizes; nothing if it can."""
    if type(layer) is not nn.Conv2d:
        return f"it is a {type(layer).__name__}"
    size, dilation = set(layer.kernel_size), set(layer.dilation)
    if len(size) > 1 or not max(size) % 2 or dilation != {1}:
        return f"its kernel {layer.kernel_size} is not odd, square and without gaps"
    reach = layer.kernel_size[0] // 2
    if layer.padding not in ((reach, reach), "same") or layer.padding_mode != "zeros":
        return f"it is padded by {layer.padding}, not by {reach} zeros"
    return ""


def wrong(sizes: tuple[int, ...]) -> str:
    """Say which sizes are taken, where these are not; nothing if they are."""
    fit = all(type(size) is int and size % 2 and 1 <= size <= LARGEST for size in sizes)
    if fit and len(sizes) > 1 and list(sizes) == sorted(set(sizes)):
        return ""
    return f"two or more odd sizes of 1 to {LARGEST}, rising, not {sizes}"


def _name(size: int, sizes: tuple[int, ...]) -> str:
    return "weight" if size == sizes[-1] else f"kernel{size}"


def _crop(kernel: Tensor, size: int) -> Tensor:
    """The centre of a kernel; all of it where it is smaller."""
    edge = max(0, (kernel.shape[-1] - size) // 2)
    return kernel[..., edge : kernel.shape[-1] - edge, edge : kernel.shape[-1] - edge]
