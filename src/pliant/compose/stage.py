"""A part of a composed method: which bounds it takes, and whether parts go together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pliant.budget import AXES, Budget
from pliant.errors import ChainError
from pliant.method import Method
from pliant.registry import entry_of
from pliant.run import Run


@dataclass(frozen=True)
class Stage:
    """One method of a chain.

    Args:
        method: what is done.
        budget: its own budget, checked when the stage is over; without one it gets the axes of
            the chain's that only it claims.
        share: its part of the training steps, relative to the other stages; 0 for none.
    """

    method: Method
    budget: Budget | None = None
    share: float = 1.0


def budgets_of(stages: Sequence[Stage], budget: Budget | None) -> list[Budget | None]:
    """Give each axis to the one stage whose ``saves`` claims it."""
    given: list[dict[str, Any]] = [stage.budget.given() if stage.budget else {} for stage in stages]
    for axis, value in (budget.given() if budget else {}).items():
        claims = [i for i, stage in enumerate(stages) if saves(stage.method, axis)]
        free = [i for i in claims if not stages[i].budget]
        if len(free) > 1:
            names = " and ".join(name_of(stages[i].method) for i in free)
            raise ChainError(
                f"{names} both save {axis}: give each its own with Stage(method, Budget(...))."
            )
        if free:
            given[free[0]][axis] = value
        elif not any(axis in axes for axes in given):
            raise ChainError(_unclaimed([stages[i] for i in claims], stages, axis))
    return [Budget(**axes) if axes else None for axes in given]


def _unclaimed(claims: Sequence[Stage], stages: Sequence[Stage], axis: str) -> str:
    if claims:
        names = " and ".join(name_of(stage.method) for stage in claims)
        return f"{names} could save {axis} but has a budget of its own: name {axis} there."
    names = ", ".join(name_of(stage.method) for stage in stages)
    return (
        f"None of {names} says that it saves {axis}: drop it from the budget, or give it to one "
        "of them with Stage(method, Budget(...))."
    )


def saves(method: Method, axis: str) -> bool:
    """Say whether a method, or any part of it, saves what an axis of a budget bounds."""
    if method.parts:
        return any(saves(part, axis) for part in method.parts)
    entry = entry_of(method)
    return entry is not None and axis in entry.saves


def name_of(method: object) -> str:
    """Return the registered name of a method; of a composed one those of its parts."""
    if entry := entry_of(method):
        return entry.name
    named = " -> ".join(map(name_of, method.parts)) if isinstance(method, Method) else ""
    return named or type(method).__name__.lower()


def saved_by(method: Method) -> tuple[str, ...]:
    """Return the axes of a budget that a method, or a stage of it, can meet."""
    entry = entry_of(method)
    return entry.saves if entry else tuple(axis for axis in AXES if saves(method, axis))


def let_refuse(method: Method, run: Run, budget: Budget | None) -> None:
    """Let a part refuse, on the network as it is and with a state that is thrown away."""
    method.refuse(
        replace(run, method=method, planner=replace(run.planner, budget=budget), state={})
    )


def check_losses(parts: Sequence[Method]) -> None:
    """Refuse parts of which one would undo what another does to the loss."""
    for number, part in enumerate(parts):
        others = [other for other in parts if other is not part]
        weighing = [other for other in others if other.uses("weigh")]
        replaces = _any(part, "replaces_loss")
        if weighing and (replaces or _any(part, "draws_batches")):
            does = "replaces it" if replaces else "trains on batches of its own too"
            raise ChainError(
                f"{name_of(weighing[0])} weighs the loss of every sample of the loop, but "
                f"{name_of(part)} {does}: use one of them."
            )
        if not replaces:
            continue
        if clash := [o for o in others if _any(o, "replaces_loss") or _any(o, "draws_batches")]:
            raise ChainError(
                f"{name_of(part)} replaces the loss, and {name_of(clash[0])} would go on with "
                "another one: use one of them."
            )
        if lost := [other for other in parts[:number] if other.uses("loss")]:
            raise ChainError(
                f"{name_of(part)} replaces the loss, and what {name_of(lost[0])} adds to it would "
                f"be lost: name {name_of(part)} first."
            )


def _any(method: Method, claim: str) -> bool:
    """Say whether a method, or any part of it, makes a claim about the loss."""
    return bool(getattr(method, claim)) or any(_any(part, claim) for part in method.parts)
