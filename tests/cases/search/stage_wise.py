"""Growing stages: the importance of features, what networks cost, how the search goes."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.cost import cost
from pliant.data import Data
from pliant.edits import Insert, Remove, from_json, to_json
from pliant.errors import DataError, EditError, MethodError
from pliant.families.search import stages as growing
from pliant.math.pls import projection_importance
from pliant.methods.search.stage_wise import StageWise
from pliant.run import Run, start
from pliant.testing import Case
from pliant.testing.toys import SPECIAL, TOYS
from pliant.zoo.staged import StagedResNet
from tests.cases.witness import on_many

TOY = SPECIAL["staged"]


def features(seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(60) % 3
    x = torch.randn(60, 7, generator=g, dtype=torch.float64)
    x[:, 0] += labels
    return x, labels


def squares_of_importance_sum_to_the_features() -> None:
    """For 1 to 5 components; so their mean is at most 1, and units do not matter."""
    x, labels = features()
    for parts in range(1, 6):
        found = projection_importance(x, labels, 3, parts)
        assert abs(float(found.square().sum()) - 7) < 1e-8
        assert 0 < float(found.mean()) <= 1
    scaled = x * torch.tensor([1e-3, 1, 5, 1e4, 2, 1, 1]) + 3
    ours, theirs = (projection_importance(each, labels, 3, 2) for each in (x, scaled))
    assert torch.allclose(ours, theirs, atol=1e-8)
    assert int(ours.argmax()) == 0


def importance_is_that_of_the_power_method() -> None:
    """Components one by one: the strongest direction of X'Y, then both without it."""
    x, labels = features()
    y = torch.eye(3, dtype=torch.float64)[labels]
    a, b = ((each - each.mean(0)) / each.std(0) for each in (x, y))
    total, energy = torch.zeros(7, dtype=torch.float64), 0.0
    for _ in range(2):
        weight = torch.linalg.svd(a.T @ b)[0][:, 0]
        score = a @ weight
        size = score @ score
        loading = b.T @ score / size
        share = float(size * loading.square().sum())
        total, energy = total + share * weight.square(), energy + share
        a, b = a - torch.outer(score, a.T @ score / size), b - torch.outer(score, loading)
    wanted = (7 * total / energy).sqrt()
    assert torch.allclose(projection_importance(x, labels, 3, 2), wanted, atol=1e-6)


def importance_is_that_of_scikit_learn() -> None:
    """From the weights, scores and loadings of its projection, of 1 to 3 components."""
    from sklearn.cross_decomposition import PLSRegression

    x, labels = features(3)
    y = torch.eye(3, dtype=torch.float64)[labels]
    for parts in (1, 2, 3):
        known = PLSRegression(parts, scale=True, max_iter=10_000, tol=1e-14).fit(x, y)
        scores, loadings = (torch.tensor(k) for k in (known.x_scores_, known.y_loadings_))
        share = scores.square().sum(0) * loadings.square().sum(0)
        weights = F.normalize(torch.tensor(known.x_weights_), dim=0)
        wanted = (7 * (weights.square() @ share) / share.sum()).sqrt()
        found = projection_importance(x, labels, 3, parts)
        assert torch.allclose(found, wanted, atol=1e-6), parts


def features_that_are_dead_or_not_finite() -> None:
    x, labels = features()
    x[:, 3] = 0
    assert projection_importance(x, labels, 3, 2)[3] == 0
    x[0, 0] = torch.nan
    with pytest.raises(DataError, match="finite"):
        projection_importance(x, labels, 3, 2)


def published_depths_have_published_sizes() -> None:
    """Parameters with the statistics of batch norms among them, as the authors count."""
    for depths, params, macs in (
        ((9, 9, 9), 0, 125.7),
        ((10, 12, 6), 699_690, 130.5),
        ((10, 14, 8), 885_930, 149.3),
        ((18, 18, 18), 0, 253.1),
    ):
        model = StagedResNet(depths)
        norms = sum(m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d))
        found = cost(model, (torch.zeros(1, 3, 32, 32),))
        assert round(found.macs / 1e6, 1) == macs
        assert not params or found.params + 2 * norms == params
        assert depths != (9, 9, 9) or round((found.params + 2 * norms) / 1e6, 2) == 0.86


def searched(method: StageWise, steps: int) -> Run:
    torch.manual_seed(0)
    run = start(TOY.model(), method, data=TOY.data(), steps=steps)
    for _ in range(steps):
        run.after_step()
    run.finish()
    return run


def stages_grow_by_all_or_nothing() -> None:
    """1 + 2 I networks, or fewer where none rose; depths never fall."""
    run = searched(StageWise(growth=2, iterations=2), 10)
    rows = [row for row in run.log if "depths" in row]
    assert [row["step"] for row in rows][:2] == [2, 4] and rows[0]["depths"] == [1, 2]
    assert rows[1]["depths"] == [3, 4] and len(rows) <= 5
    kept = rows[0]["depths"]
    for row in rows[2::2]:
        grown = [now - before for now, before in zip(row["depths"], kept, strict=True)]
        assert set(grown) <= {0, 2}
        kept = row["depths"]
    assert growing.depths(run, ["stages.0", "stages.1"]) == kept
    assert len(run.edits) == sum(kept) - 3  # as if nothing else had been tried


def classes_may_have_names_and_no_sample() -> None:
    """A class without samples is a column that says nothing."""
    x, labels = features()
    three, four = (projection_importance(x, labels, count, 2) for count in (3, 4))
    assert torch.allclose(three, four, atol=1e-8)
    data = replace(TOY.data(), classes=("a", "b", "c", "d"))
    run = start(TOY.model(), StageWise(iterations=1), data=data, steps=3)
    found = growing.importance(run, ["stages.0", "stages.1"], parts=2, samples=8)
    assert all(0 < value <= 1 for value in found.values())


