"""Asymmetric numeral systems: the entropy of the symbols, without Huffman's rounding to bits.

Range ANS (Duda, "Asymmetric numeral systems", arXiv 1311.2540, 2013) with 64-bit states and
shares of 2^-16. Symbol i belongs to lane i mod the number of lanes; each lane has a state of its
own and all take their 32-bit words from one stream, so a row of lanes is decoded at once.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from pliant.codecs import loops
from pliant.errors import ArtifactError

MOST = 4096  # symbols: the rarest still has a fair share of 2^16
_BITS, _WHOLE, _LOW = np.uint64(16), 1 << 16, np.uint64(1 << 32)
_HALF, _MASK = np.uint64(32), np.uint64(0xFFFF)

Array = NDArray[np.integer]


def shares(counts: Array) -> NDArray[np.int64]:
    """Return shares of 2^16 in proportion to the counts, none of them 0."""
    counts = np.asarray(counts, np.int64)
    found = np.maximum(1, counts * _WHOLE // counts.sum())
    while (rest := _WHOLE - int(found.sum())) != 0:
        largest = int(found.argmax())
        found[largest] += rest if rest > 0 else -min(-rest, int(found[largest]) // 2)
    return found


def check(share: Array) -> None:
    """Refuse shares that do not make up the whole.

    Raises:
        ArtifactError: they do not.
    """
    if not len(share) or share.min() < 1 or int(share.sum()) != _WHOLE:
        raise ArtifactError("A coded tensor is damaged: its shares do not sum to the whole.")


def lanes(count: int) -> int:
    """Return how many lanes a stream of so many symbols gets; each costs about 4 bytes."""
    return min(1024, max(1, math.isqrt(count) // 32))


def pack(symbols: Array, share: Array, width: int) -> tuple[NDArray[np.uint64], NDArray[np.uint32]]:
    """Write symbols in the order in which `Stream` reads them.

    Args:
        symbols: numbers into ``share``.
        share: as `shares` gives them.
        width: number of lanes.

    Returns:
        The states to begin reading with, and the words.
    """
    part, begin = share.astype(np.uint64), _begins(share)
    states = np.full(width, _LOW, np.uint64)
    words = [np.empty(0, np.uint32)]
    for start in reversed(range(0, len(symbols), width)):
        row = symbols[start : start + width]
        state, mine = states[: len(row)], part[row]
        full = state >> np.uint64(48) >= mine
        words.append(state[full].astype(np.uint32))  # the lower half
        state[full] >>= _HALF
        state[:] = ((state // mine) << _BITS) + state % mine + begin[row]
    return states, np.concatenate(words[::-1])


def _begins(share: Array) -> NDArray[np.uint64]:
    return (np.cumsum(share) - share).astype(np.uint64)


class Stream:
    """Symbols read from packed words, any number at a time."""

    def __init__(self, states: NDArray[np.uint64], words: Array, share: Array, count: int) -> None:
        """Begin at the first of ``count`` symbols; ``share`` has passed `check`."""
        self.states, self.words, self.count = states.copy(), words, count
        self.share, self.begin = share.astype(np.uint64), _begins(share)
        self.slots = np.repeat(np.arange(len(share), dtype=np.int32), share)
        self.position = self.taken = 0
        self.all: Array | None = None

    def take(self, count: int) -> Array:
        """Read the next symbols.

        Raises:
            ArtifactError: the words end before.
        """
        compiled = loops.compiled(self.count)
        if compiled:
            out: Array = np.empty(count, np.int32)
            self.position = compiled.unwind(
                *(self.words, self.position, self.states, self.taken),
                *(self.slots, self.share, self.begin, out),
            )
        else:
            if self.all is None:
                self.all = self._whole()
            out = self.all[self.taken : self.taken + count]
        self.taken += count
        if self.position < 0:
            raise ArtifactError("A coded tensor is damaged: its words end too early.")
        return out

    def _whole(self) -> Array:
        """Read all symbols, a row of lanes at once."""
        width, out = len(self.states), np.empty(self.count, np.int32)
        for start in range(0, self.count, width):
            row = out[start : start + width]
            state = self.states[: len(row)]
            slot = state & _MASK
            row[:] = self.slots[slot]
            state[:] = self.share[row] * (state >> _BITS) + slot - self.begin[row]
            low = np.flatnonzero(state < _LOW)
            fresh = self.words[self.position : self.position + len(low)]
            if len(fresh) < len(low):
                self.position = -1
                break
            state[low] = (state[low] << _HALF) | fresh
            self.position += len(low)
        return out
