"""Distances to convex hulls: two solvers and a third agree, and geometry holds."""

import numpy as np
import pytest
import torch
from torch import Tensor

from pliant.errors import DataError
from pliant.families.analyze.hulls import COMPONENTS, Hulls, extremes, fit, space
from pliant.math.hull import Approach, exact_weights, nearest, size

PROBLEMS = [(50, 10), (200, 64), (500, 512)]


def noise(*shape: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=random, dtype=torch.float64)


def exact(points: Tensor, queries: Tensor) -> Tensor:
    return torch.stack([(exact_weights(points, z) @ points - z).norm() for z in queries])


@pytest.mark.parametrize(("count", "features"), PROBLEMS)
def test_frank_wolfe_and_least_squares_agree(count, features):
    points, queries = noise(count, features), 2 * noise(10, features, seed=1)
    found, wanted = nearest(points, queries), exact(points, queries)
    assert torch.allclose(found.distance, wanted, rtol=1e-6, atol=0)
    assert (found.lower <= wanted + 1e-12).all() and found.exact == 0
    assert (found.lower >= (1 - 1e-6) * found.distance).all()
    assert torch.allclose(found.weights.sum(1), torch.ones(10).double())
    assert (found.weights >= 0).all()
    near = found.weights @ points - queries
    assert torch.allclose(near.norm(dim=1), found.distance)


@pytest.mark.parametrize(("count", "features"), PROBLEMS)
def test_a_quadratic_program_agrees(count, features):
    """min w G w / 2 - (A z) w, sum w = 1, w >= 0; a touch of the identity makes G definite."""
    quadprog = pytest.importorskip("quadprog")
    points, queries = noise(count, features), 2 * noise(3, features, seed=1)
    gram = (points @ points.T).numpy()
    gram += 1e-11 * np.trace(gram) / count * np.eye(count)
    limits = np.concatenate([np.ones((count, 1)), np.eye(count)], axis=1)
    bounds = np.concatenate([[1.0], np.zeros(count)])
    for query, found in zip(queries, nearest(points, queries).distance, strict=True):
        weights = quadprog.solve_qp(gram, (points @ query).numpy(), limits, bounds, meq=1)[0]
        away = torch.as_tensor(weights) @ points - query
        assert float(away.norm()) == pytest.approx(float(found), rel=1e-6)


def test_combinations_of_points_are_in_the_hull():
    for count, features in ((50, 10), (30, 64), (5, 2)):
        points = noise(count, features)
        weights = torch.rand(20, count, dtype=torch.float64, generator=torch.Generator())
        inside = (weights / weights.sum(1, keepdim=True)) @ points
        assert nearest(points, inside, tolerance=1e-7).distance.max() < 1e-6
        assert exact(points, inside).max() < 1e-6
        assert nearest(points, inside, tolerance=1e-4).exact == 0  # near enough is inside


def test_a_hull_of_one_point_gives_its_distance():
    point, queries = noise(1, 7), noise(6, 7, seed=1)
    assert torch.allclose(nearest(point, queries).distance, (queries - point).norm(dim=1))
    doubled = nearest(point.repeat(4, 1), queries)
    assert torch.allclose(doubled.distance, (queries - point).norm(dim=1))


def test_a_segment_by_hand():
    """The nearest point of the segment from (0, 0) to (2, 0) to (0.5, 1) is (0.5, 0)."""
    points = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    found = nearest(points, torch.tensor([[0.5, 1.0], [3.0, 0.0], [-1.0, -1.0]]))
    assert torch.allclose(found.distance, torch.tensor([1.0, 1.0, 2.0**0.5]).double())
    wanted = torch.tensor([[0.75, 0.25], [0.0, 1.0], [1.0, 0.0]]).double()
    assert torch.allclose(found.weights, wanted, atol=1e-9)


def test_distances_move_no_more_than_their_queries():
    points, queries = noise(60, 12), 2 * noise(40, 12, seed=1)
    moved = queries + 0.3 * noise(40, 12, seed=2)
    change = (nearest(points, moved).distance - nearest(points, queries).distance).abs()
    assert (change <= (moved - queries).norm(dim=1) + 1e-5).all()


def test_more_points_bring_the_hull_no_farther():
    points, queries = noise(80, 12), 2 * noise(20, 12, seed=1)
    found = [nearest(points[:count], queries).distance for count in (5, 20, 80)]
    for fewer, more in zip(found, found[1:], strict=False):
        assert (more <= fewer * (1 + 1e-6)).all() and (more < 0.999 * fewer).any()


