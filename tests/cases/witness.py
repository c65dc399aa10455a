"""Where options count that change nothing on toys of a few samples."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from pliant.budget import Budget
from pliant.registry import build
from pliant.run import start
from pliant.testing import TOYS, Toy
from pliant.testing.counted import counts


def on(toy: Toy, spec: str, option: str, budget: Budget | None = None) -> Callable[[], None]:
    """Return a test of an option on another network than those of its case."""
    return partial(counts, [build(spec)], option, [toy], budget)


def on_many(
    spec: str,
    option: str,
    budget: Budget | None = None,
    toy: Toy = TOYS["plain"],
    samples: int = 300,
) -> Callable[[], None]:
    """Return a test of an option on more samples than one batch of a measurement holds."""
    return on(replace(toy, samples=samples), spec, option, budget)


def untrained(one: str, other: str, budget: Budget) -> Callable[[], None]:
    """Return a test that two specs give other networks from 300 samples, without any training."""

    def check() -> None:
        toy, found = replace(TOYS["plain"], samples=300), []
        for spec in (one, other):
            run = start(toy.model(), build(spec), budget, data=toy.data())
            run.finish()
            found.append([str(run.edits), *(p.sum().item() for p in run.model.parameters())])
        assert found[0] != found[1], f"{one} and {other} give one network"

    return check
