"""What a compressed network may cost, and the one allocator that spends it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from pliant.cost import Cost, LayerCost
from pliant.errors import BudgetError

Limits = Mapping[str, float]
"""Absolute upper bounds by axis, for example ``{"params": 60_000}``."""

_SUFFIX = {"k": 1e3, "m": 1e6, "g": 1e9}


@dataclass(frozen=True)
class Budget:
    """Bounds what the result may cost: an int is a count, a float a fraction of the dense network.

    Args:
        params: parameters (a count, or a fraction between 0 and 1).
        macs: multiply-accumulates of one sample.
        bytes: bytes of the state dict.
        latency: milliseconds on the target, or a fraction if at most 1 and given as ``"50%"``.

    Raises:
        BudgetError: a value is not positive, or a fraction is above 1.

    >>> Budget(params=0.3).limits(Cost(params=1000, macs=9, bytes=4000))
    {'params': 300.0}
    """

    params: int | float | None = None
    macs: int | float | None = None
    bytes: int | float | None = None
    latency: float | None = None

    def __post_init__(self) -> None:
        for axis, value in self.given().items():
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise BudgetError(f"The budget's {axis} must be a number, not {value!r}.")
            if not math.isfinite(value) or value <= 0:
                raise BudgetError(f"The budget's {axis} must be positive, not {value}.")
            if isinstance(value, float) and value > 1 and axis != "latency":
                raise BudgetError(
                    f"The budget's {axis}={value} is neither a fraction (a float up to 1) nor a "
                    f"count (an int): write {axis}={int(value)} if a count is meant."
                )

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read ``"params=0.3,macs=12M"``: fractions, percentages, counts with k, M or G.

        Raises:
            BudgetError: an axis is unknown or a value is not a number.
        """
        axes = {field.name for field in fields(cls)}
        values: dict[str, Any] = {}
        for item in filter(None, (part.strip() for part in text.split(","))):
            axis, _, value = (part.strip() for part in item.partition("="))
            if axis not in axes or not value:
                raise BudgetError(
                    f"Cannot read the budget {item!r}: write axis=value with an axis of "
                    f"{', '.join(sorted(axes))}, for example params=0.3."
                )
            values[axis] = _number(axis, value)
        return cls(**values)

    def given(self) -> dict[str, int | float]:
        """Return the axes that are bounded, with their values as they were written."""
        return {f.name: v for f in fields(self) if (v := getattr(self, f.name)) is not None}

    def limits(self, dense: Cost) -> dict[str, float]:
        """Return the bounds in absolute numbers, given the cost of the dense network.

        Raises:
            BudgetError: a latency fraction is asked and ``dense`` has no measured latency.
        """
        return {axis: self._absolute(axis, value, dense) for axis, value in self.given().items()}

    def _absolute(self, axis: str, value: int | float, dense: Cost) -> float:
        if axis == "latency":
            raise BudgetError(
                "A latency budget needs times measured on a target, which this version cannot "
                "search yet: bound params, macs or bytes instead."
            )
        return float(value) if isinstance(value, int) else value * float(getattr(dense, axis))


def _number(axis: str, text: str) -> int | float:
    try:
        if text.endswith("%"):
            return float(text[:-1]) / 100
        scale = _SUFFIX.get(text[-1].lower(), 1)
        number = float(text[:-1] if scale != 1 else text.replace("_", ""))
    except ValueError:
        raise BudgetError(
            f"Cannot read {axis}={text}: expected a fraction such as 0.3 or 30%, "
            "or a count such as 60000 or 1.2M."
        ) from None
    if scale == 1 and number <= 1 and "." in text:
        return number
    return round(number * scale) if axis != "latency" else number


@dataclass(frozen=True)
class Option:
    """One way to treat one layer: how much it loses, what it costs, and the edit that does it.

    Args:
        score: what is lost, 0 for nothing; comparable between layers.
        cost: the layer's cost if this option is taken.
        edit: the edit to apply, or None to leave the layer as it is.
    """

    score: float
    cost: LayerCost
    edit: Any = None