def test_own_points_are_those_of_each_query():
    points, queries = noise(6, 30, 8), 2 * noise(6, 8, seed=1)
    found = nearest(points, queries)
    for row in range(6):
        alone = nearest(points[row], queries[row : row + 1])
        assert torch.allclose(found.distance[row], alone.distance[0], rtol=1e-6)


def test_slow_queries_are_solved_exactly():
    points, queries = noise(60, 12), 1.2 * noise(20, 12, seed=1)
    hurried = nearest(points, queries, most=16)
    assert 0 < hurried.exact < 20 and hurried.steps == 16
    assert torch.allclose(hurried.distance, exact(points, queries), rtol=1e-6, atol=1e-8)
    assert (hurried.lower >= (1 - 1e-6) * hurried.distance - 1e-8).all()


def test_bounds_hold_before_the_end():
    points, queries = noise(60, 12), 2 * noise(20, 12, seed=1)
    wanted, approach = exact(points, queries), Approach(points, queries, 1.0)
    every = torch.arange(20)
    for _ in range(6):
        assert (approach.lower <= wanted + 1e-9).all() and (approach.upper >= wanted - 1e-9).all()
        approach.refine(every, 3)
    assert (approach.lower > 0.5 * wanted).all()


# ---------------------------------------------------------------- classes


