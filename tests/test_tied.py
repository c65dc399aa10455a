"""A table and the layer that answers by its rows are one weight, and stay one at lower ranks."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pliant import Budget, compress, load, method
from pliant.cost import layer_costs
from pliant.data import Data
from pliant.edits import Factor, replay
from pliant.errors import EditError
from pliant.math.metric import Metric, together
from pliant.math.reads import Diagonal, Gram
from pliant.run import start

WORDS, WIDE = 60, 24


class Writer(nn.Module):
    """Answers by the rows of the table that it reads with."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDE)
        self.mix = nn.Linear(WIDE, WIDE)
        self.head = nn.Linear(WIDE, WORDS)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.mix(self.words(ids)).relu())


def built() -> tuple[Writer, Tensor]:
    torch.manual_seed(0)
    return Writer().eval(), torch.randint(0, WORDS, (16, 5))


def both(rank: int) -> list[Factor]:
    return [Factor("words", "svd", (rank,)), Factor("head", "svd", (rank,), source="words")]


def test_at_full_rank_tied_factors_compute_the_same() -> None:
    model, ids = built()
    wanted = model(ids)
    replay(model, both(WIDE))
    assert torch.allclose(model(ids), wanted, atol=1e-4)
    assert model.head.reduce.weight is model.words.expand.weight
    assert model.head.expand.weight is model.words.reduce.weight


@pytest.mark.parametrize("spec", ["energy(samples=16)", "energy", "nrmf(samples=16)"])
def test_a_tied_table_is_factorized_with_its_head_counted_once_and_saved(
    spec: str, tmp_path: Path
) -> None:
    model, ids = built()
    result = compress(model, Data(train=[ids]), spec, "params=0.6")
    report = result.report
    assert report.met and report.after.params == sum(p.numel() for p in result.model.parameters())
    forms = {row.layer: row.form for row in report.layers}
    assert forms["words"] == forms["head"] == "svd"
    result.save(tmp_path / "a.pliant")
    again = load(tmp_path / "a.pliant", lambda: built()[0]).eval()
    assert torch.equal(again(ids), result.model(ids))
    assert again.head.expand.weight is again.words.reduce.weight


def test_multiply_accumulates_of_a_tied_head_are_predicted() -> None:
    model, ids = built()
    before = layer_costs(model, (ids,))["head"]
    replay(model, both(4))
    rows = layer_costs(model, (ids,))
    assert both(4)[1].predict(before).macs == rows["head.reduce"].macs + rows["head.expand"].macs
    assert both(4)[1].predict(before).params == WORDS  # the bias


def test_a_head_that_does_not_fit_its_table_is_refused() -> None:
    model, _ = built()
    replay(model, both(4)[:1])
    with pytest.raises(EditError, match="must be factorized before, by the same ranks"):
        replay(model, [Factor("head", "svd", (5,), source="words")])


def test_a_table_that_is_tied_to_something_else_stays() -> None:
    model, ids = built()
    model.mix = nn.Bilinear(WIDE, 1, WORDS)
    model.mix.weight = model.head.weight
    with pytest.raises(EditError, match="tied to"):
        replay(model, both(4)[:1])


def test_momentum_follows_a_tied_table() -> None:
    model, ids = built()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(ids).square().mean().backward()
    optimizer.step()
    how = {"data": Data(train=[ids]), "example": (ids,), "optimizer": optimizer}
    run = start(model, method("energy(samples=16)"), Budget(params=0.6), **how)
    assert "momentum_buffer" in optimizer.state[run.model.words.reduce.weight]
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in run.model.parameters()}


def test_the_metric_of_a_tied_table_is_that_of_both_its_uses() -> None:
    table = Metric(Diagonal(torch.tensor([2.0, 0.0]), 1.0), torch.eye(3))
    head = Metric(Gram(torch.diag(torch.tensor([0.0, 0.0, 9.0]))), torch.tensor([0.0, 4.0]))
    both = together(table, [head])
    rare, common = torch.zeros(3, 2), torch.zeros(3, 2)
    common[2, 1], rare[0, 1] = 1.0, 1.0  # the head reads the third number of the second row
    assert both.seen.energy(both.enter(common)) > 5 * both.seen.energy(both.enter(rare))
    assert together(table, []) is table
