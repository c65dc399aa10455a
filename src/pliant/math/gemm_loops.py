"""The inner loops of the product of small integers, compiled where numba is installed.

One loop nest for all widths of codes and of accumulators: numba compiles it anew for every type of
``total``, so a sum of 16 bits is a vector of 16-bit lanes, twice as many as of 32 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from pliant.errors import MissingExtraError, require

WIDTH = 8  # columns of a panel


def compiled(rows: int, *, halves: bool) -> Callable[..., None] | None:
    """Return the loops for panels of so many rows; None where numba is not installed.

    Args:
        rows: of a panel of the left matrix.
        halves: whether a byte holds two codes; else one.
    """
    return _compiled(rows, halves)


@cache
def _compiled(rows: int, halves: bool) -> Callable[..., None] | None:
    try:
        jit = require("numba", "code").njit(cache=True, nogil=True)
    except MissingExtraError:
        return None
    found: Callable[..., None] = jit(_halves(rows) if halves else _wholes(rows))
    return found


def _halves(rows: int) -> Callable[..., None]:
    """Loops over bytes of two codes: ``out += left @ right``, a block of depth at a time."""

    def multiply(
        left: Any, right: Any, block: int, total: Any, low: Any, high: Any, out: Any
    ) -> None:
        depth = left.shape[1]
        for begin in range(0, depth, block):
            steps = min(block, depth - begin)
            for panel in range(left.shape[0]):
                for step in range(steps):
                    for row in range(rows):
                        low[step, row] = left[panel, begin + step, row] & 15
                        high[step, row] = left[panel, begin + step, row] >> 4
                for bar in range(right.shape[0]):
                    total[:] = 0
                    for step in range(0, steps - 1, 2):  # two bytes at once: fewer stores
                        for column in range(WIDTH):
                            one, two = (
                                right[bar, begin + step, column],
                                right[bar, begin + step + 1, column],
                            )
                            a, b, c, d = one & 15, one >> 4, two & 15, two >> 4
                            for row in range(rows):
                                total[column, row] += (
                                    low[step, row] * a
                                    + high[step, row] * b
                                    + low[step + 1, row] * c
                                    + high[step + 1, row] * d
                                )
                    if steps % 2:
                        for column in range(WIDTH):
                            last = right[bar, begin + steps - 1, column]
                            a, b = last & 15, last >> 4
                            for row in range(rows):
                                total[column, row] += (
                                    low[steps - 1, row] * a + high[steps - 1, row] * b
                                )
                    for column in range(WIDTH):
                        for row in range(rows):
                            out[panel * rows + row, bar * WIDTH + column] += total[column, row]

    return multiply


def _wholes(rows: int) -> Callable[..., None]:
    """The same over bytes of one code; ``high`` is not read."""

    def multiply(
        left: Any, right: Any, block: int, total: Any, low: Any, high: Any, out: Any
    ) -> None:
        depth = left.shape[1]
        for begin in range(0, depth, block):
            steps = min(block, depth - begin)
            for panel in range(left.shape[0]):
                for step in range(steps):
                    for row in range(rows):
                        low[step, row] = left[panel, begin + step, row]
                for bar in range(right.shape[0]):
                    total[:] = 0
                    for step in range(steps):
                        for column in range(WIDTH):
                            a = right[bar, begin + step, column]
                            for row in range(rows):
                                total[column, row] += low[step, row] * a
                    for column in range(WIDTH):
                        for row in range(rows):
                            out[panel * rows + row, bar * WIDTH + column] += total[column, row]

    return multiply
