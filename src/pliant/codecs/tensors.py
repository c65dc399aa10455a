"""Tensors of any type as coded bytes and back, equal to the last bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pliant.codecs import address_map, packing
from pliant.codecs.packing import WIDEST
from pliant.errors import ArtifactError

CHOICES = {"hac": ("hac", "shac"), "ans": ("ans",), "auto": address_map.FORMS}
"""The forms among which the smallest is taken, by what was asked for."""


def patterns(tensor: Tensor) -> NDArray[Any]:
    """Return a tensor as a matrix of bit patterns, with a row for each entry of its first axis."""
    plain = tensor.detach().cpu().contiguous()
    flat = plain.reshape(-1).view(torch.uint8).numpy().view(f"<u{plain.element_size()}")
    return flat.reshape(matrix(tuple(tensor.shape)))


def matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Return rows and columns of a tensor's matrix; vectors and numbers are one row."""
    size = int(np.prod(shape, dtype=np.int64))
    return (shape[0], size // shape[0]) if len(shape) > 1 and shape[0] else (1, size)


def pack(tensor: Tensor, choice: str, bits: int = WIDEST) -> bytes | None:
    """Code a tensor in the smallest of some forms; None where that is not smaller than it is.

    Args:
        tensor: of any type and shape.
        choice: a key of `CHOICES`.
        bits: of the numbers that `pliant.codecs.packing` packed into bytes: these numbers are
            coded then, and not the bytes, in which several of them meet.
    """
    if bits == WIDEST:
        return address_map.smallest(patterns(tensor), CHOICES[choice])
    numbers = packing.unpack(tensor.detach().cpu(), bits, _count(tensor.numel(), bits))
    found = address_map.smallest(patterns(numbers), CHOICES[choice])
    return found if found is not None and len(found) < tensor.numel() else None


def unpack(data: bytes, shape: Sequence[int], dtype: torch.dtype, bits: int = WIDEST) -> Tensor:
    """Return the tensor that was coded.

    Args:
        data: as `pack` gave it; with bits, also as it gave it without.
        shape: of the tensor.
        dtype: of its numbers.
        bits: as for `pack`.

    Raises:
        ArtifactError: the bytes are of no such tensor.
    """
    if bits < WIDEST:
        count = _count(matrix(shape)[1], bits)
        if address_map.shape_of(data) == (1, count):
            numbers = _tensor(address_map.decode(data, (1, count), 1), torch.uint8)
            if int(numbers.max()) >= 2**bits:
                raise ArtifactError(
                    f"A coded tensor is damaged: a number has more than {bits} bits."
                )
            return packing.pack(numbers, bits)
    found = address_map.decode(data, matrix(shape), dtype.itemsize)
    return _tensor(found, dtype).reshape(tuple(shape))


def _count(size: int, bits: int) -> int:
    """How many numbers of some bits fit into bytes; the last may be none that was packed, a 0."""
    return size * WIDEST // bits


def rows(data: bytes, shape: Sequence[int], dtype: torch.dtype, most: int) -> Iterator[Tensor]:
    """Yield the entries along the first axis of a coded tensor, at most ``most`` at once.

    Raises:
        ArtifactError: the bytes are of no such tensor.
    """
    for block in address_map.blocks(data, matrix(shape), dtype.itemsize, most):
        yield _tensor(block, dtype).reshape(len(block), *shape[1:])


def _tensor(block: NDArray[Any], dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(block).view(np.uint8).reshape(-1)).view(dtype)
