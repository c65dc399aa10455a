"""Budgets are read strictly, and the allocator is compared with trying everything."""

import itertools
import math
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pliant.budget import Budget, Option
from pliant.cost import Cost, LayerCost
from pliant.errors import BudgetError
from pliant.plan.allocate import allocate, cheapest


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("params=0.3", {"params": 0.3}),
        ("params=30%", {"params": 0.3}),
        ("params=3e-1", {"params": 0.3}),
        ("params=1.0", {"params": 1.0}),
        ("params=1", {"params": 1}),
        ("params=60000, macs=1.2M", {"params": 60_000, "macs": 1_200_000}),
        ("macs=1e6,bytes=240k,", {"macs": 1_000_000, "bytes": 240_000}),
        ("params=60_000", {"params": 60_000}),
        ("params=12.0", {"params": 12}),
        ("macs=0.5G", {"macs": 500_000_000}),
        ("bytes=500kB", {"bytes": 500_000}),
        ("bytes=1.5MB", {"bytes": 1_500_000}),
        ("bytes=1 MiB", {"bytes": 2**20}),
        ("bytes=16KiB,", {"bytes": 2**14}),
        ("bytes=2GiB", {"bytes": 2**31}),
        ("bytes=300B", {"bytes": 300}),
        ("latency=3.5", {"latency": 3.5}),
        ("latency=5ms", {"latency": 5.0}),
        ("latency=0.5 ms", {"latency": 0.5}),
        ("latency=50%", {"latency": "50%"}),
        ("", {}),
    ],
)
def test_a_budget_is_read(text, values):
    given_axes = Budget.parse(text).given()
    assert given_axes == values
    assert {axis: type(v) for axis, v in given_axes.items()} == {
        axis: type(v) for axis, v in values.items()
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("params", "axis=value"),
        ("params=", "axis=value"),
        ("0.3", "axis=value"),
        ("weights=0.3", "an axis of bytes, drop, latency, macs, params"),
        ("params=much", "expected a fraction such as 0.3 or 30%"),
        ("params=k", "expected a fraction"),
        ("params=%", "expected a fraction"),
        ("params=5ms", "expected a fraction"),
        ("latency=5s", "expected milliseconds such as 5 or 5ms, or a share .* such as 50%"),
        ("latency=ms", "Cannot read latency=ms: expected milliseconds"),
        ("latency=1e400", "must be positive and finite, not inf"),
        ("bytes=1TB", "a count such as 60000, 500kB, 1.2MB .* or 1MiB"),
        ("bytes=1Mb", "Cannot read bytes=1Mb"),
        ("bytes=1Mi", "Cannot read bytes=1Mi"),
        ("bytes=1iB", "Cannot read bytes=1iB"),
        ("params=1MiB", "expected a fraction"),
        ("macs=1MB", "expected a fraction"),
        ("params=nan", "must be positive"),
        ("params=inf", "must be positive and finite"),
        ("params=1e999M", "must be positive"),
        ("params=0", "must be positive"),
        ("params=-3", "must be positive"),
        ("params=1.5", "neither a fraction"),
        ("params=150%", "neither a fraction"),
        ("params=0.3,params=0.4", "twice"),
    ],
)
def test_what_is_no_budget_is_refused(text, message):
    with pytest.raises(BudgetError, match=message):
        Budget.parse(text)


@pytest.mark.parametrize("value", [True, "0.3", None])
def test_values_must_be_numbers(value):
    if value is None:
        assert Budget(params=None).given() == {}
    else:
        with pytest.raises(BudgetError, match="must be a number"):
            Budget(params=value)


def test_limits_are_absolute():
    dense = Cost(params=1000, macs=5000, bytes=4000)
    limits = Budget(params=0.25, macs=700, bytes=1.0).limits(dense)
    assert limits == {"params": 250.0, "macs": 700.0, "bytes": 4000.0}
    with pytest.raises(BudgetError, match="latency"):
        Budget(latency=3.0).limits(dense)


# ------------------------------------------------------------------ the allocator


def row(score, params, macs=0, name=""):
    edit = None if score == 0 else (name, score, params, macs)
    return Option(score, LayerCost("Conv2d", params=params, macs=macs, bytes=4 * params), edit)


@st.composite
def layers(draw, axes=1):
    """Up to four layers: left alone, or one of up to four smaller forms of rising loss."""
    found = {}
    for name in "abcd"[: draw(st.integers(1, 4))]:
        sizes = st.integers(1, 40)
        rows = [row(0, 40, 40)]
        for _ in range(draw(st.integers(0, 4))):
            macs = draw(sizes) if axes > 1 else 0
            rows.append(row(draw(st.integers(1, 30)) / 10, draw(sizes), macs, name))
        found[name] = draw(st.permutations(rows))
    return found


def total(rows, axis):
    return sum(getattr(each.cost, axis) for each in rows)


def everything(options, limits, fixed):
    """Every choice within the limits."""
    for rows in itertools.product(*options.values()):
        if all(total(rows, a) + getattr(fixed, a) <= bound for a, bound in limits.items()):
            yield rows


def taken(options, edits):
    """The options that a list of edits stands for."""
    by_layer = {edit[0]: edit for edit in edits}
    return [next(o for o in rows if o.edit == by_layer.get(name)) for name, rows in options.items()]


FIXED = Cost(params=10, macs=10, bytes=40)


