"""The kernel of one layer is coded, and decoded piece by piece while the layer computes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from pliant.codecs import address_map, tensors
from pliant.cost import LayerCost
from pliant.edits.edit import Replaced, layer_of
from pliant.errors import EditError
from pliant.nn import coded, layers

_TYPES = {
    str(kind).removeprefix("torch."): kind
    for kind in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
}


@dataclass(frozen=True)
class Encode:
    """Codes the kernel of one layer: nothing is lost, and it is never dense again.

    Args:
        layer: name of a Conv1d/2d/3d or Linear.
        form: ``hac`` (one stream of Huffman codewords), ``shac`` (sparse, with coded values),
            ``ans`` (one stream at the entropy) or ``mask`` (sparse, with values as they are).
        size: bytes of the coded kernel.
        dtype: type of its numbers.
        data: the coded kernel; made of the layer's weight if None. It is no part of the plan: not
            compared and not written to JSON.

    Raises:
        EditError: the layer cannot be coded, or the coded kernel has another size.
    """

    layer: str
    form: str
    size: int
    dtype: str = "float32"
    data: bytes | None = field(default=None, compare=False, repr=False)

    def apply(self, model: nn.Module, *, weights: bool = True) -> Replaced:
        """Put the coded layer in the place of the plain one."""
        module = self._read(model)
        weight: Any = module.weight
        code = torch.zeros(self.size, dtype=torch.uint8, device=weight.device)
        if weights:
            code.copy_(torch.frombuffer(bytearray(self._data(weight)), dtype=torch.uint8))
        layers.replace(model, self.layer, coded.coded(module, code, _TYPES[self.dtype]))
        return Replaced(removed=(weight,))

    def predict(self, before: LayerCost) -> LayerCost:
        """Return the cost of the coded layer: as many numbers and products, in fewer bytes."""
        dense = math.prod(before.weight)
        rest = (before.params - dense) * before.bytes // max(before.params, 1)
        return replace(before, kind=self.form, bytes=self.size + rest)

    def _read(self, model: nn.Module) -> Any:
        module = layer_of(model, self.layer)
        if self.form not in address_map.ALL or self.dtype not in _TYPES:
            raise EditError(
                f"{self.layer} is coded in {', '.join(address_map.ALL)} with numbers of "
                f"{', '.join(_TYPES)}, not in {self.form} with {self.dtype}."
            )
        if why := layers.unreadable(model, self.layer):
            raise EditError(f"{self.layer or 'The model'} cannot be coded: {why}.")
        most = module.weight.numel() * _TYPES[self.dtype].itemsize
        if not 1 <= self.size <= most:
            raise EditError(
                f"The coded kernel of {self.layer} takes 1 to {most:,} bytes, not {self.size:,}."
            )
        return module

    def _data(self, weight: Tensor) -> bytes:
        if self.data is not None:
            data: bytes | None = self.data
        else:
            data = address_map.encode(tensors.patterns(weight), self.form)
        if data is None or len(data) != self.size:
            raise EditError(
                f"{self.layer} was to take {self.size:,} bytes as {self.form}, but takes "
                f"{len(data or b''):,}: plan the edit on the weights that it is applied to."
            )
        return data


def encoding(layer: str, weight: Tensor, choice: str) -> Encode | None:
    """Plan to code a kernel in the smallest of some forms; None where that saves nothing.

    Args:
        layer: its name.
        weight: finite numbers; negative zeros are coded as zeros.
        choice: ``hac``, ``shac``, ``ans``, ``auto`` for the smallest of them, or ``mask``.

    Raises:
        EditError: the weight is not finite.
    """
    if not torch.isfinite(weight).all():
        raise EditError(f"{layer} holds numbers that are not finite: they cannot be coded.")
    forms = address_map.FORMS if choice == "auto" else (choice,)
    found = address_map.smallest(tensors.patterns(weight + 0.0), forms)
    if found is None:
        return None
    kind = str(weight.dtype).removeprefix("torch.")
    return Encode(layer, address_map.form_of(found), len(found), kind, found)