def a_stage_stays_deeper_where_its_importance_rose() -> None:
    """Measured by hand: before 0.5 and 0.9, deeper 0.6 and 0.8, so the first one grows."""
    values = iter([[0.5, 0.9], [0.6, 0.8], [0.6, 0.8]])

    def told(run: Run, names: Any, **rest: Any) -> dict[str, float]:
        return dict(zip(names, next(values), strict=True))

    kept, growing.importance = growing.importance, told  # type: ignore[assignment]
    try:
        run = searched(StageWise(growth=1, iterations=1), 3)
    finally:
        growing.importance = kept
    assert growing.depths(run, ["stages.0", "stages.1"]) == [2, 2]
    assert [edit.layer for edit in run.edits] == ["stages.0"]


def every_network_begins_from_weights_of_its_own() -> None:
    """Those that came are not used, and momentum of the network before is forgotten."""
    model, given = TOY.model(), TOY.model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    method = StageWise(growth=1, iterations=1)
    run = start(model, method, data=TOY.data(), steps=6, optimizer=optimizer)
    seen = [given.linear.weight, model.linear.weight.clone()]
    for step in range(6):
        model(torch.randn(4, 3, 6, 6)).square().mean().backward()
        optimizer.step()
        before = model.linear.weight.clone()
        run.after_step()
        if step in (1, 3):
            assert not optimizer.state and not torch.equal(model.linear.weight, before)
            seen.append(model.linear.weight.clone())
        else:
            assert torch.equal(model.linear.weight, before)
    for place, one in enumerate(seen):
        assert not any(torch.allclose(one, other) for other in seen[place + 1 :])
    run.finish()


def random_growth_is_as_large() -> None:
    """Where one stage rose one grows, whichever: of several seeds, not always the same."""
    found = set()
    for seed in range(8):
        run = start(TOY.model(), StageWise(choice="random"), data=TOY.data(), seed=seed)
        run.state["search"]["known"] = [0.5, 0.9]
        growing.deepen(run, ["stages.0", "stages.1"], 2)
        run.method._keep(run, [0.6, 0.8])  # type: ignore[attr-defined]
        found.add(tuple(growing.depths(run, ["stages.0", "stages.1"])))
    assert found == {(3, 2), (1, 4)}


def where_nothing_rises_the_search_is_over() -> None:
    run = searched(StageWise(growth=1, iterations=3, gain=1.0), 14)
    rows = [row for row in run.log if "depths" in row]
    assert len(rows) == 3 and rows[-1]["depths"] == [1, 2] and not run.edits


def features_are_sums_before_they_are_rectified() -> None:
    """Means over windows of 8 of what the last block adds up; negative numbers are among them."""
    model = StagedResNet((1, 1), (4, 6)).eval()
    assert growing._end(model, "stages.1") == ("stages.1.0.relu", "input")
    maps = torch.randn(2, 4, 16, 16)
    assert torch.allclose(growing._pooled(maps), F.avg_pool2d(maps, 8).flatten(1), atol=1e-6)
    assert growing._pooled(torch.randn(2, 4, 4, 4)).shape == (2, 4)


def a_block_leaves_the_end_of_a_row() -> None:
    model = TOY.model()
    before = str(model)
    Insert("stages.1", "copy", {"start": "fresh"}).apply(model)
    edit = Remove("stages.1.2", out=True)
    assert from_json(to_json([edit])) == [edit]
    assert len(edit.apply(model).removed) == 8 and str(model) == before
    for wrong in (Remove("stages.1.0", out=True), Remove("stages.0.0", out=True)):
        with pytest.raises(EditError):
            wrong.apply(model)


def what_cannot_grow_is_refused() -> None:
    for options, sentence in (
        ({"stages": ("stem",)}, "'stem' is none"),
        ({"iterations": 5}, "11 networks"),
    ):
        with pytest.raises(MethodError, match=sentence):
            start(TOY.model(), StageWise(**options), data=TOY.data(), steps=8)  # type: ignore[arg-type]
    x = torch.randn(8, 3, 6, 6)
    data = Data((x, torch.randn(8)), (x, torch.randn(8)))
    run = start(TOY.model(), StageWise(iterations=1), data=data, steps=3)
    with pytest.raises(DataError, match="a class each"):
        run.after_step()


CASES = [
    Case(
        "stage_wise",
        spec="stage_wise(iterations=1, growth=1)",
        variants=("stage_wise(iterations=1, choice='random', components=3)",),
        toys=("staged",),
        refuses={name: "needs stages" for name in TOYS},
        witnesses={
            "iterations": on_many(
                "stage_wise(iterations=1, growth=1)", "iterations", toy=SPECIAL["staged"]
            ),
        },
        own=(
            squares_of_importance_sum_to_the_features,
            importance_is_that_of_the_power_method,
            importance_is_that_of_scikit_learn,
            features_that_are_dead_or_not_finite,
            published_depths_have_published_sizes,
            stages_grow_by_all_or_nothing,
            classes_may_have_names_and_no_sample,
            a_stage_stays_deeper_where_its_importance_rose,
            every_network_begins_from_weights_of_its_own,
            random_growth_is_as_large,
            where_nothing_rises_the_search_is_over,
            features_are_sums_before_they_are_rectified,
            a_block_leaves_the_end_of_a_row,
            what_cannot_grow_is_refused,
        ),
    ),
]
