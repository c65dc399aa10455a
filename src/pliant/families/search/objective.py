"""How the expected cost enters the loss of an architecture."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from pliant.errors import MethodError
from pliant.families.search.bilevel import Bilevel, Gates
from pliant.families.search.bilevel import step as bilevel_step
from pliant.families.search.expected import Axis, Expected, expect
from pliant.run import Run

Form = Literal["sum", "product"]
AnyForm = Literal["sum", "product", "log"]


def price(run: Run, axis: Axis, form: Form, reference: float | None, method: str) -> None:
    """Price all candidates, and keep the prices in the state of the run.

    Args:
        run: whose network has them.
        axis: what is counted.
        form: see `objective`.
        reference: the cost that counts as one; what the search begins with in the mean if None.
        method: its name, for refusals.

    Raises:
        MethodError: the product has no logarithm above 0 for some architecture.
    """
    found = expect(run, axis)
    mean = found.fixed + sum(float(prices.mean()) for prices in found.prices.values())
    least = found.fixed + sum(float(prices.min()) for prices in found.prices.values())
    reference = mean if reference is None else reference
    if form == "product" and min(least, reference) <= 1:
        raise MethodError(
            f"{method}: the product takes logarithms of costs above 1, but the cheapest network "
            f"costs {least:.3g} and the reference {reference:.3g} here: take form='sum'."
        )
    run.state["expected"] = {**found.plain(), "reference": max(reference, 1e-12)}
    run.note(counted=axis, cost=mean, least=least)


def step(
    run: Run, plan: Bilevel, form: AnyForm, strength: float, gates: Gates | None = None
) -> None:
    """Move the architecture by the loss of the task and the expected cost, if a step is due.

    Args:
        run: with prices.
        plan: when and how.
        form: see `objective`.
        strength: of the cost.
        gates: see `bilevel.Gates`.
    """
    bilevel_step(run, plan, lambda loss: objective(run, loss, form, strength), gates)


def objective(run: Run, loss: Tensor, form: AnyForm, strength: float) -> Tensor:
    """Return the loss of an architecture.

    Args:
        run: with prices.
        loss: of the task.
        form: "sum": loss + strength * (cost - reference) / reference; "product": loss *
            (log cost / log reference) ** strength; "log": loss + strength * log cost.
        strength: of the cost.
    """
    state = run.state["expected"]
    cost = Expected.from_plain(state).of(run.model)
    if form == "log":
        return loss + strength * cost.log().to(loss.dtype)
    reference = state["reference"]
    if form == "sum":
        return loss + (strength * (cost - reference) / reference).to(loss.dtype)
    return loss * (cost.log() / math.log(reference)).pow(strength).to(loss.dtype)


def now(run: Run, chosen: dict[str, str]) -> float:
    """Return the cost of one architecture by the prices."""
    return Expected.from_plain(run.state["expected"]).at(chosen, run.model)
