"""Layers whose kernel stays coded: it is decoded piece by piece while they compute."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.codecs import tensors
from pliant.cost import twin
from pliant.nn.layers import replace

TILE = 1 << 20  # numbers of a kernel that are decoded at once


class Coded(nn.Module):
    """What coded layers share: the bytes in a buffer, and the kernel they stand for.

    The layer is its plain one otherwise: geometry, bias, and the class it derives from. The
    kernel is no parameter; it does not train.
    """

    code: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    bias: Any

    @property
    def weight(self) -> Tensor:
        """The whole kernel, decoded."""
        found = tensors.unpack(self.data(), self.shape, self.dtype)
        return found.to(self.code.device)

    @property
    def numbers(self) -> int:
        """How many parameters the code stands for."""
        return torch.Size(self.shape).numel()

    def macs(self, inputs: list[Tensor], outputs: list[Tensor]) -> int:
        """Count the multiply-accumulates of one call: those of the plain layer."""
        return outputs[0].numel() * (self.numbers // self.shape[0])

    def data(self) -> bytes:
        """Return the coded kernel."""
        return self.code.cpu().numpy().tobytes()

    def check(self, code: Tensor) -> None:
        """Refuse a code that is not of this layer's kernel.

        Raises:
            ArtifactError: it is damaged, or of another kernel.
        """
        tensors.unpack(code.numpy().tobytes(), self.shape, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Compute some outputs at a time, so that the dense kernel never exists as a whole."""
        most = max(1, TILE * self.shape[0] // max(1, self.numbers))
        if getattr(self, "groups", 1) > 1:
            most = self.shape[0]  # a group reads inputs of its own
        bias, parts, at = self.bias, [], 0
        for piece in tensors.rows(self.data(), self.shape, self.dtype, most):
            mine = None if bias is None else bias[at : at + len(piece)]
            parts.append(self.compute(x, piece.to(x.device, x.dtype), mine))
            at += len(piece)
        axis = -1 if len(self.shape) == 2 else 1 - len(self.shape)
        return parts[0] if len(parts) == 1 else torch.cat(parts, axis)

    def compute(self, x: Tensor, piece: Tensor, bias: Tensor | None) -> Tensor:
        """Compute the outputs of some rows of the kernel."""
        found: Tensor = self._conv_forward(x, piece, bias)  # type: ignore[operator]
        return found


class CodedLinear(Coded, nn.Linear):  # type: ignore[override]
    """A linear layer with a coded kernel."""

    def compute(self, x: Tensor, piece: Tensor, bias: Tensor | None) -> Tensor:
        """Compute the outputs of some rows of the kernel."""
        return F.linear(x, piece, bias)


class CodedConv1d(Coded, nn.Conv1d):  # type: ignore[override]
    """A 1-d convolution with a coded kernel."""


class CodedConv2d(Coded, nn.Conv2d):  # type: ignore[override]
    """A 2-d convolution with a coded kernel."""


class CodedConv3d(Coded, nn.Conv3d):  # type: ignore[override]
    """A 3-d convolution with a coded kernel."""


_KINDS: dict[type[nn.Module], type[Coded]] = {
    nn.Linear: CodedLinear,
    nn.Conv1d: CodedConv1d,
    nn.Conv2d: CodedConv2d,
    nn.Conv3d: CodedConv3d,
}


def coded(layer: Any, code: Tensor, dtype: torch.dtype) -> Coded:
    """Make the coded layer of a plain one, with the same bias.

    Args:
        layer: a Linear, Conv1d, Conv2d or Conv3d.
        code: the coded kernel, as bytes; zeros stand for a kernel of zeros.
        dtype: type of the kernel's numbers.
    """
    new = _of_kind(_KINDS[type(layer)], layer)
    new.shape, new.dtype = tuple(layer.weight.shape), dtype
    new.register_buffer("code", code)
    return new


def decoded(model: nn.Module) -> nn.Module:
    """Put plain layers in the place of all coded ones, in a copy; without any, return the model."""
    if not any(isinstance(module, Coded) for module in model.modules()):
        return model
    model = twin(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, Coded):
            kind = next(plain for plain, own in _KINDS.items() if own is type(module))
            layer = _of_kind(kind, module)
            del layer.shape, layer.dtype
            layer.weight = nn.Parameter(module.weight, requires_grad=False)
            replace(model, name, layer)
    return model


def _of_kind(kind: type[Any], layer: nn.Module) -> Any:
    """Make a layer of another kind that has the attributes and the bias of this one."""
    new: Any = object.__new__(kind)
    nn.Module.__init__(new)
    for name, value in vars(layer).items():
        if name not in vars(new):
            setattr(new, name, value)
    new.register_parameter("bias", layer._parameters.get("bias"))
    return new.train(layer.training)