@settings(deadline=None, max_examples=80)
@given(layers(), st.integers(12, 180))
def test_max_makes_the_worst_loss_least(options, bound):
    limits = {"params": float(bound)}
    possible = list(everything(options, limits, FIXED))
    if not possible:
        with pytest.raises(BudgetError, match="least reachable"):
            allocate(options, limits, fixed=FIXED)
        return
    rows = taken(options, allocate(options, limits, fixed=FIXED))
    assert total(rows, "params") + FIXED.params <= bound
    worst = max(each.score for each in rows)
    assert worst == min(max(each.score for each in choice) for choice in possible)


@settings(deadline=None, max_examples=80)
@given(layers(), st.integers(12, 180))
def test_sum_comes_within_one_option_of_the_least_sum(options, bound):
    """Lagrangian relaxation misses the optimum by no more than one step of one layer."""
    limits = {"params": float(bound)}
    possible = list(everything(options, limits, FIXED))
    if not possible:
        return
    rows = taken(options, allocate(options, limits, fixed=FIXED, rule="sum"))
    assert total(rows, "params") + FIXED.params <= bound
    found = sum(each.score for each in rows)
    best = min(sum(each.score for each in choice) for choice in possible)
    largest = max(each.score for choices in options.values() for each in choices)
    assert best <= found + 1e-9 <= best + largest + 1e-9


@settings(deadline=None, max_examples=80)
@given(layers(axes=2), st.integers(12, 180), st.integers(12, 180), st.sampled_from(["max", "sum"]))
def test_two_limits_hold_together(options, params, macs, rule):
    limits = {"params": float(params), "macs": float(macs)}
    try:
        rows = taken(options, allocate(options, limits, fixed=FIXED, rule=rule))
    except BudgetError:
        return
    assert rows in [list(choice) for choice in everything(options, limits, FIXED)]


def test_one_axis_does_not_hide_what_the_other_needs():
    """The option with the least of both together is not the one with the least of each."""
    options = {"a": [row(0, 100, 100), row(1, 1, 90, "a"), row(2, 60, 40, "a")]}
    assert allocate(options, {"params": 70.0, "macs": 50.0}) == [("a", 2, 60, 40)]
    assert allocate(options, {"params": 10.0, "macs": 95.0}) == [("a", 1, 1, 90)]


@pytest.mark.parametrize("rule", ["max", "sum"])
def test_limits_that_no_mixture_of_the_axes_keeps_are_kept(rule):
    options = {"a": [row(0, 10, 10), row(1, 6, 1, "a"), row(2, 1, 7, "a"), row(3, 4, 4, "a")]}
    assert allocate(options, {"params": 4.0, "macs": 6.0}, rule=rule) == [("a", 3, 4, 4)]


def test_two_limits_that_can_be_kept_are_kept():
    random = Random(0)
    for _ in range(300):
        options = {
            name: [row(0, 40, 40)]
            + [
                row(loss, random.randint(1, 40), random.randint(1, 40), name)
                for loss in range(1, random.randint(2, 5))
            ]
            for name in "abcd"
        }
        limits = {axis: random.randint(30, 150) for axis in ("params", "macs")}
        possible = list(everything(options, limits, FIXED))
        if possible:
            rows = taken(options, allocate(options, limits, fixed=FIXED))
            assert rows in [list(choice) for choice in possible]


def test_what_is_left_is_spent():
    """Three layers at one level leave room for one of them to lose less."""
    options = {name: [row(0, 100), row(1, 60, name=name), row(2, 30, name=name)] for name in "abc"}
    edits = allocate(options, {"params": 130.0})
    assert sorted(edit[1] for edit in edits) == [1, 2, 2]
    assert allocate(options, {"params": 300.0}) == []


@pytest.mark.parametrize("rule", ["max", "sum"])
def test_an_impossible_budget_names_what_is_reachable(rule):
    options = {"a": [row(0, 1000, 9000), row(1, 300, 4000, "a")]}
    with pytest.raises(BudgetError) as error:
        allocate(options, {"params": 200.0, "macs": 5000.0}, fixed=FIXED, rule=rule)
    assert "params=200 (the least reachable is 310)" in str(error.value)
    assert "macs" not in str(error.value)
    options = {"a": [row(0, 9, 9), row(1, 1, 9, "a"), row(1, 9, 1, "a")]}
    with pytest.raises(BudgetError, match=r"No plan was found .* on all axes at once"):
        allocate(options, {"params": 2.0, "macs": 2.0}, rule=rule)


def test_nothing_to_allocate():
    assert allocate({}, {}) == []
    assert allocate({}, {"params": 10.0}, fixed=Cost(10, 0, 0)) == []
    with pytest.raises(BudgetError, match="least reachable is 11"):
        allocate({}, {"params": 10.0}, fixed=Cost(11, 0, 0))


def test_without_limits_nothing_is_lost():
    assert allocate({"a": [row(0, 9), row(1, 3, name="a")]}, {}) == []


def test_cheapest_takes_the_smallest_that_is_good_enough():
    rows = [row(0, 100), row(0.04, 70, name="a"), row(0.05, 40, name="a"), row(0.2, 9, name="a")]
    assert cheapest({"a": rows}, 0.05) == [("a", 0.05, 40, 0)]
    assert cheapest({"a": rows[:1]}, 0.05) == []
    with pytest.raises(BudgetError, match="between 0 and 1"):
        cheapest({"a": rows}, 1 - 95)
    assert math.isclose(cheapest({"a": rows}, 1.0)[0][1], 0.2)
