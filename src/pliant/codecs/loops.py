"""The two loops that look at one symbol after the other, compiled where numba is installed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from pliant.errors import MissingExtraError, require

WORTH = 1 << 12  # symbols from which compiled code pays for the import of numba


@dataclass(frozen=True)
class Loops:
    """The compiled loops."""

    follow: Callable[..., int]
    unwind: Callable[..., int]


def compiled(count: int) -> Loops | None:
    """Return the compiled loops; None for few symbols, and where numba is not installed."""
    return _compiled() if count >= WORTH else None


@cache
def _compiled() -> Loops | None:
    try:
        jit = require("numba", "code").njit(cache=True, nogil=True)
    except MissingExtraError:
        return None
    return Loops(jit(_follow), jit(_unwind))


def _follow(
    words: Any, position: int, end: int, table: Any, shift: Any, aligned: Any, code: Any, out: Any
) -> int:
    """Read Huffman symbols into ``out``; return the bit after the last, -1 beyond the end."""
    for i in range(len(out)):
        word, offset = position >> 6, np.uint64(position & 63)
        window = words[word] << offset
        if offset:
            window |= words[word + 1] >> (np.uint64(64) - offset)
        head = np.int64(window >> shift)
        symbol, most = table[head], table[head + 1]
        while symbol < most:  # one look for all but the longest codewords
            middle = (symbol + most + 1) >> 1
            if aligned[middle] <= window:
                symbol = middle
            else:
                most = middle - 1
        position += code[symbol]
        if position > end:
            return -1
        out[i] = symbol
    return position


def _unwind(
    words: Any, position: int, states: Any, first: int, slots: Any, share: Any, begin: Any, out: Any
) -> int:
    """Read ANS symbols into ``out``; return the next word, -1 beyond the end."""
    lanes = len(states)
    lane = first % lanes
    for i in range(len(out)):
        state = states[lane]
        slot = state & np.uint64(0xFFFF)
        symbol = slots[slot]
        state = share[symbol] * (state >> np.uint64(16)) + slot - begin[symbol]
        if state < np.uint64(1 << 32):
            if position >= len(words):
                return -1
            state = (state << np.uint64(32)) | np.uint64(words[position])
            position += 1
        states[lane] = state
        out[i] = symbol
        lane = lane + 1 if lane + 1 < lanes else 0
    return position
