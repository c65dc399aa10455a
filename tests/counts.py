"""Measures of work that no clock takes part in: calls of functions, bytes that are allocated."""

import sys
import tracemalloc
from collections.abc import Callable


def calls(work: Callable[[], object]) -> int:
    """Count the calls of functions that some work takes: a measure of time without a clock."""
    count = 0

    def see(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(see)
    try:
        work()
    finally:
        sys.setprofile(before)
    return count


def most(work: Callable[[], object]) -> int:
    """Measure the most bytes of objects and arrays, not of tensors, that some work holds."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
