"""Registered methods that act on a training itself: all four loops agree to the last bit."""

from dataclasses import replace

import pytest

from pliant.compose import together
from pliant.data import Train
from pliant.method import Method
from pliant.methods.layers.bm_resnet import BMResNet
from pliant.methods.layers.cqnn import CQNN
from pliant.methods.layers.shift_attention import ShiftAttention
from pliant.methods.train.maxdropout import MaxDropout
from pliant.methods.train.mltp import MLTP
from pliant.methods.train.norm_loss import NormLoss
from pliant.methods.train.orthogonal_loss import OrthogonalLoss
from pliant.methods.train.p_diff import PDiff
from pliant.methods.train.progressive_stepwise import ProgressiveStepwise
from tests.test_drivers import ADAMW, SGD, WAYS, assert_same, plain

CONSTANT = replace(SGD, schedule="constant", warmup=0)
CASES: dict[str, tuple[Method, Train]] = {
    "norm_loss": (NormLoss(0.1), SGD),
    "norm_loss, decoupled": (NormLoss(0.1, decoupled=True), replace(CONSTANT, optimizer="adamw")),
    "maxdropout": (MaxDropout(0.5, after=("norm", "second")), SGD),
    "maxdropout, random rates": (MaxDropout(0.8, "l2-random", "sample", ("second",)), SGD),
    "orthogonal loss": (OrthogonalLoss("energy"), SGD),
    "orthogonal loss, random basis": (OrthogonalLoss("softmax", "random", warmup=0.3), SGD),
    "p_diff": (PDiff(0.4, window=3, ramp=0.5), SGD),
    "p_diff, unknown noise": (PDiff(window=2, ramp=0.3, normalize="kept"), SGD),
    "progressive": (ProgressiveStepwise((0.25, 0.5, 1.0)), SGD),
    "progressive, growing batches": (ProgressiveStepwise((0.5, 1.0), rule="batch"), ADAMW),
    "bm_resnet": (BMResNet(span=0.7), SGD),
    "shift_attention": (ShiftAttention(), SGD),
    "cqnn": (CQNN(), SGD),
    "mltp": (MLTP(), CONSTANT),  # the plain loop sets its rate after the loss
    "mltp, difference": (MLTP(0.5, 0.02, "difference"), SGD),
    "two in one loop": (together(NormLoss(0.1), PDiff(0.4, window=2, ramp=0.3)), SGD),
    "mltp, growing data": (together(MLTP(alpha=0.02), ProgressiveStepwise((0.5, 1.0))), SGD),
}


@pytest.mark.slow  # the first case of a trainer pays for its import
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_the_four_ways_agree_to_the_last_bit(case: str, way: str) -> None:
    method, train = CASES[case]
    expected, run = plain(method, train), WAYS[way](method, train, 1)
    assert run.finished and run.step == expected.steps
    assert_same(expected, run)
