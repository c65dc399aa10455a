"""Sizes and methods are searched by what is lost, and checked on samples that had no part in it."""

import contextlib
import copy
import math
import warnings
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pliant
import pliant.api.within as within_room
from pliant.api.shortlist import Found, Plan, _Search
from pliant.api.within import bisect, caution, divided, within
from pliant.budget import Budget
from pliant.data import Data
from pliant.errors import AccuracyWarning, BudgetError, DataError
from pliant.method import Method
from pliant.plan.remember import remembered, remembering
from pliant.result import Verdict


@pytest.fixture(scope="module")
def net() -> nn.Module:
    """A wide perceptron that knows its classes by heart: most of it can go."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    x, y = samples(0)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def samples(seed: int, count: int = 600) -> tuple[torch.Tensor, torch.Tensor]:
    noise = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    centres = 2 * torch.eye(4).repeat(1, 4)
    return centres[labels] + 0.8 * torch.randn(count, 16, generator=noise), labels


@pytest.fixture(scope="module")
def data() -> Data:
    return Data(samples(0), samples(1), samples(2), classes=4)


def test_the_smallest_size_within_a_drop_is_found(net: nn.Module, data: Data) -> None:
    found = pliant.smallest(net, data, "energy(samples=256)", 1.0, probes=6)
    chosen = [row for row in found.report.tried if row.get("chosen")]
    assert len(chosen) == 1 and len(found.report.tried) == 6
    assert found.report.after.params == chosen[0]["params"] < 0.6 * found.report.before.params
    assert found.report.verdict is not None and found.report.verdict.holds
    larger = [r["share"] for r in found.report.tried if r.get("within")]
    assert chosen[0]["share"] == min(larger)
    smaller = [r for r in found.report.tried if r["share"] < chosen[0]["share"]]
    assert smaller and not any(row.get("within") for row in smaller)


def test_where_no_size_serves_the_nearest_is_named(net: nn.Module, data: Data) -> None:
    with pytest.raises(BudgetError, match="nearest, with .* of the params, lost"):
        pliant.smallest(net, data, "random", 0.0, probes=1)


def test_where_no_size_is_sure_the_surest_is_taken(
    net: nn.Module, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the interval is wide, a size that lost less is taken all the same, with a word."""
    monkeypatch.setattr(within_room, "ONE_SIDED", 100.0)
    with pytest.warns(AccuracyWarning, match=r"No size that was tried is within 2 for sure"):
        found = pliant.smallest(net, data, "energy(samples=256)", 2.0, probes=4).report
    assert found.findings[-1].startswith("No size that was tried is within 2 for sure; this one")
    (chosen,) = (row for row in found.tried if row.get("chosen"))
    assert "not for sure" in chosen["why"] and not any(row["within"] for row in found.tried)
    fine = [row for row in found.tried if row["lost"] <= 2]
    most = [row["lost"] + 100 * 2**0.5 * (row["high"] - row["lost"]) for row in fine]
    assert chosen is fine[most.index(min(most))] and len(found.tried) > len(fine) > 1
    assert found.after.params == chosen["params"]


@pytest.mark.parametrize(
    ("method", "asked", "message"),
    [
        ("kd", {}, "kd saves nothing"),
        ("energy", {"axis": "bits"}, "not bits"),
        ("energy", {"axis": "latency"}, "need a target"),
    ],
)
def test_what_cannot_be_searched_is_refused_at_once(
    net: nn.Module, data: Data, method: str, asked: dict[str, Any], message: str
) -> None:
    with pytest.raises(BudgetError, match=message):
        pliant.smallest(net, data, method, 1.0, **asked)


def test_without_labels_nothing_is_searched(net: nn.Module) -> None:
    with pytest.raises(DataError, match="validation or test split"):
        pliant.smallest(net, Data(samples(0)), "energy", 1.0)
    inputs = samples(0)[0]
    searches: tuple[Any, ...] = (
        partial(pliant.smallest, method="energy"),
        partial(pliant.auto, plans=(Plan("energy"),), goal="params"),
    )
    for search in searches:
        with pytest.raises(DataError, match="labels to score"):
            search(net, inputs)


