"""A convolution of additions and maxima: the bipolar morphological layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pliant.cost import LayerCost
from pliant.errors import EditError
from pliant.nn.patches import Around, Patches

AT_ONCE = 1 << 22  # sums held at a time; all of them would be n times the output


class BMConv2d(Patches):
    """Takes the largest product of each sign in the place of their sum, without multiplying.

    A product is a sum of logarithms, and of a sum of exponentials only the largest term is kept:

        y = exp max(l(p) + V+) - exp max(l(p) + V-) - exp max(l(-p) + V+) + exp max(l(-p) + V-) + b

    with the patch p, l(t) = ln max(t, shift), and V+ and V- for the logarithms of the positive and
    the negative parts of a kernel; they learn freely. Source: E. Limonova, D. Alfonso, D. Nikolaev,
    V. V. Arlazarov, ICPR 2020.

    Args:
        inputs: channels that it reads.
        outputs: channels that it gives.
        kernel_size: height and width.
        stride: of the patches.
        padding: zeros around, or "same"; they count as ``shift``, as every small number does.
        dilation: of the patches.
        shift: eps_x, under the activations.
        rectified: what it reads is never negative, so that two of the four terms are constant:
            they belong into the bias.

    >>> layer = BMConv2d(1, 1, (1, 1), shift=1e-6)
    >>> _ = layer.learn_from(torch.full((1, 1, 1, 1), -2.0))
    >>> layer(torch.tensor([[[[3.0]]]])).round(decimals=3)
    tensor([[[[-6.]]]], grad_fn=<RoundBackward1>)
    """

    spec: ClassVar[Mapping[str, type]] = {"shift": float, "floor": float}

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel_size: tuple[int, int],
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] | str = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        *,
        padding_mode: Around = "zeros",
        shift: float = 0.1,
        rectified: bool = False,
    ) -> None:
        geometry = kernel_size, stride, padding, dilation
        like = nn.Conv2d(inputs, outputs, *geometry, padding_mode=padding_mode)
        super().__init__(like, outputs, padding)
        self.shift, self.floor, self.rectified = shift, 1e-6, rectified
        shape = (outputs, inputs, *like.kernel_size)
        self.positive = nn.Parameter(torch.zeros(shape))
        self.negative = nn.Parameter(torch.zeros(shape))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.learn_from(like.weight)

    @torch.no_grad()
    def learn_from(self, kernel: Tensor) -> BMConv2d:
        """Begin as a convolution of this kernel does, (outputs, inputs, height, width)."""
        self.positive.copy_(kernel.clamp_min(self.floor).log())
        self.negative.copy_((-kernel).clamp_min(self.floor).log())
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, H', W')."""
        x = self.padded(x)
        total = self._branch(x, self.positive) - self._branch(x, self.negative)
        if not self.rectified:
            total = total - self._branch(-x, self.positive) + self._branch(-x, self.negative)
        return total.unflatten(2, self.size(x)) + self.bias[:, None, None]

    def _branch(self, x: Tensor, kernel: Tensor) -> Tensor:
        logs = x.clamp_min(self.shift).log()
        return max_plus(self.patches(logs), kernel.flatten(1)).exp()

    def operations(self, outputs: int, inputs: int) -> dict[str, int]:
        """Count what it does, by kinds of operations.

        Args:
            outputs: numbers that it gives.
            inputs: numbers that it reads.
        """
        branches, taps = 2 if self.rectified else 4, self.positive[0].numel()
        logs = inputs * branches // 2
        return {
            "multiplications": 0,
            "additions": outputs * branches * (taps + 1),  # with those of the four terms and bias
            "maxima": outputs * branches * taps,
            "exponentials": outputs * branches,
            "logarithms": logs,
        }

    @classmethod
    def build(cls, layer: Any, spec: Mapping[str, Any]) -> BMConv2d:
        """Make it in the place of a convolution without groups, with a bias whatever that has."""
        check_morphological(layer)
        if not 0 < spec["shift"] <= 1 or not 0 < spec["floor"] <= 1:
            raise EditError("takes a shift and a floor above 0 and at most 1.")
        new: Any = _like(layer, layer.in_channels, layer.out_channels, shift=spec["shift"])
        new.floor = spec["floor"]
        if layer.bias is not None:
            new.bias = layer.bias
        return new

    def fill(self, layer: Any) -> None:
        """Take the logarithms of a kernel, or the constant terms of a morphological layer."""
        if not isinstance(layer, BMConv2d):
            self.learn_from(layer.weight)
            return
        high, low = (kernel.flatten(1).amax(1).exp() for kernel in (self.negative, self.positive))
        self.bias.copy_(layer.bias + self.shift * (high - low))

    @classmethod
    def predict(cls, before: LayerCost, spec: Mapping[str, Any]) -> LayerCost:
        """Return its cost: two kernels, and no products."""
        params, size = (
            2 * math.prod(before.weight) + before.weight[0],
            before.bytes // before.params,
        )
        return replace(
            before, kind=cls.__name__, params=params, macs=0, bytes=params * size, weight=()
        )

    def extra_repr(self) -> str:
        """Return the settings."""
        outputs, inputs = self.positive.shape[:2]
        rest = f"stride={self.stride}, shift={self.shift}, rectified={self.rectified}"
        return f"{inputs}, {outputs}, {self.kernel_size}, {rest}"


