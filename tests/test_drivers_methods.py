"""Registered methods that act on a training itself: all four loops agree to the last bit."""

import pytest

from pliant.data import Train
from pliant.method import Method
from pliant.methods.train.maxdropout import MaxDropout
from tests.test_drivers import SGD, WAYS, assert_same, plain

CASES: dict[str, tuple[Method, Train]] = {
    "maxdropout": (MaxDropout(0.5, after=("norm", "second")), SGD),
    "maxdropout, random rates": (MaxDropout(0.8, "l2-random", "sample", ("second",)), SGD),
}


@pytest.mark.slow  # the first case of a trainer pays for its import
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_the_four_ways_agree_to_the_last_bit(case: str, way: str) -> None:
    method, train = CASES[case]
    expected, run = plain(method, train), WAYS[way](method, train, 1)
    assert run.finished and run.step == expected.steps
    assert_same(expected, run)
