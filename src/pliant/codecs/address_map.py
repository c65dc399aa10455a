"""HAC and sHAC: a matrix as one stream of codewords, and as sparse columns with coded values.

Marinò, Ghidoli, Frasca, Malchiodi, "Compression strategies and space-conscious representations
for deep neural networks" (ICPR 2020). The paper's matrix W has a row per input and is read column
by column; here a matrix has a row per output, as PyTorch keeps it, and is read row by row, which
is the same order. Numbers are looked at as bit patterns, so every type comes back to the last bit.

A coded matrix is one string of bytes: a header (form, bytes per number, lanes, rows, columns,
number of symbols), the patterns of the symbols, and

- ``hac``: the code lengths, and the words of all numbers;
- ``shac``: the code lengths, how many numbers of each row are not zero, their columns, and the
  words of these numbers alone;
- ``ans``: shares instead of lengths, the first states, and the words: not of the paper, but what
  entropy coding has come to since;
- ``mask``: a bit for each number, rows in whole bytes, and those that are not zero as they are:
  no dictionary, so numbers may all differ.

A header of zeros stands for a matrix that is not there yet, and reads as zeros.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pliant.codecs import ans, huffman
from pliant.errors import ArtifactError

FORMS = ("hac", "shac", "ans")
ALL = (*FORMS, "mask")
MOST = 1 << 16  # distinct numbers; with more of them a dictionary saves nothing

_HEAD = struct.Struct("<BBHIII")
_SAMPLE = 4096

Array = NDArray[Any]


@dataclass(frozen=True)
class Alphabet:
    """The distinct numbers of a matrix, how often each occurs, and which one stands where."""

    symbols: Array
    counts: Array
    index: Array

    @classmethod
    def of(cls, flat: Array) -> Alphabet:
        """Count the numbers."""
        symbols = np.unique(flat)
        index = np.searchsorted(symbols, flat)  # faster than the sort that would give it
        return cls(symbols, np.bincount(index, minlength=len(symbols)), index)

    def of_values(self) -> Alphabet:
        """Leave out the pattern of zero, which stands first if it is there."""
        if not len(self.symbols) or self.symbols[0]:
            return self
        return Alphabet(self.symbols[1:], self.counts[1:], self.index[self.index > 0] - 1)

    @cached_property
    def lengths(self) -> NDArray[np.uint8]:
        """The Huffman code lengths of the symbols."""
        return huffman.lengths(self.counts) if len(self.counts) else np.empty(0, np.uint8)

    @property
    def bits(self) -> int:
        """Length of the Huffman stream."""
        return int(self.counts @ self.lengths.astype(np.int64))


def smallest(matrix: Array, forms: Sequence[str] = FORMS) -> bytes | None:
    """Code a matrix in whichever form is smallest, or return None if none saves anything.

    Args:
        matrix: (rows, columns) of unsigned patterns; a row per output.
        forms: to choose among, of `FORMS`; or ``mask`` alone.
    """
    flat = matrix.reshape(-1)
    if forms == ("mask",) and matrix.size:
        data = _mask(matrix)
        return data if len(data) < matrix.nbytes else None
    if not matrix.size or max(matrix.shape) >= 1 << 32 or _nearly_all_differ(flat):
        return None
    alphabet = Alphabet.of(flat)
    if len(alphabet.symbols) > MOST:
        return None
    found = [_ENCODERS[form](matrix, alphabet) for form in forms]
    best = min((data for data in found if data is not None), key=len, default=None)
    return best if best is not None and len(best) < matrix.nbytes else None


def encode(matrix: Array, form: str) -> bytes:
    """Code a matrix in a given form, whether that saves anything or not.

    Raises:
        ArtifactError: it holds too many distinct numbers for a dictionary, or none at all.
    """
    if form == "mask" and matrix.size:
        return _mask(matrix)
    alphabet = Alphabet.of(matrix.reshape(-1))
    known = matrix.size and len(alphabet.symbols) <= MOST
    data = _ENCODERS[form](matrix, alphabet) if known else None
    if data is None:
        raise ArtifactError(
            f"A matrix to be coded as {form} must hold 1 to {MOST:,} distinct numbers "
            f"({ans.MOST:,} for ans), not {len(alphabet.symbols):,}: share values first."
        )
    return data


def _nearly_all_differ(flat: Array) -> bool:
    """Say, from a sample, whether no dictionary could save anything."""
    sample = flat[:: max(1, len(flat) // _SAMPLE)]
    return bool(len(sample) > 256 and len(np.unique(sample)) > 0.75 * len(sample))


def csc(matrix: Array) -> tuple[Array, Array, Array]:
    """Return the numbers that are not zero, their columns, and how many each row has.

    For the paper's W, which has a row per input, these are data, row indices and column counts
    of its compressed sparse columns.
    """
    rows, columns = np.nonzero(matrix)
    width = _width(matrix.shape[1])
    counts = np.bincount(rows, minlength=matrix.shape[0]).astype(width)
    return matrix[rows, columns], columns.astype(width), counts


def _width(columns: int) -> np.dtype[Any]:
    """The type of indices and counts: the paper decides both by the number of inputs."""
    fits = (kind for kind in ("u1", "<u2", "<u4") if columns < 1 << 8 * np.dtype(kind).itemsize)
    return np.dtype(next(fits, "<u8"))


# ---------------------------------------------------------------- writing


def _header(form: str, matrix: Array, symbols: Array, lanes: int = 0) -> bytes:
    number = ALL.index(form) + 1
    return _HEAD.pack(number, matrix.itemsize, lanes, *matrix.shape, len(symbols))


def _dictionary(alphabet: Alphabet) -> tuple[bytes, Array, Array]:
    """Sort symbols by code length; return their bytes, the lengths, and the coded numbers."""
    order = np.argsort(alphabet.lengths, kind="stable")
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    code = alphabet.lengths[order]
    return alphabet.symbols[order].tobytes() + code.tobytes(), code, place[alphabet.index]


def _hac(matrix: Array, alphabet: Alphabet) -> bytes:
    head, code, symbols = _dictionary(alphabet)
    words = huffman.pack(symbols, code).astype(">u8").tobytes()
    return _header("hac", matrix, alphabet.symbols) + head + words


def _shac(matrix: Array, alphabet: Alphabet) -> bytes:
    alphabet = alphabet.of_values()
    head, code, symbols = _dictionary(alphabet)
    _, columns, counts = csc(matrix)
    words = huffman.pack(symbols, code).astype(">u8").tobytes() if len(code) else b""
    head = _header("shac", matrix, alphabet.symbols) + head
    return head + counts.tobytes() + columns.tobytes() + words


def _ans(matrix: Array, alphabet: Alphabet) -> bytes | None:
    if len(alphabet.symbols) > ans.MOST:
        return None
    lanes, share = ans.lanes(matrix.size), ans.shares(alphabet.counts)
    states, words = ans.pack(alphabet.index, share, lanes)
    stored = (share - 1).astype("<u2").tobytes() + states.astype("<u8").tobytes()
    head = _header("ans", matrix, alphabet.symbols, lanes) + alphabet.symbols.tobytes()
    return head + stored + words.astype("<u4").tobytes()


def _mask(matrix: Array) -> bytes:
    head = _header("mask", matrix, matrix[:0, 0])
    return head + np.packbits(matrix != 0, 1).tobytes() + matrix[matrix != 0].tobytes()


def masked_size(nonzero: int, shape: tuple[int, int], item: int) -> int:
    """Return the bytes of a matrix in the form ``mask``, from how many numbers are not zero."""
    return _HEAD.size + shape[0] * -(-shape[1] // 8) + nonzero * item


_ENCODERS = {"hac": _hac, "shac": _shac, "ans": _ans}


# ---------------------------------------------------------------- reading


@dataclass
class _Bytes:
    """The bytes of a coded matrix, taken from the left."""

    data: bytes
    at: int = 0

    def take(self, kind: Any, count: int | None = None) -> Array:
        """Read numbers; all that are left if no count is given."""
        size, left = np.dtype(kind).itemsize, len(self.data) - self.at
        if left % size if count is None else count * size > left:
            raise ArtifactError("A coded tensor is damaged: its bytes end too early.")
        found = np.frombuffer(self.data, kind, left // size if count is None else count, self.at)
        self.at += found.nbytes
        return found


def form_of(data: bytes) -> str:
    """Say which form a coded matrix has; nothing for one that is not there yet."""
    return ("", *ALL)[data[0]] if data and data[0] <= len(ALL) else "unknown"


def shape_of(data: bytes) -> tuple[int, int]:
    """Say which shape a coded matrix claims to have; nothing where its header is cut off."""
    return _HEAD.unpack_from(data)[3:5] if len(data) >= _HEAD.size else (0, 0)


def decode(data: bytes, shape: tuple[int, int], item: int) -> Array:
    """Return the matrix that was coded.

    Args:
        data: as `encode` gives it; it may come from anywhere.
        shape: that it must have.
        item: bytes per number that it must have.

    Raises:
        ArtifactError: the bytes are of no such matrix.
    """
    out = np.empty(shape, f"<u{item}")
    row = 0
    for block in blocks(data, shape, item, shape[0]):
        out[row : row + len(block)] = block
        row += len(block)
    return out


def blocks(data: bytes, shape: tuple[int, int], item: int, most: int) -> Iterator[Array]:
    """Yield the rows of a coded matrix in order, at most ``most`` of them at once.

    Raises:
        ArtifactError: the bytes are of no such matrix.
    """
    if len(data) < _HEAD.size:
        raise ArtifactError("A coded tensor is damaged: its header is cut off.")
    number, size, lanes, rows, columns, symbols = _HEAD.unpack_from(data)
    steps = [min(most, shape[0] - row) for row in range(0, shape[0], most)]
    if not number:
        yield from (np.zeros((step, shape[1]), f"<u{item}") for step in steps)
        return
    if number > len(ALL) or size != item or (rows, columns) != shape:
        raise ArtifactError(
            f"A coded tensor must be a {shape[0]} x {shape[1]} matrix with {item} bytes per "
            f"number, but is {rows} x {columns} with {size}, in form {number}."
        )
    source = _Bytes(data, _HEAD.size)
    table = source.take(f"<u{item}", symbols)
    if ALL[number - 1] == "mask":
        yield from _unmasked(source, f"<u{item}", shape, steps)
        return
    if ALL[number - 1] == "shac":
        yield from _sparse(source, table, shape, steps)
        return
    stream = _ans_stream(source, symbols, lanes, rows * columns) if number == 3 else None
    dense = stream or _huffman_stream(source, symbols)
    for step in steps:
        yield table[dense.take(step * columns)].reshape(step, columns)


def _huffman_stream(source: _Bytes, symbols: int, *skip: Array) -> huffman.Stream:
    code = source.take("u1", symbols)
    huffman.check(code)
    return huffman.Stream(source.take(">u8").astype(np.uint64), code)


def _ans_stream(source: _Bytes, symbols: int, lanes: int, count: int) -> ans.Stream:
    share = source.take("<u2", symbols).astype(np.int64) + 1
    ans.check(share)
    if not 1 <= lanes <= max(1, count):
        raise ArtifactError("A coded tensor is damaged: it has an impossible number of lanes.")
    states = source.take("<u8", lanes).astype(np.uint64)
    return ans.Stream(states, source.take("<u4").astype(np.uint32), share, count)


def _sparse(
    source: _Bytes, table: Array, shape: tuple[int, int], steps: Sequence[int]
) -> Iterator[Array]:
    code, width = source.take("u1", len(table)), _width(shape[1])
    counts = source.take(width, shape[0]).astype(np.int64)
    if counts.size and counts.max() > shape[1]:
        raise ArtifactError("A coded tensor is damaged: a row holds more numbers than it can.")
    places = source.take(width, int(counts.sum()))
    if len(places) and (places.max() >= shape[1] or not len(table)):
        raise ArtifactError("A coded tensor is damaged: a number stands outside of its row.")
    words = source.take(">u8").astype(np.uint64)
    if len(table):
        huffman.check(code)
    stream, at, row = huffman.Stream(words, code), 0, 0
    for step in steps:
        block = np.zeros((step, shape[1]), table.dtype)
        mine = counts[row : row + step]
        total = int(mine.sum())
        if total:
            values = table[stream.take(total)]
            block[np.repeat(np.arange(step), mine), places[at : at + total]] = values
        at, row = at + total, row + step
        yield block


def _unmasked(
    source: _Bytes, kind: str, shape: tuple[int, int], steps: Sequence[int]
) -> Iterator[Array]:
    width = -(-shape[1] // 8)
    flags = source.take("u1", shape[0] * width).reshape(shape[0], width)
    values, at, row = source.take(kind), 0, 0
    for step in steps:
        mine = np.unpackbits(flags[row : row + step], 1, shape[1]).astype(bool)
        at, row, first = at + int(mine.sum()), row + step, at
        if at > len(values) or (row == shape[0] and at < len(values)):
            raise ArtifactError("A coded tensor is damaged: it has not as many numbers as it says.")
        block = np.zeros(mine.shape, kind)
        block[mine] = values[first:at]
        yield block


# ---------------------------------------------------------------- sizes without coding


def predict(counts: Array, zeros: int, shape: tuple[int, int], item: int, form: str) -> int:
    """Return the bytes that a matrix will take, from how often its numbers occur.

    Exact for ``hac`` and ``shac``; an upper bound, a few bytes above, for ``ans``.

    Args:
        counts: of the numbers that are not zero, none of them 0.
        zeros: how many zeros there are.
        shape: rows and columns.
        item: bytes per number.
        form: see the module.
    """
    every = np.append(counts, zeros) if zeros else counts
    if form == "shac":
        width = _width(shape[1]).itemsize * (shape[0] + int(counts.sum()))
        return _HEAD.size + width + _coded(counts, item)
    if form == "hac":
        return _HEAD.size + _coded(every, item)
    share = ans.shares(every)
    bits = float(every @ (16 - np.log2(share)))
    words = 4 * -(-int(bits + 32) // 32)
    return _HEAD.size + len(every) * (item + 2) + 8 * ans.lanes(shape[0] * shape[1]) + words


def _coded(counts: Array, item: int) -> int:
    """The dictionary and the stream of a Huffman code."""
    if not len(counts):
        return 0
    bits = int(counts @ huffman.lengths(counts).astype(np.int64))
    return len(counts) * (item + 1) + 8 * -(-bits // 64)


# ---------------------------------------------------------------- the paper's accounting


def paper_size(matrix: Array, form: str) -> int:
    """Return the bytes that the paper counts for a coded matrix.

    The dictionary counts a code string with its end, a float32 and 8 bytes of overhead for each
    symbol; the stream counts in 64-bit words; sHAC adds a column for each number that is not zero
    and a count for each row.
    """
    alphabet = Alphabet.of(matrix.reshape(-1))
    extra = 0
    if form == "shac":
        alphabet = alphabet.of_values()
        width = _width(matrix.shape[1]).itemsize
        extra = width * (len(alphabet.index) + matrix.shape[0])
    dictionary = int((alphabet.lengths.astype(np.int64) + 1 + 4 + 8).sum())
    return dictionary + 8 * -(-alphabet.bits // 64) + extra
