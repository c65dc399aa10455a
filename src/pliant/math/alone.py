"""The global random states of this process, which one thread at a time may seed."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

ALONE = threading.RLock()
"""Held by whoever changes a global random state and puts it back; other threads wait."""


@contextmanager
def forked(devices: Sequence[Any] = (), seed: int | None = None) -> Iterator[None]:
    """Draw as one likes and put the states of the CPU and of some devices back.

    Two threads that did so at once would draw each other's numbers, and one would put back what
    the other had seeded: the second waits for the first.

    Args:
        devices: of CUDA.
        seed: to begin from; the states go on from where they are if None.
    """
    with ALONE, torch.random.fork_rng(devices=devices):
        if seed is not None:
            _begin(int(seed), devices)
        yield


def _begin(seed: int, devices: Sequence[Any]) -> None:
    """Seed what is there: `torch.manual_seed` takes as long as a small network for what is not."""
    torch.default_generator.manual_seed(seed)
    for device in devices:
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)
