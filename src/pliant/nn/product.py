"""A convolution or Linear that multiplies small unsigned integers, exactly, in short sums."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.errors import ModelError
from pliant.math.gemm import codes, opened, panel_bytes, panels, product
from pliant.math.gemm_loops import WIDTH
from pliant.nn import kinds

AT_ONCE = 2**24  # codes of the left matrix that lie in memory together
KINDS = (*kinds.LINEAR, *kinds.CONV)


@dataclass(frozen=True)
class Affine:
    """The numbers of a layer before they become codes.

    Args:
        weight: in floating point.
        scales: of the weight: one, or one for every output channel.
        zero: the code of zero in the weight.
        bias: or None.
        input: scale and code of zero of what the layer reads.
    """

    weight: Tensor
    scales: Tensor
    zero: int
    bias: Tensor | None
    input: tuple[float, int]


class Product(nn.Module):
    """A layer whose weight and input are codes of a few bits, multiplied as whole numbers.

    A real number is s (q - z). What the layer reads is turned into codes and, for a convolution,
    into the rows that its kernel meets, with the code of zero around an image. Their product with
    the codes of the weight is exact; then come the terms that the codes of zero bring in, one
    computed from the rows and the others beforehand, the scales, and the bias. ``weight`` is the
    weight in floating point; gradients pass straight through to what the layer reads, where it
    lies within its range.

    Args:
        layer: the convolution or Linear it replaces; its bias stays the same parameter.
        bits: of a code.
        channels: whether every output channel has a scale.
        values: None leaves zeros, for loading.

    Raises:
        ModelError: in forward, a number that it reads is no number.
    """

    codes: Tensor
    scales: Tensor
    zero: Tensor
    offset: Tensor
    input_scale: Tensor
    input_zero: Tensor
    like: Tensor
    bias: Tensor | None

    def __init__(
        self, layer: Any, bits: int, *, channels: bool, values: Affine | None = None
    ) -> None:
        super().__init__()
        self.kind, self.bits = kinds.kind_of(layer), bits
        kinds.take_after(self, layer)
        self.shape = tuple(layer.weight.shape)
        self.register_parameter("bias", layer.bias)
        self._allocate(layer.weight, channels=channels)
        if values is not None:
            self._fill(values)
        self.train(layer.training)

    @property
    def depth(self) -> int:
        """K, the products of one output."""
        return torch.Size(self.shape[1:]).numel()

    @property
    def weight(self) -> Tensor:
        """The weight as the product sees it."""
        scales = self.scales.view(-1, *[1] * (len(self.shape) - 1))
        return ((self.levels() - self.zero) * scales).to(self.like.dtype)

    def levels(self) -> Tensor:
        """Return the codes of the weight, in its shape, as floating-point numbers."""
        rows = self.shape[0] // self._groups
        found = [opened(part, rows, self.depth, self.bits) for part in self._parts()]
        return torch.cat(found).view(self.shape).float()

    def forward(self, input: Tensor) -> Tensor:
        """Multiply codes."""
        found: Tensor = _Straight.apply(input, self)
        return found if self.bias is None else found + self._along(self.bias).to(found.dtype)

    def rounded(self, x: Tensor) -> Tensor:
        """Return an input at its levels."""
        most = 2**self.bits - 1
        return torch.fake_quantize_per_tensor_affine(
            x.float(), self.input_scale, self.input_zero, 0, most
        )

    def multiplied(self, x: Tensor) -> Tensor:
        """Return what the layer gives without its bias, computed from whole numbers."""
        if self.kind in kinds.LINEAR:
            rows = codes(x.float(), self.input_scale, self.input_zero, self.bits)
            return self._whole(rows.reshape(-1, self.depth), 0, 1).view(
                *x.shape[:-1], self.shape[0]
            )
        batched = x.dim() == len(self.shape)
        images = x if batched else x[None]
        most = max(1, AT_ONCE // max(1, images[0].numel() * self.depth // self.shape[1]))
        found = torch.cat([self._image(part) for part in images.split(most)])
        return found if batched else found[0]

    @property
    def numbers(self) -> int:
        """How many parameters it stands for besides those it owns."""
        return torch.Size(self.shape).numel()

    def macs(self, inputs: list[Tensor], outputs: list[Tensor]) -> int:
        """Count multiply-accumulates of one call, as for the layer it replaces."""
        return kinds.macs(self, inputs, outputs)

    def extra_repr(self) -> str:
        """Name what it replaces and how many bits a code has."""
        kind = self.kind.__name__ if self.kind else ""
        return f"{kind}, {self.shape}, bias={self.bias is not None}, bits={self.bits}"

    @property
    def _groups(self) -> int:
        return int(getattr(self, "groups", 1))

    def _parts(self) -> Sequence[Tensor]:
        """The panels of each group."""
        return self.codes.chunk(self._groups)

    def _image(self, x: Tensor) -> Tensor:
        """Convolve: (N, C, ...) to (N, channels, ...)."""
        edges: list[int] = self._reversed_padding_repeated_twice  # type: ignore[assignment]
        mode = str(self.padding_mode)
        if mode != "zeros":
            x = F.pad(x, edges, mode)
        found = codes(x.float(), self.input_scale, self.input_zero, self.bits)
        if mode == "zeros":
            found = F.pad(found, edges, value=int(self.input_zero))
        seen = windows(found, self.kernel_size, self.stride, self.dilation)  # type: ignore[arg-type]
        axes = len(self.shape) - 2
        places, groups = seen.shape[1 : 1 + axes], self._groups
        seen = seen.flatten(2 + axes).reshape(len(x), *places, groups, -1)
        parts = [
            self._whole(seen.select(1 + axes, group).flatten(0, axes), group, groups)
            for group in range(groups)
        ]
        return torch.cat(parts, 1).view(len(x), *places, -1).movedim(-1, 1)

    def _whole(self, rows: Tensor, group: int, groups: int) -> Tensor:
        """Multiply the codes of one group by its weights, and scale: (rows, channels of it)."""
        width = self.shape[0] // groups
        mine = slice(group * width, (group + 1) * width)
        found = product(rows, self._parts()[group], self.bits, plain=_is_traced())[:, :width]
        ahead = rows.sum(1, dtype=torch.int32)[:, None] * self.zero
        whole = found - ahead + self.offset[mine]
        scales = self.scales if len(self.scales) == 1 else self.scales[mine]
        return whole.float() * (scales * self.input_scale)

    def _along(self, bias: Tensor) -> Tensor:
        shape = () if self.kind in kinds.LINEAR else [1] * (len(self.shape) - 2)
        return bias.view(-1, *shape)

    def _allocate(self, weight: Tensor, *, channels: bool) -> None:
        rows, bits = self.shape[0], self.bits
        each = panel_bytes(rows // self._groups, self.depth, WIDTH, bits)
        steps = -(-self.depth // 2) if bits <= 4 else self.depth
        shape = (self._groups * each // (steps * WIDTH), steps, WIDTH)
        for name, size, kind in (
            ("codes", shape, torch.uint8),
            ("scales", (rows if channels else 1,), torch.float32),
            ("zero", (), torch.int32),
            ("offset", (rows,), torch.int32),
            ("input_scale", (), torch.float32),
            ("input_zero", (), torch.int32),
        ):
            self.register_buffer(name, torch.zeros(size, dtype=kind, device=weight.device))
        self.register_buffer("like", weight.new_empty(0), persistent=False)  # follows .to(dtype)

    @torch.no_grad()
    def _fill(self, values: Affine) -> None:
        self.scales.copy_(values.scales)
        self.zero.fill_(values.zero)
        self.input_scale.fill_(values.input[0])
        self.input_zero.fill_(values.input[1])
        scales = self.scales.view(-1, *[1] * (len(self.shape) - 1))
        found = codes(values.weight.float(), scales, self.zero, self.bits).flatten(1)
        parts = [panels(rows, WIDTH, self.bits) for rows in found.chunk(self._groups)]
        self.codes.copy_(torch.cat(parts))
        below = found.sum(1, dtype=torch.int32) * self.input_zero
        self.offset.copy_(self.depth * self.zero * self.input_zero - below)
        if self.bias is not None and values.bias is not None:
            self.bias.copy_(values.bias)


class _Straight(torch.autograd.Function):
    """Computes from codes, and differentiates as the rounded layer in floating point."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Product) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x)
        if not _is_traced() and x.isnan().any():
            raise ModelError(
                "A layer that multiplies codes must read numbers, but was given what is no number "
                "(NaN): look at what comes before it."
            )
        return layer.multiplied(x).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            given = x.detach().float().requires_grad_(True)
            layer = ctx.layer
            found = kinds.applied(layer, layer.rounded(given), layer.weight.float(), None)
            (back,) = torch.autograd.grad(found, given, gradient.float())
        return back.to(x.dtype), None


def _is_traced() -> bool:
    return torch.compiler.is_compiling() or torch.compiler.is_exporting()


def windows(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """Return what a kernel meets at every place: (N, places ..., C, kernel ...).

    Args:
        x: (N, C, ...), padded.
        kernel: its size along each axis.
        stride: between places.
        dilation: between the numbers that the kernel meets.
    """
    axes = len(kernel)
    for axis in range(axes):
        reach = (kernel[axis] - 1) * dilation[axis] + 1
        x = x.unfold(2 + axis, reach, stride[axis])[..., :: dilation[axis]]
    return x.movedim(1, 1 + axes)
