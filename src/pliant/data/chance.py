"""Random states of their own for what makes batches; the caller's stay as they are."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pliant.cost import mapped, tensors
from pliant.math.alone import ALONE


def generator(key: int) -> torch.Generator:
    """Make a random generator from a number."""
    return torch.Generator().manual_seed(key)


def key_of(*numbers: int) -> int:
    """Mix numbers into one seed, so that (1, 2) and (2, 1) are far apart."""
    return int(np.random.SeedSequence([abs(n) for n in numbers]).generate_state(1)[0])


def seeded(batches: Iterable[Any], key: int) -> Iterator[Any]:
    """Iterate under random states of its own: torch, numpy and Python, seeded by `key`.

    Only the making of a batch sees them; between batches the caller's states are in place.
    """
    iterator: Iterator[Any] | None = None
    states: tuple[Any, ...] | None = None
    while True:
        with ALONE:
            outer = _random_states()
            try:
                if states is None:
                    _seed(key)
                else:
                    _restore(states)
                if iterator is None:
                    iterator = iter(batches)
                batch = unbound(next(iterator))
                states = _random_states()
            except StopIteration:
                return
            finally:
                _restore(outer)
        yield batch


def under(key: int, make: Callable[[], Any]) -> Any:
    """Make something under random states seeded by `key`; the caller's stay as they are."""
    return next(seeded((make() for _ in range(1)), key))


def _random_states() -> tuple[Any, ...]:
    return torch.default_generator.get_state(), np.random.get_state(), random.getstate()


def _restore(states: tuple[Any, ...]) -> None:
    torch.default_generator.set_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])


def _seed(key: int) -> None:
    torch.default_generator.manual_seed(key)
    np.random.seed(key % 2**32)
    random.seed(key)


def unbound(batch: Any) -> Any:
    """Cut a batch off from what its tensors were computed from; itself where there is nothing."""
    bound = any(tensor.requires_grad for tensor in tensors(batch))
    return mapped(Tensor.detach, batch) if bound else batch
