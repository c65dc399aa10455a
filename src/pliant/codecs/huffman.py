"""Canonical Huffman codes: only the lengths are stored, and decoding needs no tree.

A code is the list of its lengths, shortest first; symbols are numbered in that order. Codewords
of one length follow each other like numbers, and every codeword of a longer one comes after them,
so one sorted list of left-aligned codewords tells symbols apart. Streams are 64-bit words, the
first bit is the most significant one, and the last word is filled up with zeros.
"""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

from pliant.codecs import loops
from pliant.errors import ArtifactError

LIMIT = 32  # bits of the longest codeword; without a limit one needs 5.7 million numbers for more
CHUNK = 1 << 18  # symbols packed, and bits looked at, in one go: bounds the memory
_TABLE = 12  # bits that the first look-up sees; longer codewords are searched from there

Array = NDArray[np.integer]


def lengths(counts: Array, limit: int = LIMIT) -> NDArray[np.uint8]:
    """Return the codeword length of every symbol, given how often it occurs.

    The sum of counts times lengths is the least that any prefix code reaches. Only where a
    codeword would be longer than ``limit``, counts are halved until none is. A single symbol gets
    one bit, since an empty code would never advance.
    """
    if len(counts) == 1:
        return np.ones(1, np.uint8)
    while (found := _depths(counts)).max() > limit:
        counts = (np.asarray(counts) + 1) // 2
    return found.astype(np.uint8)


def _depths(counts: Array) -> NDArray[np.int64]:
    """Merge the two lightest subtrees until one is left; a leaf's depth is its length."""
    leaves = len(counts)
    heap = [(int(count), node) for node, count in enumerate(counts)]
    heapq.heapify(heap)
    parent = np.zeros(2 * leaves - 1, np.int64)
    for node in range(leaves, 2 * leaves - 1):
        (light, first), (heavy, second) = heapq.heappop(heap), heapq.heappop(heap)
        parent[[first, second]] = node
        heapq.heappush(heap, (light + heavy, node))
    depths = np.zeros(2 * leaves - 1, np.int64)
    for node in range(2 * leaves - 3, -1, -1):
        depths[node] = depths[parent[node]] + 1
    return depths[:leaves]


def check(code: Array) -> None:
    """Refuse lengths, shortest first, that no Huffman code has.

    Raises:
        ArtifactError: they are out of order or bounds, or some bits would mean nothing.
    """
    code = code.astype(np.int64)
    single = len(code) == 1 and code[0] == 1
    ordered = bool(len(code)) and code[0] >= 1 and code[-1] <= LIMIT and (np.diff(code) >= 0).all()
    if not ordered or not (single or _kraft(code) == 1 << LIMIT):
        raise ArtifactError("A coded tensor is damaged: its code lengths are of no Huffman code.")


def _kraft(code: Array) -> int:
    return int(np.left_shift(1, LIMIT - code).sum())


def _aligned(code: Array) -> NDArray[np.uint64]:
    """Return every codeword at the left end of 64 bits, in ascending order."""
    sizes = np.left_shift(1, LIMIT - code.astype(np.int64))
    return (np.cumsum(sizes) - sizes).astype(np.uint64) << np.uint64(64 - LIMIT)


def pack(symbols: Array, code: Array) -> NDArray[np.uint64]:
    """Write symbols one after the other into 64-bit words.

    Args:
        symbols: numbers into ``code``.
        code: lengths, shortest first.
    """
    total = int(np.bincount(symbols, minlength=len(code)) @ code.astype(np.int64))
    words = np.zeros(-(-total // 64), np.uint64)
    aligned, begin = _aligned(code), 0
    for start in range(0, len(symbols), CHUNK):
        part = symbols[start : start + CHUNK]
        size = code[part].astype(np.int64)
        ends = begin + np.cumsum(size)
        _put(words, aligned[part], ends - size, size)
        begin = int(ends[-1])
    return words


def _put(words: NDArray[np.uint64], bits: NDArray[np.uint64], at: Array, size: Array) -> None:
    """Put left-aligned codewords at bit positions; one may reach into the next word."""
    word, offset = at >> 6, (at & 63).astype(np.uint64)
    first = np.flatnonzero(np.diff(word, prepend=-1))
    words[word[first]] |= np.bitwise_or.reduceat(bits >> offset, first)
    over = np.flatnonzero((at & 63) + size > 64)
    words[word[over] + 1] |= bits[over] << (np.uint64(64) - offset[over])


class Stream:
    """Symbols read from packed words, any number at a time."""

    def __init__(self, words: NDArray[np.uint64], code: Array) -> None:
        """Begin at the first bit; ``code`` has passed `check`."""
        self.words = np.append(words, np.zeros(2, np.uint64))  # a look beyond the end is safe
        self.end, self.position = 64 * len(words), 0
        self.code, self.aligned = code.astype(np.int64), _aligned(code)

    def take(self, count: int) -> Array:
        """Read the next symbols.

        Raises:
            ArtifactError: the words end before.
        """
        if count > self.end - self.position:  # every symbol has a bit at least
            raise ArtifactError("A coded tensor is damaged: its words end too early.")
        compiled = loops.compiled(count)
        out = self._compiled(compiled, count) if compiled else self._plain(count)
        if self.position > self.end or self.position < 0:
            raise ArtifactError("A coded tensor is damaged: its words end too early.")
        return out

    def _compiled(self, compiled: loops.Loops, count: int) -> Array:
        bits = min(_TABLE, int(self.code[-1]))
        shift = np.uint64(64 - bits)
        heads = np.arange(1 << bits, dtype=np.uint64) << shift
        found = np.searchsorted(self.aligned, heads, "right") - 1
        table = np.append(found, len(self.code) - 1).astype(np.int32)
        out = np.empty(count, np.int32)
        self.position = compiled.follow(
            self.words, self.position, self.end, table, shift, self.aligned, self.code, out
        )
        return out

    def _plain(self, count: int) -> Array:
        """Find the symbol at every bit position at once, then walk from one to the next."""
        found, left = [np.empty(0, np.int64)], count
        while left and self.position < self.end:
            at = np.arange(self.position, min(self.end, self.position + CHUNK))
            word, offset = at >> 6, (at & 63).astype(np.uint64)
            rest = self.words[word + 1] >> np.uint64(1) >> (np.uint64(63) - offset)
            window = (self.words[word] << offset) | rest
            symbol = np.searchsorted(self.aligned, window, "right") - 1
            places: list[int] = []
            jump, here = self.code[symbol].tolist(), 0
            while here < len(jump) and len(places) < left:
                places.append(here)
                here += jump[here]
            found.append(symbol[places])
            left, self.position = left - len(places), self.position + here
        if left:
            self.position = self.end + 1
        return np.concatenate(found)
