"""What was lost is judged by paired answers, and the dense network gets what the other one gets."""

import math
import warnings

import pytest
import torch
from torch import Tensor, nn

import pliant
from pliant.api.verdict import judge
from pliant.budget import Budget
from pliant.drivers.score import Score
from pliant.errors import AccuracyWarning, BudgetError


def score(hits: Tensor, classes: int = 10) -> Score:
    return Score(float(hits.float().mean()), 0.0, hits, classes)


def test_the_interval_is_that_of_paired_differences() -> None:
    """Of 1,000 samples 30 are lost and 10 won: 2 points, plus or minus 1.96 sqrt(41.6) / 10."""
    before = torch.ones(1000, dtype=torch.bool)
    before[:10] = False
    after = torch.ones(1000, dtype=torch.bool)
    after[10:40] = False
    found = judge(score(before), score(after), 2.0)
    assert found.lost == pytest.approx(2.0) and found.holds and found.samples == 1000
    assert found.high is not None and found.low is not None
    error = 1.96 * math.sqrt(42 - 20**2 / 1002) / 10
    assert (found.low, found.high) == pytest.approx((2 - error, 2 + error), abs=1e-4)
    assert judge(score(before), score(after), 1.9).holds is False
    assert not found.note


def test_a_network_near_chance_is_named() -> None:
    hits = torch.arange(1000) % 10 == 0
    assert "by chance (10.0 %)" in judge(score(hits), score(hits), 2.0).note


def test_nothing_scored_is_not_judged() -> None:
    assert judge(None, None, 2.0).holds is None
    empty = Score(math.nan, 1.0)
    assert judge(empty, empty, 2.0).holds is None


@pytest.mark.parametrize("drop", [-1, 101, True, "2"])
def test_a_drop_is_in_points(drop: object) -> None:
    with pytest.raises(BudgetError, match="0 to 100"):
        Budget(drop=drop)  # type: ignore[arg-type]
    assert Budget.parse("params=0.5,drop=1").drop == 1.0
    assert Budget(drop=1.0).given() == {}


class Normed(nn.Module):
    """Knows the class by the sign of a number, if its batch norm knows the numbers."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.norm, self.spare = nn.BatchNorm1d(1), nn.Linear(4, 4)
        self.head = nn.Linear(1, 2)
        with torch.no_grad():
            self.norm.running_mean.fill_(scale)  # type: ignore[union-attr]
            self.head.weight.copy_(torch.tensor([[-1.0], [1.0]]))
            self.head.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x)) + 0 * self.spare(x.expand(-1, 4)).sum(1, keepdim=True)  # type: ignore[no-any-return]


def test_the_network_before_gets_the_same_batch_norms() -> None:
    """Compression re-estimates them: for one side alone, doing nothing would look like a gain."""
    torch.manual_seed(0)
    x = torch.randn(400, 1)
    data = pliant.Data(train=(x, (x[:, 0] > 0).long()), val=(x, (x[:, 0] > 0).long()), classes=2)
    report = pliant.compress(Normed(50.0), data, "energy(p=0.1, only=['spare'])").report
    assert report.before.accuracy is not None and report.before.accuracy > 0.95
    assert report.after.accuracy == pytest.approx(report.before.accuracy, abs=0.02)
    model = Normed(50.0)
    kept = model.norm.running_mean.clone()  # type: ignore[union-attr]
    pliant.compress(model, data, "energy(p=0.1, only=['spare'])")
    assert torch.equal(model.norm.running_mean, kept)  # type: ignore[arg-type]


def test_where_nothing_is_changed_nothing_is_lost() -> None:
    """Neither side gets other batch norms."""
    x = torch.randn(400, 1)
    data = pliant.Data(train=(x, (x[:, 0] > 0).long()), val=(x, (x[:, 0] > 0).long()), classes=2)
    report = pliant.compress(Normed(50.0), data, "energy(p=1.0, only=['spare'])").report
    assert report.after.accuracy == report.before.accuracy
    assert report.before.accuracy is not None and report.before.accuracy < 0.8


def test_a_loss_is_warned_of_and_a_kept_score_is_not() -> None:
    torch.manual_seed(0)
    x = torch.randn(400, 16)
    labels = (x @ torch.randn(16, 4)).argmax(1)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    data = pliant.Data(train=(x, labels), val=(x, labels), classes=4)
    plan = pliant.Train(epochs=20, lr=0.1, batch=50)
    trained = pliant.compress(model, data, pliant.Method(), train=plan).model
    with pytest.warns(AccuracyWarning, match="points"):
        result = pliant.compress(trained, data, "energy(p=0.1)")
    assert result.report.verdict is not None and result.report.verdict.holds is False
    with warnings.catch_warnings():
        warnings.simplefilter("error", AccuracyWarning)
        pliant.compress(trained, data, "energy(p=0.1)", Budget(params=0.9, drop=100))
        pliant.compress(trained, data, "energy(p=0.9999)")