def test_the_check_has_no_sample_of_the_choice() -> None:
    decide, check = divided(Data(samples(0), samples(1, 101)), seed=3)
    first = {tuple(row.tolist()) for row in decide.val[0]}
    second = {tuple(row.tolist()) for row in check.test[0]}
    assert not first & second and len(first) + len(second) == 101
    three = Data(samples(0), samples(1), samples(2))
    decide, check = divided(three, seed=0)
    assert not decide.has("test") and check.test is three.test


def test_nine_in_ten_shall_lose_less() -> None:
    """Half an interval of 95 % is 1.96 errors; nine in ten lie below 1.28 of them."""
    verdict = Verdict(1.0, lost=0.2, low=-0.8, high=1.2, samples=2000)
    assert within(verdict, 0.2 + 1.2816 / 1.96 + 1e-6)
    assert not within(verdict, 0.2 + 1.2816 / 1.96 - 1e-6)
    unknown = replace(verdict, low=None, high=None)
    assert within(unknown, 0.2) and not within(unknown, 0.19)
    few = replace(verdict, samples=40)  # equal answers of 40 samples would not show it
    assert within(few, 0.3) and not within(few, 0.1)


def test_what_is_not_seen_yet_has_a_spread_of_its_own() -> None:
    verdict = Verdict(1.0, lost=0.2, low=-0.8, high=1.2, samples=2000)
    margin = math.sqrt(2) * 1.2816 / 1.96
    assert within(verdict, 0.2 + margin + 1e-6, math.sqrt(2))
    assert not within(verdict, 0.2 + margin - 1e-6, math.sqrt(2))
    parts = Data(samples(0), samples(1, 300), samples(2, 100))
    assert caution(*divided(parts, 0)) == 2
    halves = Data(samples(0), samples(1, 300))
    assert caution(*divided(halves, 0)) == pytest.approx(math.sqrt(2))


def test_bisection_halves_the_logarithm() -> None:
    asked: list[float] = []

    def fits(share: float) -> bool:
        asked.append(share)
        return share >= 0.25

    best = bisect(fits, 10, least=0.01)
    assert best is not None and 0.25 <= best < 0.25 * 100 ** (2 / 2**10) * 1.01
    assert asked[0] == pytest.approx(math.sqrt(0.01))
    assert bisect(lambda share: False, 3) is None


LOW = "energy(samples=256)"
PLANS = (Plan(LOW), Plan("magnitude"), Plan(LOW, "hac(values=64)"))


def test_the_best_of_the_short_list_wins(net: nn.Module, data: Data) -> None:
    found = pliant.auto(net, data, "drop=1.5", goal="params", plans=PLANS[:2], probes=4)
    rows = [row for row in found.report.tried if row.get("within")]
    chosen = next(row for row in rows if row.get("chosen"))
    assert chosen["params"] == min(row["params"] for row in rows) == found.report.after.params
    assert "the least params within the drop" in chosen["why"]
    assert {row["plan"] for row in found.report.tried} == {str(plan) for plan in PLANS[:2]}


def test_with_limits_whoever_loses_least_wins(net: nn.Module, data: Data) -> None:
    found = pliant.auto(net, data, "params=0.5,drop=50", plans=PLANS[:2], probes=4)
    fits = [row for row in found.report.tried if row.get("met") and row.get("within")]
    chosen = next(row for row in fits if row.get("chosen"))
    assert chosen["lost"] == min(row["lost"] for row in fits)
    assert found.report.budget == {"params": 0.5} and found.report.met
    assert found.report.after.params <= 0.5 * found.report.before.params
    # The largest size that meets the limit was looked for.
    assert max(row["params"] for row in fits) > 0.4 * found.report.before.params


