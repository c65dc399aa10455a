"""Projections onto balls of norms, against searches that know nothing of their formulas."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from torch import Tensor

from pliant.errors import PliantError
from pliant.math.balls import onto_l1, onto_l11, onto_l21, onto_nuclear, vanishing

Project = Callable[[Tensor, float], Tensor]
Norm = Callable[[Tensor], Tensor]


def l1(x: Tensor, radius: float) -> Tensor:
    return onto_l1(x.flatten(), radius).view_as(x)


def size(x: Tensor) -> Tensor:
    return x.abs().sum()


BALLS: dict[str, tuple[Project, Norm]] = {
    "l1": (l1, size),
    "l21": (onto_l21, lambda x: x.norm(dim=1).sum()),
    "nuclear": (onto_nuclear, lambda x: torch.linalg.svdvals(x).sum()),
}


def matrices(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(6, 9, generator=generator).double() for _ in range(count)]


def multiplier(values: np.ndarray, radius: float) -> np.ndarray:
    """Solve the optimality condition sum max(v - t, 0) = radius for t by root finding."""
    if values.sum() <= radius:
        return values
    root = brentq(lambda t: np.maximum(values - t, 0).sum() - radius, 0, values.max(), xtol=1e-14)
    return np.maximum(values - root, 0)


def reference(kind: str, x: np.ndarray, radius: float) -> np.ndarray:
    """The same nearest point from the proximal map of the norm and its multiplier."""
    if kind == "l1":
        return np.sign(x) * multiplier(np.abs(x).ravel(), radius).reshape(x.shape)
    if kind == "l21":
        norms = np.linalg.norm(x, axis=1)
        return x * (multiplier(norms, radius) / norms)[:, None]
    left, values, right = np.linalg.svd(x, full_matrices=False)
    return left @ np.diag(multiplier(values, radius)) @ right


@pytest.mark.parametrize("kind", BALLS)
def test_equals_a_root_of_the_optimality_condition(kind: str) -> None:
    project, norm = BALLS[kind]
    for i, x in enumerate(matrices(20)):
        radius = float(norm(x)) * (0.1 + 0.06 * i)  # the last ones lie inside
        found = project(x, radius)
        assert np.allclose(found.numpy(), reference(kind, x.numpy(), radius), atol=1e-8)
        assert float(norm(found)) == pytest.approx(min(radius, float(norm(x))))


@pytest.mark.slow  # cvxpy takes its time to load
@pytest.mark.parametrize("kind", BALLS)
def test_equals_what_a_solver_of_convex_problems_finds(kind: str) -> None:
    import cvxpy

    norms = {
        "l1": lambda v: cvxpy.norm1(cvxpy.vec(v, order="C")),
        "l21": lambda v: cvxpy.sum(cvxpy.norm(v, 2, axis=1)),
        "nuclear": cvxpy.normNuc,
    }
    project, norm = BALLS[kind]
    point, radius = cvxpy.Parameter((6, 9)), cvxpy.Parameter(nonneg=True)
    nearest = cvxpy.Variable((6, 9))
    distance = cvxpy.Minimize(cvxpy.sum_squares(nearest - point))
    problem = cvxpy.Problem(distance, [norms[kind](nearest) <= radius])
    for x in matrices(20):
        point.value, radius.value = x.numpy(), 0.4 * float(norm(x))
        problem.solve(solver=cvxpy.CLARABEL)
        found = project(x, float(radius.value)).numpy()
        assert np.allclose(found, nearest.value, atol=1e-4)


@pytest.mark.parametrize("kind", BALLS)
def test_no_point_of_the_ball_is_nearer(kind: str) -> None:
    """x - P(x) makes an obtuse angle with every way from P(x) into the ball."""
    project, norm = BALLS[kind]
    x, *others = matrices(50)
    found = project(x, 3.0)
    for other in others:
        inside = other * (3.0 / norm(other))
        assert float(((x - found) * (inside - found)).sum()) <= 1e-9


@pytest.mark.parametrize("kind", BALLS)
def test_idempotent_and_non_expansive(kind: str) -> None:
    project, _ = BALLS[kind]
    for a, b in zip(matrices(20), matrices(40)[20:], strict=True):
        pa, pb = project(a, 2.0), project(b, 2.0)
        assert torch.allclose(project(pa, 2.0), pa, atol=1e-9)
        assert float((pa - pb).norm()) <= float((a - b).norm()) + 1e-9


def test_l11_is_feasible_farther_and_keeps_signs() -> None:
    for x in matrices(20):
        found, nearest = onto_l11(x, 4.0), l1(x, 4.0)
        assert float(size(found)) == pytest.approx(4.0)
        assert torch.allclose(onto_l11(found, 4.0), found, atol=1e-9)
        assert ((found == 0) | (found.sign() == x.sign())).all()
        assert float((x - found).norm()) >= float((x - nearest).norm()) - 1e-12


def test_l11_empties_columns_where_l1_does_not() -> None:
    x = torch.randn(784, 300, generator=torch.Generator().manual_seed(0))  # columns as rows
    radius = 0.01 * float(size(x))

    def empty(found: Tensor) -> int:
        return int((found == 0).all(1).sum())

    assert empty(onto_l11(x, radius)) > 300 and empty(l1(x, radius)) < 20


def test_inside_nothing_changes_and_a_radius_of_zero_leaves_nothing() -> None:
    x = torch.randn(5, 7)
    for project in (l1, onto_l21, onto_l11, onto_nuclear):
        assert torch.equal(project(x, 1e6), x)
        assert not project(x, 0.0).any()
    zero = onto_l21(torch.cat([x, torch.zeros(1, 7)]), 1.0)
    assert torch.isfinite(zero).all() and not zero[-1].any()


def test_bad_numbers_are_refused() -> None:
    for project in (l1, onto_l21, onto_l11, onto_nuclear):
        with pytest.raises(PliantError, match="must be at least 0"):
            project(torch.ones(2, 2), -1.0)
        with pytest.raises(PliantError, match="finite"):
            project(torch.full((2, 2), float("nan")), 1.0)


@pytest.mark.parametrize("kind", ["l11", "l1", "l21"])
def test_vanishing_is_where_columns_become_empty(kind: str) -> None:
    """Just above that radius a column is there, just below it is gone."""
    x, project = matrices(1)[0], BALLS["l1"][0]
    if kind == "l1":
        shares, norm = vanishing(x.abs().amax(1), x), size(x)
    elif kind == "l21":
        norms = x.norm(dim=1)
        shares, norm, project = vanishing(norms), norms.sum(), onto_l21
    else:
        shares, norm, project = vanishing(x.abs().sum(1)), size(x), onto_l11
    for column, share in enumerate(shares.tolist()):
        assert project(x, (share + 1e-6) * float(norm))[column].any()
        if share:
            assert not project(x, (share - 1e-6) * float(norm))[column].any()
    assert int((shares == 0).sum()) == 1  # the largest never vanishes
