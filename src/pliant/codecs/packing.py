"""Whole numbers of a few bits each, packed without gaps into bytes."""

from __future__ import annotations

import torch
from torch import Tensor

WIDEST = 8  # bits of one number


def packed_bytes(count: int, bits: int) -> int:
    """Say how many bytes ``count`` numbers of ``bits`` bits take."""
    return -(-count * bits // 8)


def pack(values: Tensor, bits: int) -> Tensor:
    """Pack whole numbers in ``[0, 2**bits)``, the lowest bit of the first number first.

    Args:
        values: any shape; read in order of its rows.
        bits: of each number, from 0 to 8; 0 stores nothing.

    Returns:
        ``packed_bytes(values.numel(), bits)`` bytes (uint8).

    >>> pack(torch.tensor([1, 2, 3]), 4).tolist()
    [33, 3]
    """
    flat = values.flatten().to(torch.uint8)
    if bits == WIDEST:
        return flat.clone()
    places = torch.arange(bits, dtype=torch.uint8, device=flat.device)
    digits = (flat[:, None] >> places & 1).flatten()
    missing = packed_bytes(flat.numel(), bits) * WIDEST - digits.numel()
    octets = torch.cat([digits, digits.new_zeros(missing)]).view(-1, WIDEST)
    return (octets << torch.arange(WIDEST, dtype=torch.uint8, device=flat.device)).sum(
        1, dtype=torch.uint8
    )


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return the ``count`` numbers (uint8) that ``pack`` packed.

    >>> unpack(torch.tensor([33, 3], dtype=torch.uint8), 4, 3).tolist()
    [1, 2, 3]
    """
    if bits == WIDEST:
        return packed[:count].clone()
    places = torch.arange(WIDEST, dtype=torch.uint8, device=packed.device)
    if WIDEST % bits == 0:  # no number lies in two bytes
        mask = (1 << bits) - 1
        return (packed[:, None] >> places[:: max(bits, 1)] & mask).flatten()[:count]
    digits = (packed[:, None] >> places & 1).flatten()[: count * bits].view(count, bits)
    return (digits << places[:bits]).sum(1, dtype=torch.uint8)