def test_what_follows_a_size_is_tried_where_the_size_was_found(net: nn.Module, data: Data) -> None:
    found = pliant.auto(net, data, "drop=3", plans=(PLANS[0], PLANS[2]), probes=4)
    alone = [r for r in found.report.tried if r["plan"] == str(PLANS[0]) and r.get("within")]
    then = [r for r in found.report.tried if r["plan"] == str(PLANS[2])]
    assert 1 <= len(then) <= 2
    assert then[0]["share"] == min(row["share"] for row in alone)


def test_finalists_are_trained_only_if_asked(net: nn.Module, data: Data) -> None:
    train = pliant.Train(epochs=1, batch=100, lr=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = pliant.auto(
            net, data, "drop=5", goal="params", plans=PLANS[:1], probes=2, train=train
        )
    assert [row["trained"] for row in found.report.tried] == [False, False, True, True]


def test_nothing_that_fits_is_an_error_with_the_nearest(net: nn.Module, data: Data) -> None:
    with pytest.raises(BudgetError, match="the nearest, energy"):
        pliant.auto(net, data, "drop=0,params=0.02", plans=PLANS[:1], probes=1)
    with pytest.raises(BudgetError, match="A goal is one of"):
        pliant.auto(net, data, goal="beauty")


def test_what_is_no_faster_does_not_win(net: nn.Module, data: Data) -> None:
    slower = (Plan(then="hac(values=64)"),)  # as many operations, in fewer bytes
    with pytest.raises(BudgetError, match="has less latency than the network as it is; hac"):
        pliant.auto(net, data, "drop=50", target=lambda model, inputs: 0.01, plans=slower)
    assert pliant.auto(net, data, "drop=50", plans=slower).report.met


def test_where_nothing_fits_what_lost_least_is_trained(net: nn.Module, data: Data) -> None:
    train, tried = pliant.Train(epochs=1, batch=100, lr=0.01), list[object]()
    with pytest.raises(BudgetError, match="Nothing that was tried"):
        pliant.auto(
            net, data, "drop=0,params=0.05", plans=PLANS[:1], probes=1, train=train,
            watch=lambda row: tried.append(row["phase"]),
        )  # fmt: skip
    assert len(tried) == 2 * len(set(tried)) == 2


def test_what_was_tried_is_kept_and_shown(net: nn.Module, data: Data) -> None:
    found = pliant.smallest(net, data, "energy", 3.0, probes=3).report
    assert pliant.Report.from_json(found.to_json()).tried == found.tried
    from pliant.render.html import html
    from pliant.render.markdown import markdown

    assert "What was tried" in markdown(found) and "chosen: the smallest within 3" in html(found)


def test_a_budget_of_nothing_but_a_drop_asks_for_the_smallest(net: nn.Module, data: Data) -> None:
    found = pliant.compress(net, data, LOW, Budget(drop=1.0))
    same = pliant.smallest(net, data, LOW, 1.0)
    assert len(found.report.tried) == 7
    assert found.report.after.params == same.report.after.params
    once = pliant.compress(net, data, LOW, "params=0.9,drop=1")
    assert not once.report.tried
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        judged = pliant.compress(net, data, "kd", budget=Budget(drop=1.0))  # it saves no size
    assert not judged.report.tried and judged.report.verdict is not None


# ---------------------------------------------------------------- shared between sizes


class Counting(nn.Sequential):
    """Counts the samples that went through it and its copies."""

    seen = [0]

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen[0] += len(inputs)
        return super().forward(inputs)


def searched(net: nn.Module, data: Data, method: str, **asked: Any) -> tuple[Any, int]:
    counting = Counting(*copy.deepcopy(net)).eval()
    Counting.seen[0] = 0
    found = pliant.smallest(counting, data, method, 12.0, probes=4, **asked)
    return found, Counting.seen[0]


def plain_rows(found: Any) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in found.report.tried]