def classes(groups: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """40 training features for each class, their labels, and 20 queries around each."""
    labels = torch.arange(groups).repeat_interleave(40)
    centres = 1.5 * noise(groups, 12, seed=5)
    training = centres[labels] + noise(40 * groups, 12, seed=6)
    queries = centres.repeat_interleave(20, 0) + 1.5 * noise(20 * groups, 12, seed=7)
    return training.float(), labels, queries.float()


@pytest.mark.parametrize("sampling", ["none", "random", "kmeans", "extreme", "query-local"])
def test_giving_up_hulls_changes_no_answer(sampling):
    training, labels, queries = classes()
    hulls = fit(training, labels, sampling=sampling, rows=15)
    index, _ = hulls.predict(queries)
    scores = hulls.scores(queries)
    assert torch.equal(index, scores.argmax(1))
    slow = fit(training, labels, sampling=sampling, rows=15, solver="nnls")
    assert torch.allclose(slow.scores(queries), scores, rtol=1e-6, atol=2e-6)
    assert torch.equal(slow.predict(queries)[0], index)


def test_hulls_are_given_up_and_slow_ones_solved(monkeypatch):
    """Most of the work of all distances is spared, and none goes on for ever."""
    training, labels, queries = classes(groups=8)
    hulls, work, most, refine = fit(training, labels), [], [], Approach.refine

    def counted(approach: Approach, rows: Tensor, steps: int = 16) -> None:
        work.append(len(rows) * steps)
        refine(approach, rows, steps)
        most.append(approach.steps)

    def worked(hulls: Hulls, ask: str) -> int:
        work.clear()
        getattr(hulls, ask)(queries)
        return sum(work)

    monkeypatch.setattr(Approach, "refine", counted)
    spared, full = worked(hulls, "predict"), worked(hulls, "scores")
    assert 0 < spared < 0.15 * full
    hurried = fit(training, labels, most=16)
    most.clear()
    worked(hurried, "predict")
    assert max(most) == 16
    assert torch.equal(hurried.predict(queries)[0], hulls.predict(queries)[0])


@pytest.mark.parametrize("sampling", ["random", "kmeans", "extreme", "query-local"])
def test_a_sample_is_farther_than_the_whole_class(sampling):
    training, labels, queries = classes()
    whole = -fit(training, labels, sampling="none").scores(queries)
    part = -fit(training, labels, sampling=sampling, rows=10).scores(queries)
    assert (part >= whole * (1 - 1e-6) - 1e-9).all() and (part > 1.001 * whole).any()
    all_ = -fit(training, labels, sampling=sampling, rows=40).scores(queries)
    assert torch.allclose(all_, whole, rtol=1e-6)


def test_samplings_keep_so_many_points_and_different_ones():
    training, labels, _ = classes()
    kept = {}
    for sampling in ("random", "kmeans", "extreme"):
        hulls = fit(training, labels, sampling=sampling, rows=10)
        assert all(0 < len(points) <= 10 for points in hulls.points)
        known = {tuple(row.tolist()) for row in training.double()}
        moved = hulls.points[0] + training.double().mean(0)
        assert all(any(np.allclose(row, one) for one in known) for row in moved.tolist())
        kept[sampling] = {tuple(row) for row in hulls.points[0].tolist()}
    assert len({frozenset(rows) for rows in kept.values()}) == 3
    drawn = [
        fit(training, labels, sampling="random", rows=10, generator=_seeded(seed)).points[0]
        for seed in (0, 0, 1)
    ]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_extreme_points_cover_more_and_more():
    """The farthest point is never farther from the hull of more; the end is at the corners."""
    points = noise(40, 4)
    order = extremes(points, 40)
    radius = [
        float(nearest(points[order[:count]], points).distance.max()) for count in (1, 4, 8, 16)
    ]
    assert all(later <= earlier + 1e-9 for earlier, later in zip(radius, radius[1:], strict=False))
    square = torch.tensor([[0, 0], [2, 0], [0, 2], [2, 2], [1, 1], [0.5, 1.5]]).double()
    assert sorted(extremes(square, 6).tolist()) == [0, 1, 2, 3]
    farthest = int((points - points.mean(0)).norm(dim=1).argmax())
    second = int((points - points[farthest]).norm(dim=1).argmax())
    assert order[:2].tolist() == [farthest, second]


def test_one_local_point_is_the_nearest_neighbour():
    neighbors = pytest.importorskip("sklearn.neighbors")
    training, labels, queries = classes()
    index, _ = fit(training, labels, rows=1).predict(queries)
    known = neighbors.KNeighborsClassifier(1).fit(training.numpy(), labels.numpy())
    assert np.array_equal(index.numpy(), known.predict(queries.numpy()))


def test_inside_of_several_hulls_the_nearest_mean_decides():
    square = torch.tensor([[0.0, 0], [2, 0], [0, 2], [2, 2]])
    training = torch.cat([square, square + 1])  # they share the square from 1 to 2
    labels = torch.tensor([0] * 4 + [7] * 4)
    queries = torch.tensor([[1.2, 1.2], [1.9, 1.9], [0.5, 0.5], [4.0, 4.0]])
    hulls = fit(training, labels)
    index, inside = hulls.predict(queries)
    assert index.tolist() == [0, 1, 0, 1] and hulls.classes.tolist() == [0, 7]
    assert inside[:2].all() and not inside[3].any()
    scores = hulls.scores(queries)
    assert (scores[:2] > 0).all() and scores[2, 0] > 0 > scores[2, 1]
    assert scores[3, 1] == pytest.approx(-(2**0.5))


def test_features_are_brought_into_the_space_of_the_training():
    training, labels, queries = classes()
    plain = space(training)
    assert torch.allclose(plain.enter(training).mean(0), torch.zeros(12).double(), atol=1e-6)
    even = space(training * torch.arange(1.0, 13), "standardize").enter(training)
    assert even.std(0, correction=0).max() == pytest.approx(1, abs=1e-6)
    unit = space(training, "l2")
    assert torch.allclose(unit.enter(3 * queries), unit.enter(queries))
    few = space(training, components=4)
    values = few.enter(training)
    assert values.shape == (120, 4)
    assert (values.T @ values - torch.diag((values**2).sum(0))).abs().max() < 1e-6
    left = torch.linalg.svdvals(training.double() - training.double().mean(0))
    assert torch.allclose(values.norm(dim=0), left[:4])
    same = fit(training, labels, components=12).scores(queries)
    assert torch.allclose(same, fit(training, labels).scores(queries), rtol=1e-6)
    assert space(noise(600, 520)).enter(noise(3, 520)).shape == (3, COMPONENTS)
    flat = torch.cat([training, torch.ones(120, 1)], 1)
    assert torch.isfinite(space(flat, "standardize").enter(flat)).all()


def test_odd_classes_are_handled_and_bad_features_refused():
    training, labels, queries = classes()
    lone = torch.cat([training, training[:1] + 9]), torch.cat([labels, torch.tensor([8])])
    hulls = fit(*lone, rows=5)
    assert hulls.predict(lone[0][-1:])[0].item() == 3 and len(hulls.points[3]) == 1
    assert fit(training[:1], labels[:1]).predict(queries)[0].eq(0).all()
    assert hulls.predict(queries[:0])[0].shape == (0,)
    for features, words in (
        (training[:0], "with as many labels"),
        (training * torch.nan, "finite"),
    ):
        with pytest.raises(DataError, match=words):
            fit(features, labels[: len(features)])
    assert size(torch.ones(4, 3).double()) == 1
