"""Lets a layer train as if it multiplied codes already: its weight and its input are rounded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pliant.cost import Example, call
from pliant.math.gemm import affine
from pliant.nn.product import Affine
from pliant.observe.watch import capture

KEPT = 2**14  # numbers of one batch among which quantiles are looked for


@dataclass(frozen=True)
class Follow:
    """How a range follows what is read, batch by batch.

    Args:
        momentum: share of the range so far.
        within: share of a batch that its range holds.
    """

    momentum: float
    within: float

    def __call__(self, seen: Tensor | None, x: Tensor) -> Tensor:
        """Return the range after one more batch."""
        batch = extent(x, self.within)
        return batch if seen is None else seen.lerp(batch.to(seen), 1 - self.momentum)


class Rounded(nn.Module):
    """A parametrization that rounds a weight; it also holds the range of what the layer reads.

    Args:
        bits: of a code.
        channels: whether every output channel has a scale.
        seen: least and largest number of what the layer reads.
    """

    seen: Tensor

    def __init__(self, bits: int, seen: Tensor, *, channels: bool) -> None:
        super().__init__()
        self.bits, self.channels = bits, channels
        self.register_buffer("seen", seen.clone())

    def forward(self, weight: Tensor) -> Tensor:
        """Round straight through."""
        scales, zero = weight_codes(weight, self.bits, channels=self.channels)
        most = 2**self.bits - 1
        if not self.channels:
            return torch.fake_quantize_per_tensor_affine(weight, float(scales), zero, 0, most)
        zeros = torch.full_like(scales, zero, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight, scales, zeros, 0, 0, most)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The weight that is trained is the one that came."""
        return weight


class Simulated:
    """A layer that rounds while it trains; ``remove`` leaves it as it was, with its new weight.

    Args:
        name: of the layer.
        layer: a convolution or Linear.
        bits: of a code.
        seen: least and largest number of what it reads, as calibrated.
        follow: how this range goes on in the training.
        channels: whether every output channel has a scale.
    """

    def __init__(
        self, name: str, layer: Any, bits: int, seen: Tensor, follow: Follow, *, channels: bool
    ) -> None:
        self.name, self.layer, self.follow = name, layer, follow
        self.rounded = Rounded(bits, seen.to(layer.weight.device), channels=channels)
        parametrize.register_parametrization(layer, "weight", self.rounded)
        self.handle = layer.register_forward_pre_hook(self._see, with_kwargs=True)

    def values(self) -> Affine:
        """Return the numbers of the layer as they are now."""
        weight = self.layer.parametrizations.weight.original.detach()
        bits, bias = self.rounded.bits, self.layer.bias
        scales, zero = weight_codes(weight, bits, channels=self.rounded.channels)
        low, high = self.rounded.seen.tolist()
        found = affine(low, high, bits)
        return Affine(weight, scales, zero, None if bias is None else bias.detach(), found)

    def remove(self) -> None:
        """Take the rounding out."""
        self.handle.remove()
        if parametrize.is_parametrized(self.layer, "weight"):
            parametrize.remove_parametrizations(self.layer, "weight", leave_parametrized=False)
            # The weight comes back as the last parameter; put it before the bias, where it was.
            self.layer.register_parameter("bias", self.layer._parameters.pop("bias"))

    def _see(self, layer: nn.Module, args: Any, kwargs: Any) -> Any:
        given = [*args, *kwargs.values()]
        x, rest = given[0], given[1:]
        if layer.training and x.numel():
            self.rounded.seen.copy_(self.follow(self.rounded.seen, x.detach()))
        low, high = self.rounded.seen.tolist()
        scale, zero = affine(low, high, self.rounded.bits)
        most = 2**self.rounded.bits - 1
        found = torch.fake_quantize_per_tensor_affine(x.float(), scale, zero, 0, most)
        return (found.to(x.dtype), *rest), {}


def weight_codes(weight: Tensor, bits: int, *, channels: bool) -> tuple[Tensor, int]:
    """Return scales and the code of zero of a weight, so that nothing is clipped.

    Args:
        weight: (channels, ...).
        bits: of a code.
        channels: whether every channel has a scale; then the code of zero lies in the middle.
    """
    found = weight.detach().float()
    if not channels:
        scale, zero = affine(float(found.min()), float(found.max()), bits)
        return torch.tensor([scale], device=weight.device), zero
    middle, rows = 2 ** (bits - 1), found.flatten(1)
    above, below = rows.amax(1) / (middle - 1), -rows.amin(1) / middle
    scales = torch.maximum(above, below)
    return torch.where(scales > 0, scales, 1.0), middle


def extent(x: Tensor, within: float) -> Tensor:
    """Return the least and the largest number, or those that a share of all lies between."""
    if within >= 1:
        return torch.stack(x.aminmax()).float()
    flat = x.flatten()
    some = flat[:: len(flat) // KEPT | 1].float()  # odd, to meet every column of an image
    return torch.quantile(some, torch.tensor([(1 - within) / 2, (1 + within) / 2]).to(some))


def extents(
    model: nn.Module, layers: Sequence[str], batches: Sequence[Example], follow: Follow
) -> Mapping[str, Tensor]:
    """Return the range of what each layer reads.

    Args:
        model: any module; it stays as it is.
        layers: names of layers in it.
        batches: inputs of forward calls.
        follow: how the range follows them.
    """
    found: dict[str, Tensor] = {}

    def see(name: str, inputs: Tensor, output: Tensor) -> None:
        if inputs.numel():  # not an expert to which nothing was routed
            found[name] = follow(found.get(name), inputs)

    with capture(model, layers, see):
        for batch in batches:
            call(model, batch)
    return found
