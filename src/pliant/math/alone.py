"""The global random states of this process, which one thread at a time may seed."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

ALONE = threading.RLock()
"""Held by whoever changes a global random state and puts it back; other threads wait."""


@contextmanager
def forked(devices: Sequence[Any] = ()) -> Iterator[None]:
    """Draw as one likes and put the states of the CPU and of some devices back.

    Two threads that did so at once would draw each other's numbers, and one would put back what
    the other had seeded: the second waits for the first.
    """
    with ALONE, torch.random.fork_rng(devices=devices):
        yield
