"""FPGM: the filter nearest to the geometric median leaves, however large it is."""

import torch
from scipy.optimize import minimize
from torch import nn

from pliant.families.prune.scores import rows_of, vectors
from pliant.methods.prune.fpgm import FPGM
from pliant.run import Run, start
from pliant.surgery.prove import cuttable
from pliant.testing import Case
from tests.cases.prune import REFUSES, TOYS, kept, run_of


def with_filters(*filters: tuple[float, float]) -> nn.Sequential:
    count = len(filters)
    model = nn.Sequential(nn.Linear(2, count, bias=False), nn.ReLU(), nn.Linear(count, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor(filters))
    return model


def scores_of(run: Run) -> torch.Tensor:
    groups, _ = cuttable(run.model, run.example)
    return run.method.scores(run, groups)["0"]  # type: ignore[attr-defined]


def distances_are_summed() -> None:
    """On a line at 0, 3, 4, 9: sums of 16, 10, 10, 20, whose mean is 14."""
    run = run_of(with_filters((0.0, 0.0), (3.0, 0.0), (4.0, 0.0), (9.0, 0.0)), FPGM(ratio=0.0))
    assert torch.allclose(scores_of(run), torch.tensor([16, 10, 10, 20.0]).double() / 14)


def a_large_filter_in_the_middle_leaves_before_a_small_one_at_the_edge() -> None:
    """The norm would take the first; the third is what the others can stand in for."""
    filters = ((0.1, 0.0), (9.0, 1.0), (5.0, 0.0), (9.0, -1.0))
    run = run_of(with_filters(*filters), FPGM(ratio=0.25))
    assert kept(run)["0", "out"] == (0, 1, 3)


def least_sums_lie_nearest_to_the_geometric_median() -> None:
    """The median itself comes from a solver that knows nothing of the filters' own sums."""
    points = torch.randn(9, 2, generator=torch.Generator().manual_seed(3))
    run = run_of(with_filters(*points.tolist()), FPGM(ratio=0.0))
    median = minimize(
        lambda x: (points.double() - torch.tensor(x)).norm(dim=1).sum().item(),
        points.mean(0).numpy(),
        method="Nelder-Mead",
    ).x
    nearest = (points.double() - torch.tensor(median)).norm(dim=1).argmin()
    assert scores_of(run).argmin() == nearest


class Sum(nn.Module):
    """Two layers whose channels meet in a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(2, 3, bias=False), nn.Linear(2, 3, bias=False)
        self.head = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.one(x) + self.two(x))
        return out


def filters_of_one_channel_are_one_point() -> None:
    model = Sum()
    run = start(model, FPGM(ratio=0.0), example=(torch.zeros(2, 2),))
    (group,), _ = cuttable(model, run.example)
    both = torch.cat([model.one.weight, model.two.weight], 1).detach().double()
    assert torch.equal(vectors(model, rows_of(group)), both)


CASES = (
    Case(
        "fpgm",
        toys=TOYS,
        refuses=REFUSES,
        variants=('fpgm(scope="global", rounds=2)',),
        own=(
            distances_are_summed,
            a_large_filter_in_the_middle_leaves_before_a_small_one_at_the_edge,
            least_sums_lie_nearest_to_the_geometric_median,
            filters_of_one_channel_are_one_point,
        ),
    ),
)
