"""Products of unsigned integers of few bits, exact in accumulators of 16 bits.

A real number x is s (q - z) with a code q in 0..2^p - 1, a scale s and a code z of zero. A product
of two codes of 4 bits is at most 225, so 291 of them fit into 16 unsigned bits: sums are cut into
blocks of that depth, and the blocks are added in 32 bits (Trusov et al., ICPR 2020).

Codes are kept in panels: for 4 bits and less two neighbours in depth share a byte, the first in
its lower half, and the bytes of all rows of a panel for one step of depth lie side by side.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pliant.math.gemm_loops import WIDTH, compiled

ROWS = 64  # of a panel: two registers of 512 bits with 32 lanes; the paper's 24 are for NEON
FEW = 8  # rows up to which a panel has only so many
FLOAT = 2**24  # whole numbers below it are exact in float32
_SUMS: dict[int, Any] = {16: np.uint16, 32: np.uint32}


def deepest(bits: int, accumulator: int = 16) -> int:
    """Return how many products of two codes fit into an unsigned accumulator, whatever they are.

    >>> deepest(4), deepest(8), deepest(8, 32)
    (291, 1, 66051)
    """
    return int((2**accumulator - 1) // (2**bits - 1) ** 2)


def accumulator(bits: int) -> int:
    """Return the bits of the accumulator: 16, where a block is then worth its name."""
    return 16 if deepest(bits) > 1 else 32


# ---------------------------------------------------------------- codes


def affine(low: float, high: float, bits: int) -> tuple[float, int]:
    """Return scale and code of zero of a range, which is widened to hold zero.

    Args:
        low: the least number to be told apart.
        high: the largest one.
        bits: of a code.
    """
    low, high, most = min(low, 0.0), max(high, 0.0), 2**bits - 1
    scale = (high - low) / most
    if scale < torch.finfo(torch.float32).tiny:  # nothing but zeros
        return 1.0, 0
    return scale, max(0, min(most, round(-low / scale)))


def codes(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Return the code of every number, uint8: what `torch.fake_quantize_per_tensor_affine` takes.

    Args:
        x: finite numbers.
        scale: of the codes; broadcasts.
        zero: the code of zero.
        bits: of a code.
    """
    return ((x * (1 / scale)).round() + zero).clamp(0, 2**bits - 1).to(torch.uint8)


# ---------------------------------------------------------------- panels


def halved(bits: int) -> bool:
    """Say whether two codes share a byte."""
    return bits <= 4


def panel_bytes(rows: int, depth: int, width: int, bits: int) -> int:
    """Say how many bytes the panels of a matrix take."""
    return -(-rows // width) * width * (-(-depth // 2) if halved(bits) else depth)


def panels(matrix: Tensor, width: int, bits: int) -> Tensor:
    """Lay codes into panels; rows and depth are filled up with zeros.

    Args:
        matrix: (rows, depth) of uint8.
        width: rows of a panel.
        bits: of a code.

    Returns:
        (panels, steps, width) of uint8.

    >>> panels(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 2, 4).tolist()
    [[[33, 0], [3, 0]]]
    """
    rows, depth = matrix.shape
    deep = -depth % 2 if halved(bits) else 0
    full = torch.nn.functional.pad(matrix, (0, deep, 0, -rows % width))
    if halved(bits):
        full = full[:, 0::2] | full[:, 1::2] << 4
    return full.view(-1, width, full.shape[1]).transpose(1, 2).contiguous()


def opened(packed: Tensor, rows: int, depth: int, bits: int) -> Tensor:
    """Return the matrix that `panels` was given."""
    full = packed.transpose(1, 2).reshape(-1, packed.shape[1])
    if halved(bits):
        full = torch.stack([full & 15, full >> 4], 2).flatten(1)
    return full[:rows, :depth]


# ---------------------------------------------------------------- the product


def product(
    left: Tensor, right: Tensor, bits: int, *, block: int = 0, sums: int = 0, plain: bool = False
) -> Tensor:
    """Multiply codes: every sum over the depth of left times right.

    Compiled loops and plain PyTorch give the same numbers, also where a block is too deep for its
    accumulator and its sum wraps around.

    Args:
        left: (rows, depth), codes in uint8.
        right: panels of (columns, depth), `WIDTH` columns each.
        bits: of a code.
        block: products that are added in one accumulator; as many as fit if 0.
        sums: bits of the accumulator, 16 or 32; as `accumulator` has it if 0.
        plain: use PyTorch, also where numba is installed.

    Returns:
        (rows, columns filled up to panels) of int32.
    """
    sums = sums or accumulator(bits)
    block = block or deepest(bits, sums)
    few = FEW if len(left) <= FEW else ROWS
    loops = None if plain or left.is_cuda else compiled(few, halves=halved(bits))
    if loops is None:
        return _plain(left, right, bits, block, sums)
    share = 2 if halved(bits) else 1
    steps = max(1, min(block // share, right.shape[1]))
    packed = panels(left, few, bits).numpy()
    out = np.zeros((len(packed) * few, len(right) * WIDTH), np.int32)
    low, high, total = (np.zeros((n, few), _SUMS[sums]) for n in (steps, steps, WIDTH))
    loops(packed, right.numpy(), steps, total, low, high, out)
    return torch.from_numpy(out[: len(left)])


def _plain(left: Tensor, right: Tensor, bits: int, block: int, sums: int) -> Tensor:
    """Add products of a block in floating point, where they are exact, and wrap them around."""
    depth = left.shape[1]
    other = opened(right, len(right) * WIDTH, depth, bits)
    share = 2 if halved(bits) else 1
    block = max(share, block // share * share)
    kind = torch.float32 if block * (2**bits - 1) ** 2 < FLOAT else torch.float64
    out = torch.zeros(len(left), len(other), dtype=torch.int64, device=left.device)
    for begin in range(0, depth, block):
        one, two = (m[:, begin : begin + block].to(kind) for m in (left, other))
        out += (one @ two.T).to(torch.int64) % 2**sums
    return out.to(torch.int32)