def allocate(
    options: Mapping[str, Sequence[Option]],
    limits: Limits,
    *,
    fixed: Cost | None = None,
    rule: Literal["max", "sum"] = "max",
) -> list[Any]:
    """Choose one option for every layer so that the sum of costs stays within the limits.

    ``rule="max"`` makes the worst score as small as possible: one threshold for the whole
    network, which is NRMF's one p. ``rule="sum"`` makes the sum of scores small (Lagrangian
    relaxation); it may starve single layers.

    Args:
        options: for each layer, what can be done with it.
        limits: what the whole network may cost, by axis.
        fixed: the cost of everything that has no options.

    Returns:
        The edits of the chosen options, in the order of ``options``; layers whose best option
        is to stay as they are contribute nothing.

    Raises:
        BudgetError: even the cheapest options exceed a limit; the message names what is reachable.
    """
    fits = _Bounds(limits, fixed or Cost(0, 0, 0))
    weight = _weigher(limits)
    pruned = {layer: _undominated(rows, weight) for layer, rows in options.items()}
    cheapest = {layer: rows[-1] for layer, rows in pruned.items()}
    if not fits(cheapest):
        raise BudgetError(fits.unreachable(cheapest))
    chosen = _least_sum(pruned, weight, fits) if rule == "sum" else _least_worst(pruned, fits)
    chosen = _spend_rest(chosen, pruned, fits)
    return [row.edit for row in chosen.values() if row.edit is not None]


def cheapest(options: Mapping[str, Sequence[Option]], worst: float) -> list[Any]:
    """Choose for every layer the cheapest option whose score is at most ``worst``.

    Returns:
        The edits of the chosen options; layers that are best left alone contribute nothing.
    """
    chosen = (
        min((row for row in rows if row.score <= worst + 1e-9), key=lambda row: row.cost.params)
        for rows in options.values()
    )
    return [row.edit for row in chosen if row.edit is not None]


def _weigher(limits: Limits) -> Callable[[LayerCost], float]:
    """Cost as one number: each axis in units of its limit."""
    if not limits:
        return lambda cost: float(cost.params)
    return lambda cost: sum(
        getattr(cost, axis) / max(bound, 1e-9) for axis, bound in limits.items()
    )


def _undominated(rows: Sequence[Option], weight: Callable[[LayerCost], float]) -> list[Option]:
    """Options sorted by rising score and falling cost, none worse than another in both."""
    kept: list[Option] = []
    for row in sorted(rows, key=lambda row: (row.score, weight(row.cost))):
        if not kept or weight(row.cost) < weight(kept[-1].cost):
            kept.append(row)
    return kept


@dataclass(frozen=True)
class _Bounds:
    limits: Limits
    fixed: Cost

    def total(self, chosen: Mapping[str, Option], axis: str) -> float:
        return float(
            getattr(self.fixed, axis) + sum(getattr(row.cost, axis) for row in chosen.values())
        )

    def __call__(self, chosen: Mapping[str, Option]) -> bool:
        return all(self.total(chosen, axis) <= bound for axis, bound in self.limits.items())

    def unreachable(self, cheapest: Mapping[str, Option]) -> str:
        missed = [
            f"{axis}={bound:,.0f} (the least reachable is {self.total(cheapest, axis):,.0f})"
            for axis, bound in self.limits.items()
            if self.total(cheapest, axis) > bound
        ]
        return (
            f"The budget {' and '.join(missed)} cannot be met by the layers that may be "
            "changed: ask for more, or let the method touch more layers."
        )


def _least_worst(options: Mapping[str, list[Option]], fits: _Bounds) -> dict[str, Option]:
    def at(level: float) -> dict[str, Option]:
        # A layer that has no option this good keeps its best one.
        return {
            layer: next((row for row in reversed(rows) if row.score <= level), rows[0])
            for layer, rows in options.items()
        }

    levels = sorted({row.score for rows in options.values() for row in rows})
    low, high = 0, len(levels) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(at(levels[middle])) else (middle + 1, high)
    return at(levels[low]) if levels else {}


def _least_sum(
    options: Mapping[str, list[Option]], weight: Callable[[LayerCost], float], fits: _Bounds
) -> dict[str, Option]:
    def at(price: float) -> dict[str, Option]:
        return {
            layer: min(rows, key=lambda row: row.score + price * weight(row.cost))
            for layer, rows in options.items()
        }

    low, high = 0.0, 1e-6
    while not fits(at(high)):
        low, high = high, high * 4
        if high > 1e18:
            return {layer: rows[-1] for layer, rows in options.items()}
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(at(middle)) else (middle, high)
    return at(high)


def _spend_rest(
    chosen: dict[str, Option], options: Mapping[str, list[Option]], fits: _Bounds
) -> dict[str, Option]:
    """Improve the worst layers by one step each while the limits still allow it."""
    chosen = dict(chosen)
    for layer in sorted(chosen, key=lambda name: -chosen[name].score):
        rows = options[layer]
        position = rows.index(chosen[layer])
        if position and fits({**chosen, layer: rows[position - 1]}):
            chosen[layer] = rows[position - 1]
    return chosen