class Rectified:
    """A morphological layer behind a rectifier needs half of its terms: the others are constant."""

    spec: ClassVar[Mapping[str, type]] = {}

    @classmethod
    def build(cls, layer: Any, spec: Mapping[str, Any]) -> BMConv2d:
        """Make it of the same kernels, with a bias of its own."""
        if not isinstance(layer, BMConv2d) or layer.rectified:
            raise EditError("must be a morphological layer with four terms to lose two of them.")
        outputs, inputs = layer.positive.shape[:2]
        new = _like(layer, inputs, outputs, shift=layer.shift, rectified=True)
        new.positive, new.negative = layer.positive, layer.negative
        return new

    @classmethod
    def predict(cls, before: LayerCost, spec: Mapping[str, Any]) -> LayerCost:
        """As many numbers as before, and no products."""
        return before


def check_morphological(layer: Any) -> None:
    """Refuse what is no Conv2d without groups, by a sentence that begins with its name."""
    if type(layer) is not nn.Conv2d or layer.groups != 1:
        raise EditError("must be a Conv2d without groups to become morphological.")


def _like(layer: Any, inputs: int, outputs: int, **more: Any) -> BMConv2d:
    geometry = layer.kernel_size, layer.stride, layer.padding, layer.dilation
    return BMConv2d(inputs, outputs, *geometry, padding_mode=layer.padding_mode, **more)


def max_plus(logs: Tensor, kernel: Tensor) -> Tensor:
    """Return the largest sum of a column of each patch and a row of the kernel.

    Args:
        logs: patches (N, n, L).
        kernel: (outputs, n).

    Returns:
        (N, outputs, L). The gradient goes to the one tap that was the largest.
    """
    if torch.compiler.is_exporting() or not torch.is_grad_enabled():
        return torch.cat([part.amax(2) for part in _sums(logs, kernel)], 1)
    found: Tensor = _MaxPlus.apply(logs, kernel)
    return found


def _sums(logs: Tensor, kernel: Tensor) -> Iterator[Tensor]:
    """Give (N, some outputs, n, L) at a time, so that no more than `AT_ONCE` numbers are held."""
    rows = 1 if torch.compiler.is_exporting() else max(1, len(logs))
    some = max(1, AT_ONCE // max(1, rows * logs.shape[1] * logs.shape[2]))
    for part in kernel.split(some):
        yield logs[:, None] + part[:, :, None]


class _MaxPlus(torch.autograd.Function):
    """Keeps which tap was the largest, and not all sums."""

    @staticmethod
    def forward(ctx: Any, logs: Tensor, kernel: Tensor) -> Tensor:
        """Return the largest sums."""
        found = [part.max(2) for part in _sums(logs, kernel)]
        taps = torch.cat([part.indices for part in found], 1)
        ctx.save_for_backward(taps)
        ctx.count = logs.shape[1]
        return torch.cat([part.values for part in found], 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, pull: Tensor) -> tuple[Tensor, Tensor]:
        """Give what is pulled to the largest taps."""
        (taps,) = ctx.saved_tensors
        to_logs = pull.new_zeros(len(pull), ctx.count, pull.shape[2])
        to_logs.scatter_add_(1, taps, pull)
        to_kernel = pull.new_zeros(pull.shape[1], ctx.count)
        to_kernel.scatter_add_(1, taps.transpose(0, 1).flatten(1), pull.transpose(0, 1).flatten(1))
        return to_logs, to_kernel