@pytest.mark.parametrize(
    "method",
    ["nrmf", "energy(samples=256)", "evbmf", "group_fisher(samples=256)", "magnitude", "random",
     "hfp", "majority_voting"],
)  # fmt: skip
def test_sizes_share_what_they_look_at(
    method: str, net: nn.Module, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same networks and rows, bit for bit, from fewer samples through the network."""
    shared, fewer = searched(net, data, method)
    monkeypatch.setattr(within_room, "remembering", contextlib.nullcontext)
    monkeypatch.setattr(within_room, "trial", contextlib.nullcontext)
    alone, more = searched(net, data, method)
    assert plain_rows(shared) == plain_rows(alone)
    weights, others = shared.model.state_dict(), alone.model.state_dict()
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert replace(shared.report, seconds={}, tried=()) == replace(
        alone.report, seconds={}, tried=()
    )
    assert fewer < 0.75 * more, (fewer, more)


def test_what_is_kept_depends_on_weights_and_random_numbers() -> None:
    model, made = nn.Linear(3, 2), list[int]()
    run = SimpleNamespace(
        model=model, seed=0, generator=torch.Generator().manual_seed(1), state={}, log=[],
        reasons={},
    )  # fmt: skip

    def make() -> float:
        made.append(1)
        return float(torch.rand((), generator=run.generator))

    def again(key: str = "a") -> tuple[float, float]:
        run.generator.manual_seed(1)
        found = remembered(run, key, make)
        return found, float(torch.rand((), generator=run.generator))

    alone = again()
    with remembering():
        assert [again(), again()] == [alone, alone] and len(made) == 2
        again("b")
        assert len(made) == 3
        with torch.no_grad():
            model.weight.add_(1)
        assert again() == alone and len(made) == 4
        run.seed = 1
        assert again() == alone and len(made) == 5
    again()
    assert len(made) == 6


def test_what_writes_into_the_run_is_made_every_time() -> None:
    run = SimpleNamespace(
        model=nn.Linear(1, 1), seed=0, generator=torch.Generator(), state={}, log=[], reasons={}
    )
    with remembering():
        for _ in range(2):
            remembered(run, "a", lambda: run.log.append({}))
            remembered(run, "b", lambda: run.state.update(step=len(run.log)))
    assert len(run.log) == 2 and run.state == {"step": 2}


def test_a_teacher_is_the_dense_network_as_it_is_judged(
    net: nn.Module, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its stale batch norms are re-estimated once, and are so at every size that is tried."""
    first, *rest = copy.deepcopy(net)
    stale = nn.BatchNorm1d(64)
    stale.running_mean.fill_(3.0)
    model = nn.Sequential(first, stale, *rest)
    asked = {"train": pliant.Train(epochs=1, lr=0.01, distill=0.9)}
    shared, _ = searched(model, data, "energy", **asked)
    monkeypatch.setattr(within_room, "remembering", contextlib.nullcontext)
    alone, _ = searched(model, data, "energy", **asked)
    assert plain_rows(shared) == plain_rows(alone)


def test_of_equal_answers_the_surer_ones_win_within_limits(data: Data) -> None:
    def found(bytes: int, lost: float, loss: float | None) -> Found:
        row = {
            "bytes": bytes,
            "lost": lost,
            "loss": loss,
            "within": True,
            "met": True,
            "gains": True,
        }
        return Found(Plan(str(bytes)), Method(), row | {"trained": False})

    def winner(limits: str) -> int:
        search = _Search(nn.Linear(1, 1), data, Budget.parse(limits), "bytes", 1, print, {})
        search.tried += [found(1, 0.5, 0.9), found(2, 0.5, 0.2), found(3, 0.7, 0.1)]
        search.tried.append(found(4, 0.5, None))
        return int(search.winner().row["bytes"])

    assert winner("bytes=50%") == 2 and winner("drop=2") == 1
