"""The best network that any of a short list of methods makes: tried, measured, explained."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from pliant.api.network import once
from pliant.api.within import (
    LEAST,
    axis_of,
    bisect,
    budget,
    caution,
    check_scored,
    divided,
    measured,
    silent,
    slipped,
    within,
)
from pliant.budget import LOSE, Budget, shown
from pliant.compose import Stage, chain, resolve
from pliant.cost import Cost, bare
from pliant.data import Data, Train
from pliant.errors import AccuracyWarning, BudgetError, MethodError, ModelError
from pliant.method import Method
from pliant.plan.remember import remembering, trial
from pliant.result import Result

PROBES = 5  # sizes of each method: every further one costs as much and halves the step
LARGER = 1.25  # sizes, where what follows loses too much at the size found without it
FINALISTS = 2  # how many are trained
GOALS = ("latency", "params", "macs", "bytes")
COLUMN = {"latency": "latency_ms"}  # of a goal in a row, where it has another name


@dataclass(frozen=True)
class Plan:
    """One way to make a network smaller: a method whose size is found, and what follows it.

    Args:
        size: spec of the method whose budget is searched; empty if there is none.
        then: spec of what follows; empty if nothing does.
    """

    size: str = ""
    then: str = ""

    def __str__(self) -> str:
        return " -> ".join(filter(None, (self.size, self.then)))


INT8 = "groupwise_ptq(bits=8, activations=8, independent=20, joint=20)"  # 8 bits need few steps
SHORT_LIST = (
    Plan(then=INT8),
    Plan("nrmf"),
    Plan("group_fisher"),
    Plan("nrmf", INT8),
    Plan("group_fisher", INT8),
)
"""What `auto` tries, the cheapest first."""


def auto(
    model: nn.Module,
    data: Any,
    bounds: Budget | str | None = None,
    *,
    goal: str | None = None,
    train: Train | None = None,
    plans: tuple[Plan, ...] = SHORT_LIST,
    probes: int = PROBES,
    watch: Callable[[dict[str, Any]], None] = lambda row: None,
    **asked: Any,
) -> Result:
    """Try the short list of methods, and return the network that measures best.

    Without limits every method is taken to the smallest size within the drop, and the network
    that is smallest or fastest wins. With limits every method is taken to them, and the network
    that lost least wins, by its score and then by its loss. The choice is made on the validation
    split; the winner is made once more and scored on the test split. A network that is not faster
    than the dense one, or not smaller, does not win.

    Args:
        model: any network; it stays as it is.
        data: as for `compress`, with labels to score.
        bounds: limits and a ``drop``; 2 points where none is given.
        goal: what is made small where there are no limits: ``latency`` (the default with a
            ``target``), ``bytes`` (the default without one), ``params`` or ``macs``.
        train: the training of the finalists, which are the best that fit, or where nothing fits
            those that lost least; without it nothing is trained.
        plans: what is tried.
        probes: how many sizes of each method are tried.
        watch: told the plan that is being tried.
        asked: everything else that `compress` takes: ``target``, ``seed``, ``example``, ...

    Returns:
        The winner's result; `report.tried` tells what was tried and why the winner won.

    Raises:
        BudgetError: nothing that was tried meets the limits and the drop, or nothing is smaller or
            faster than the network as it is; the message names the nearest.
        DataError: nothing is labelled.
    """
    limits = Budget.parse(bounds) if isinstance(bounds, str) else bounds or Budget()
    wanted = goal or ("latency" if asked.get("target") is not None else "bytes")
    if wanted not in GOALS:
        raise BudgetError(f"A goal is one of {', '.join(GOALS)}, not {wanted!r}.")
    if wanted == "latency" and asked.get("target") is None:
        raise BudgetError("The goal latency needs a target to measure on, such as 'onnxruntime'.")
    seed = asked.get("seed", 0)
    decide, check = divided(Data.of(data, seed=seed).read_by(bare(model)), seed)
    wider = caution(decide, check)
    search = _Search(model, decide, limits, wanted, probes, watch, asked, wider)
    with remembering(), silent():
        for plan in plans:
            search.add(plan)
        if train is not None:
            for found in search.finalists():
                most = found.row["share"] if found.fits else None
                search.add(found.plan, train, most=most or 1.0)
        winner = search.winner()
        told = {**asked, **_training(winner.plan, train if winner.row["trained"] else None)}
        last = once(model, check, winner.method, Budget(drop=search.drop), **told)
    given, misses = limits.given(), search.misses(last)
    report = replace(last.report, tried=search.rows(winner), misses=misses, met=not misses)
    if given:
        report = replace(report, budget=given)
    if report.verdict is not None and report.verdict.holds is False:
        warnings.warn(slipped(report.verdict), AccuracyWarning, stacklevel=2)
    return replace(last, report=report)


@dataclass(frozen=True)
class Found:
    """One network that was tried: how it is made again, and its row of measurements."""

    plan: Plan
    method: Method
    row: dict[str, Any]

    @property
    def fits(self) -> bool:
        """Whether it meets the limits and stays within the drop."""
        return bool(self.row.get("within") and self.row.get("met"))


@dataclass
class _Search:
    """Makes and measures networks; nothing that was tried is forgotten."""

    model: nn.Module
    data: Data
    limits: Budget
    goal: str
    probes: int
    watch: Callable[[dict[str, Any]], None]
    asked: dict[str, Any]
    caution: float = 1.0
    tried: list[Found] = field(default_factory=list)

    @property
    def drop(self) -> float:
        return LOSE if self.limits.drop is None else self.limits.drop

    def add(self, plan: Plan, train: Train | None = None, most: float = 1.0) -> None:
        """Try a plan at the sizes that a bisection asks for; one without a size once.

        With limits the largest size that meets them is looked for, without them the smallest
        within the drop. What follows a size is tried at the one that was found without it, where
        that is sure to meet the limits, and without limits at a larger one if it loses too much.
        """
        alone = self._found(Plan(plan.size), train)
        if not plan.size:
            self.make(plan, None, train)
        elif plan.then and alone and not {"bytes", "latency"} & {*self.limits.given()}:
            if not self.make(plan, alone, train).fits and not self.limits.given():
                self.make(plan, min(1.0, LARGER * alone), train)
        elif self.limits.given():
            # The largest share that meets them is the smallest of its inverse.
            bisect(
                lambda part: self.make(plan, LEAST * most / part, train).row.get("met", True),
                self.probes, LEAST, most,
            )  # fmt: skip
        else:
            bisect(
                lambda share: self.make(plan, share, train).fits, self.probes, LEAST * most, most
            )

    def _found(self, plan: Plan, train: Train | None) -> float | None:
        """Return the size of a plan that was found: the smallest, or with limits the largest."""
        trained = train is not None
        fitting = [found.row for found in self.tried if found.fits and found.plan == plan]
        shares = [row["share"] for row in fitting if row["trained"] is trained]
        return (max if self.limits.given() else min)(shares, default=None)

    def make(self, plan: Plan, share: float | None, train: Train | None) -> Found:
        """Make one network and measure it; what is refused is a row too."""
        began = time.monotonic()
        row = {"plan": str(plan), "share": share, "trained": train is not None}
        self.watch({"phase": f"trying {plan}" + (f" at {100 * share:.0f} %" if share else "")})
        method = self._method(plan, share)
        try:
            with trial():
                told = {**self.asked, **_training(plan, train)}
                made = once(self.model, self.data, method, Budget(drop=self.drop), **told)
        except (BudgetError, ModelError, MethodError) as error:
            row |= {"refused": str(error)}
        else:
            check_scored(made)
            row |= measured(made)
            fine = within(made.report.verdict, self.drop, self.caution)
            row |= {"met": not self.misses(made), "within": fine, "gains": self._gains(made)}
        found = Found(plan, method, row | {"seconds": time.monotonic() - began})
        self.tried.append(found)
        return found

    def _method(self, plan: Plan, share: float | None) -> Method:
        if not share:
            return resolve(plan.then)
        stages = [Stage(resolve(plan.then), share=0)] if plan.then else []
        size = resolve(plan.size)
        timed = self.asked.get("target") is not None and self.goal == "latency"
        axis = axis_of(size, None, timed=timed)
        return chain(Stage(size, budget(axis, share)), *stages)

    def _gains(self, made: Result) -> bool:
        """Say whether a network costs less than the dense one: in time, by more than its spread."""
        column = COLUMN.get(self.goal, self.goal)
        before, after = (getattr(side, column) for side in (made.report.before, made.report.after))
        if before is None or after is None:
            return True
        spread = made.report.after.latency_spread_ms if self.goal == "latency" else 0
        return bool(self.limits.given() or after + (spread or 0) < before)

    def misses(self, made: Result) -> tuple[str, ...]:
        """Say which limits a network misses."""
        before, after = made.report.before, made.report.after
        dense = Cost(before.params, before.macs, before.bytes, latency_ms=before.latency_ms)
        limits = self.limits.limits(dense)
        return tuple(
            f"{axis} {shown(axis, cost)} > {shown(axis, most)}"
            for axis, most in limits.items()
            if (cost := getattr(after, COLUMN.get(axis, axis))) is None or cost > most
        )

    def ranked(self) -> list[Found]:
        """Return the best network of every plan that fits, the best first."""
        best: dict[tuple[str, bool], Found] = {}
        useful = [found for found in self.tried if found.fits and found.row["gains"]]
        for found in sorted(useful, key=self._rank):
            best.setdefault((str(found.plan), found.row["trained"]), found)
        return list(best.values())

    def finalists(self) -> list[Found]:
        """Return what is worth a training: the best that fit, or else those that lost least."""
        near: dict[Plan, Found] = {}
        for found in sorted(self._scored(), key=lambda found: found.row["lost"]):
            near.setdefault(found.plan, found)
        return (self.ranked() or list(near.values()))[:FINALISTS]

    def _scored(self) -> list[Found]:
        return [found for found in self.tried if found.row.get("lost") is not None]

    def _rank(self, found: Found) -> tuple[float, ...]:
        """Order networks; with limits the loss decides between those that answer equally well."""
        cost, lost = found.row[COLUMN.get(self.goal, self.goal)], found.row["lost"]
        cost, loss = (float("inf") if n is None else n for n in (cost, found.row.get("loss")))
        return (lost, loss, cost) if self.limits.given() else (cost, lost)

    def winner(self) -> Found:
        """Return the best network.

        Raises:
            BudgetError: nothing fits.
        """
        if ranked := self.ranked():
            return ranked[0]
        if fitting := [found for found in self.tried if found.fits]:
            best = min(fitting, key=self._rank)
            raise BudgetError(
                f"Nothing that loses less than {self.drop:g} has less {self.goal} than the network "
                f"as it is; {best.plan} came nearest: keep the network, allow more, or take "
                "another goal or target."
            )
        if not (scored := self._scored()):
            raise BudgetError(f"Nothing could be made: {self.tried[-1].row['refused']}")
        near = min(scored, key=lambda found: (not found.row["met"], found.row["lost"])).row
        met = "meets" if near["met"] else "misses"
        sure = "" if near["low"] is None else f" ({near['low']:.2f} to {near['high']:.2f})"
        raise BudgetError(
            f"Nothing that was tried meets the limits and loses less than {self.drop:g} for sure; "
            f"the nearest, {near['plan']}, {met} the limits and lost {near['lost']:.2f}{sure}: "
            "allow more, or train."
        )

    def rows(self, winner: Found) -> tuple[dict[str, Any], ...]:
        """Return what was tried as plain rows, the winner with the reason."""
        others = [found for found in self.ranked() if found.plan != winner.plan]
        column = COLUMN.get(self.goal, self.goal)
        why = "alone in meeting the limits and the drop"
        if others and self.limits.given():
            why = f"lost least of {len(others) + 1} that meet the limits; next {others[0].plan}"
        elif others:
            more = others[0].row[column] / winner.row[column]
            why = f"the least {self.goal} within the drop; next {others[0].plan} with {more:.2f} x"
        return tuple(
            found.row | ({"chosen": True, "why": why} if found is winner else {})
            for found in self.tried
        )


def _training(plan: Plan, train: Train | None) -> dict[str, Any]:
    """Let all of a training come before what follows the size: rounded weights do not train."""
    if train is not None and plan.then:
        train = replace(train, epochs=train.epochs + train.finetune, finetune=0)
    return {"train": train, "strict": False}
