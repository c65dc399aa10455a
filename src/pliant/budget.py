"""What a compressed network may cost, and the options among which a plan chooses."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pliant.cost import Cost, LayerCost
from pliant.errors import BudgetError, must_be

Limits = Mapping[str, float]
"""Absolute upper bounds by axis, for example ``{"params": 60_000}``."""

AXES = ("params", "macs", "bytes", "latency")
"""What a budget can bound; a network costs so much of each."""

LOSE = 2.0  # points of the score that a result may lose where nothing else is said

_UNITS = {"k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


@dataclass(frozen=True)
class Budget:
    """Bounds what the result may cost: an int is a count, a float a fraction of the dense network.

    Args:
        params: parameters (a count, or a fraction between 0 and 1).
        macs: multiply-accumulates of one sample.
        bytes: bytes of the state dict.
        latency: milliseconds on the target (a number), or a share of the dense network's
            (text, such as ``"50%"``).
        drop: points of a percent of the score that may be lost, of the same network without
            compression; `LOSE` if None. It is no axis: it judges what came out.

    Raises:
        BudgetError: a value is not positive, or a fraction is above 1.

    >>> Budget(params=0.3).limits(Cost(params=1000, macs=9, bytes=4000))
    {'params': 300.0}
    """

    params: int | float | None = None
    macs: int | float | None = None
    bytes: int | float | None = None
    latency: float | str | None = None
    drop: float | None = None

    def __post_init__(self) -> None:
        if self.drop is not None and (
            isinstance(self.drop, bool)
            or not isinstance(self.drop, int | float)
            or not 0 <= self.drop <= 100
        ):
            raise BudgetError(f"drop is in points of the score, 0 to 100, not {self.drop!r}.")
        for axis, value in self.given().items():
            if axis == "latency" and isinstance(value, str):
                share_of(value)
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise BudgetError(f"The budget's {axis} must be a number, not {value!r}.")
            if not math.isfinite(value) or value <= 0:
                raise BudgetError(f"The budget's {axis} must be positive and finite, not {value}.")
            if isinstance(value, float) and value > 1 and axis != "latency":
                raise BudgetError(
                    f"The budget's {axis}={value} is neither a fraction (a float up to 1) nor a "
                    f"count (an int): write {axis}={int(value)} if a count is meant."
                )

    @classmethod
    def of(cls, budget: Budget | str | None) -> Budget | None:
        """Read a budget where it is text, and let it be where it is one or none.

        Raises:
            BudgetError: it is something else, or the text is malformed.
        """
        return budget if budget is None or isinstance(budget, Budget) else cls.parse(budget)

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read ``"params=0.3,macs=12M"``: fractions, percentages, counts with k, M or G.

        Bytes may be written as ``500kB`` (500,000) or ``1MiB`` (1,048,576). A latency is in
        milliseconds, with or without ``ms``, or a percentage; ``drop`` in points.

        Raises:
            BudgetError: an axis is unknown or a value is not a number.
        """
        words = "a Budget, text such as 'params=0.3', or None"
        must_be(str, "A budget", text, BudgetError, words)
        axes = {*AXES, "drop"}
        values: dict[str, Any] = {}
        for item in filter(None, (part.strip() for part in text.split(","))):
            axis, _, value = (part.strip() for part in item.partition("="))
            if axis in values:
                raise BudgetError(f"The budget {text!r} names {axis} twice: name it once.")
            if axis not in axes or not value:
                raise BudgetError(
                    f"Cannot read the budget {item!r}: write axis=value with an axis of "
                    f"{', '.join(sorted(axes))}, for example params=0.3."
                )
            values[axis] = _number(axis, value)
        return cls(**values)

    def given(self) -> dict[str, Any]:
        """Return the axes that are bounded, with their values as they were written."""
        return {axis: v for axis in AXES if (v := getattr(self, axis)) is not None}

    def limits(self, dense: Cost) -> dict[str, float]:
        """Return the bounds in absolute numbers, given the cost of the dense network.

        Raises:
            BudgetError: a latency fraction is asked and ``dense`` has no measured latency.
        """
        return {axis: self._absolute(axis, value, dense) for axis, value in self.given().items()}

    def _absolute(self, axis: str, value: Any, dense: Cost) -> float:
        if axis == "latency":
            if dense.latency_ms is None:
                raise BudgetError(
                    "A latency budget needs a target to measure on: name one, such as "
                    "target='onnxruntime', or bound params, macs or bytes instead."
                )
            return share_of(value) * dense.latency_ms if isinstance(value, str) else float(value)
        return float(value) if isinstance(value, int) else value * float(getattr(dense, axis))


def share_of(text: str) -> float:
    """Read a share of the dense network's latency: ``"50%"`` is 0.5.

    Raises:
        BudgetError: the text is no percentage, or not between 0 and 100.
    """
    try:
        share = float(text.removesuffix("%")) / 100 if text.endswith("%") else math.nan
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise BudgetError(
            f"A latency is a number of milliseconds, or a share of the dense network's such as "
            f"'50%', up to 100 %, not {text!r}."
        )
    return share


def shown(axis: str, value: float) -> str:
    """Write a number of an axis for people: counts whole, milliseconds with three digits."""
    return f"{value:.3g} ms" if axis == "latency" else f"{value:,.0f}"


def _number(axis: str, text: str) -> int | float | str:
    if axis == "latency" and text.endswith("%"):
        return text
    try:
        if axis == "drop":
            return float(text)
        if text.endswith("%"):
            return float(text[:-1]) / 100
        digits, scale = _unit(axis, text)
        number = float(digits) * scale
    except ValueError:
        wanted = _WANTED.get(
            axis, "a fraction such as 0.3 or 30%, or a count such as 60000 or 1.2M"
        )
        raise BudgetError(f"Cannot read {axis}={text}: expected {wanted}.") from None
    if scale != 1 and math.isfinite(number):
        return round(number)
    whole = number.is_integer() and ("." not in text or number > 1)
    return int(number) if whole and axis != "latency" else number


_WANTED = {
    "latency": "milliseconds such as 5 or 5ms, or a share of the dense network's such as 50%",
    "bytes": (
        "a fraction such as 0.3 or 30%, or a count such as 60000, 500kB, 1.2MB (1,000,000 each) or "
        "1MiB (1,048,576)"
    ),
}


def _unit(axis: str, text: str) -> tuple[str, int]:
    """Split a number from its unit: k, M, G, and of bytes kB, MB, GB, KiB, MiB, GiB."""
    if axis == "latency":
        return text.removesuffix("ms"), 1
    pattern = r"(.*?)(?:([kmgKMG]i)B|([kmgKMG]?)B?)" if axis == "bytes" else r"(.*?)([kmgKMG]?)"
    found = re.fullmatch(pattern, text)
    digits, *units = found.groups() if found else (text,)
    unit = next(filter(None, units), "")
    return digits, _UNITS.get(unit.lower(), 1)


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
