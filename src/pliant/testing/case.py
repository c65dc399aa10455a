"""What is known of one method beforehand: how to run it, where it must refuse, what it computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pliant.budget import Budget
from pliant.registry import build, get
from pliant.testing.toys import SPECIAL, TOYS, Toy


@dataclass(frozen=True)
class Case:
    """One registered method and what its checks need to know.

    Args:
        method: its registered name.
        spec: as it is run on the toys, for example with short intervals; the name if empty.
        budget: for every toy; seven tenths of the first axis that it saves if None.
        variants: other specs, each run on the first toy only.
        toys: names of the toys it is shown, in any order; a method that recovers or clusters is
            shown all problems of `pliant.testing.solved`.
        refuses: toys or problems it must refuse, and a part of the sentence it says then; all
            others must work.
        fails: checks that fail, and why; each of them must fail.
        own: worked examples, equations of the paper: functions without arguments.
        witnesses: tests that fail when an option is ignored, by option, for those that change
            nothing on the toys, neither by default nor in a variant.
    """

    method: str
    spec: str = ""
    budget: Budget | None = None
    variants: tuple[str, ...] = ()
    toys: tuple[str, ...] = tuple(TOYS)
    refuses: Mapping[str, str] = field(default_factory=dict)
    fails: Mapping[str, str] = field(default_factory=dict)
    own: tuple[Callable[[], None], ...] = ()
    witnesses: Mapping[str, Callable[[], None]] = field(default_factory=dict)

    def shown(self) -> tuple[Toy, ...]:
        """Return its toys and those it refuses, in one order whatever that of the case is."""
        names = {*self.toys, *self.refuses}
        return tuple(toy for toy in (*TOYS.values(), *SPECIAL.values()) if toy.name in names)

    def built(self) -> Any:
        """Construct the method as it is run."""
        return build(self.spec or self.method)

    def bounds(self) -> Budget | None:
        """Return the budget it is run with."""
        return self.budget or usual_budget(get(self.method).saves)


def usual_budget(saves: tuple[str, ...]) -> Budget | None:
    """Bound the first axis to seven tenths; None for methods that save nothing."""
    axes = [axis for axis in saves if axis != "latency"]
    return Budget(**{axes[0]: 0.7}) if axes else None
