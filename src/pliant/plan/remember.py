"""What is found out about a network before it is changed, kept while its sizes are tried."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from pliant.data.digest import digest_of

T = TypeVar("T")
_KEPT: ContextVar[dict[Hashable, Any] | None] = ContextVar("kept", default=None)
_TRYING: ContextVar[bool] = ContextVar("trying", default=False)


class Looking(Protocol):
    """What is used of a run."""

    model: nn.Module
    seed: int
    generator: torch.Generator
    state: dict[str, Any]

    @property
    def log(self) -> list[dict[str, Any]]:
        """The history."""

    @property
    def reasons(self) -> dict[str, str]:
        """Why layers are left alone."""


@contextmanager
def remembering() -> Iterator[None]:
    """Keep what `remembered` and `kept` are asked for, for compressions of one network.

    All of them must get the same data.
    """
    token = _KEPT.set({})
    try:
        yield
    finally:
        _KEPT.reset(token)


@contextmanager
def trial() -> Iterator[None]:
    """Make a network only to see its costs and its score: nothing else is measured."""
    token = _TRYING.set(True)
    try:
        yield
    finally:
        _TRYING.reset(token)


def trying() -> bool:
    """Say whether only costs and scores are wanted."""
    return _TRYING.get()


def kept(key: Hashable, make: Callable[[], T]) -> T:
    """Return what was made under a key before, or make it."""
    known = _KEPT.get()
    if known is None:
        return make()
    if key not in known:
        known[key] = make()
    found: T = known[key]
    return found


def fingerprint(model: nn.Module) -> str:
    """Return a digest of all numbers of a network; empty where nothing is remembered."""
    return "" if _KEPT.get() is None else digest_of(model.state_dict())


def remembered(run: Looking, key: Hashable, make: Callable[[], T]) -> T:
    """Return what was made of a network with these very weights before, or make it.

    Random numbers go on as if it had been made. What writes into the run is made every time.

    Args:
        run: what is looked at, and where random numbers come from.
        key: all else that it depends on.
        make: makes it; nobody may change it afterwards.
    """
    known = _KEPT.get()
    if known is None:
        return make()
    random = run.generator.get_state()
    key = (key, fingerprint(run.model), run.seed, random.numpy().tobytes())
    if key in known:
        found, random = known[key]
        run.generator.set_state(random)
        return found
    before = _written(run)
    found = make()
    if _written(run) == before:
        known[key] = found, run.generator.get_state()
    return found


def _written(run: Looking) -> tuple[Any, ...]:
    return len(run.log), digest_of(run.state), dict(run.reasons)
