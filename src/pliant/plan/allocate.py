"""Spends a budget over layers: one allocator for ranks, channels and bits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pliant.budget import Limits, Option, shown
from pliant.cost import Cost, LayerCost
from pliant.errors import BudgetError


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
        BudgetError: even the cheapest options exceed a limit, or no plan was found that keeps
            several limits at once; the message names what is reachable.
    """
    fits = _Bounds(limits, fixed or Cost(0, 0, 0))
    search = _least_sum if rule == "sum" else _least_worst
    found, near = [], []
    for weight in _weighers(limits):
        pruned = {layer: _undominated(rows, weight) for layer, rows in options.items()}
        least = {layer: rows[-1] for layer, rows in pruned.items()}
        if fits(least):
            found.append(_spend_rest(search(pruned, weight, fits), pruned, fits))
        near.append(least)
    if not found and not fits.missed(options):  # each limit alone can be kept
        rising = {layer: sorted(rows, key=lambda r: r.score) for layer, rows in options.items()}
        mended = (_mended(least, options, fits) for least in near)
        found = [_spend_rest(chosen, rising, fits) for chosen in mended if chosen is not None]
    if not found:
        raise BudgetError(fits.unreachable(options))
    best = min(found, key=lambda chosen: _loss(chosen, rule))
    return [row.edit for row in best.values() if row.edit is not None]


def _loss(chosen: Mapping[str, Option], rule: str) -> tuple[float, float]:
    scores = [row.score for row in chosen.values()] or [0.0]
    return (sum(scores), max(scores)) if rule == "sum" else (max(scores), sum(scores))


def cheapest(options: Mapping[str, Sequence[Option]], worst: float) -> list[Any]:
    """Choose for every layer the cheapest option whose score is at most ``worst``.

    Returns:
        The edits of the chosen options; layers that are best left alone contribute nothing.

    Raises:
        BudgetError: a layer has no option this good.
    """
    chosen = []
    for layer, rows in options.items():
        good = [row for row in rows if row.score <= worst + 1e-9]
        if not good:
            raise BudgetError(
                f"No option of {layer} loses at most {worst:.4g}, not even leaving it as it is: "
                "ask for a share of the energy between 0 and 1."
            )
        chosen.append(min(good, key=lambda row: row.cost.params))
    return [row.edit for row in chosen if row.edit is not None]


Weigh = Callable[[LayerCost], float]


_EMPHASIS = (1.0, 4.0, 16.0)  # how much more one axis may count than another


def _weighers(limits: Limits) -> list[Weigh]:
    """Ways to see a cost as one number: each axis in units of its limit, in several mixtures."""
    if not limits:
        return [lambda cost: float(cost.params)]
    mixtures = itertools.product(_EMPHASIS, repeat=len(limits))
    apart = [mix for mix in mixtures if min(mix) == 1.0]  # the others repeat these
    return [_weigher(limits, mix) for mix in apart]


def _weigher(limits: Limits, mix: Sequence[float]) -> Weigh:
    shares = {axis: m / max(limits[axis], 1e-9) for axis, m in zip(limits, mix, strict=True)}
    return lambda cost: sum(getattr(cost, axis) * share for axis, share in shares.items())


def _undominated(rows: Sequence[Option], weight: Weigh) -> list[Option]:
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

    def excess(self, totals: Limits) -> float:
        """Return by how much totals exceed the limits, in units of each."""
        return sum(
            max(0.0, totals[axis] / max(bound, 1e-9) - 1) for axis, bound in self.limits.items()
        )

    def least(self, options: Mapping[str, Sequence[Option]], axis: str) -> float:
        """Return the least of an axis, whatever the others come to."""
        lowest = (min(getattr(row.cost, axis) for row in rows) for rows in options.values())
        return float(getattr(self.fixed, axis) + sum(lowest))

    def missed(self, options: Mapping[str, Sequence[Option]]) -> list[str]:
        """Name the axes whose limit nothing can keep."""
        return [axis for axis, bound in self.limits.items() if self.least(options, axis) > bound]

    def unreachable(self, options: Mapping[str, Sequence[Option]]) -> str:
        """Say what is the least of every axis on its own."""
        missed = self.missed(options)
        named = " and ".join(
            f"{axis}={shown(axis, self.limits[axis])} "
            f"(the least reachable is {shown(axis, self.least(options, axis))})"
            for axis in missed or self.limits
        )
        said = (
            f"The budget {named} cannot be met by"
            if missed
            else f"No plan was found that meets the budget {named} on all axes at once with"
        )
        return (
            f"{said} the layers that may be changed: allow more, or let the method touch more "
            "layers."
        )


Rows = Mapping[str, list[Option]]


def _least_worst(options: Rows, weight: Weigh, fits: _Bounds) -> dict[str, Option]:
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


def _least_sum(options: Rows, weight: Weigh, fits: _Bounds) -> dict[str, Option]:
    weights = {layer: [weight(row.cost) for row in rows] for layer, rows in options.items()}

    def at(price: float) -> dict[str, Option]:
        # Ties go to the cheaper one, so that a price high enough fits.
        return {
            layer: min(
                zip(rows, weights[layer], strict=True),
                key=lambda pair: (pair[0].score + price * pair[1], pair[1]),
            )[0]
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


def _mended(
    chosen: Mapping[str, Option], options: Mapping[str, Sequence[Option]], fits: _Bounds
) -> dict[str, Option] | None:
    """Exchange one option at a time, the one that helps most, until all limits are kept.

    An option between two others may be the cheapest in no mixture of the axes, and yet the only
    one that keeps all limits.
    """
    chosen = dict(chosen)

    def left(layer: str, row: Option) -> float:
        """What still exceeds the limits if the layer takes this option."""
        now = chosen[layer].cost
        more = {axis: getattr(row.cost, axis) - getattr(now, axis) for axis in totals}
        return fits.excess({axis: total + more[axis] for axis, total in totals.items()})

    while not fits(chosen):
        totals = {axis: fits.total(chosen, axis) for axis in fits.limits}
        exchanges = ((layer, row) for layer, rows in options.items() for row in rows)
        layer, row = min(exchanges, key=lambda pair: left(*pair))
        if left(layer, row) > fits.excess(totals) - 1e-12:
            return None
        chosen[layer] = row
    return chosen


def _spend_rest(chosen: dict[str, Option], options: Rows, fits: _Bounds) -> dict[str, Option]:
    """Improve the worst layers first, step by step, while the limits still allow it."""
    chosen, open_layers = dict(chosen), list(chosen)
    slack = {axis: bound - fits.total(chosen, axis) for axis, bound in fits.limits.items()}
    while open_layers:
        layer = max(open_layers, key=lambda name: chosen[name].score)
        now, rows = chosen[layer], options[layer]
        for row in reversed(rows[: rows.index(now)]):
            dearer = {axis: getattr(row.cost, axis) - getattr(now.cost, axis) for axis in slack}
            if all(dearer[axis] <= slack[axis] for axis in slack):
                chosen[layer] = row
                slack = {axis: slack[axis] - dearer[axis] for axis in slack}
                break
        else:
            open_layers.remove(layer)
    return chosen
