"""Recovering tensors: the t-product by its definition, penalties, and planted tensors."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

import pliant
from pliant.errors import PliantError
from pliant.families.solve import tsvd
from pliant.families.solve.admm import Pace, admm
from pliant.families.solve.concave import PENALTIES, named
from pliant.methods.recover.nonconvex_tsvd import NonconvexTSVD
from pliant.testing import Case

FAST = "nonconvex_tsvd(growth=1.1)"


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted(rank: int, size: int = 16, tubes: int = 4, seed: int = 0) -> Tensor:
    """A tensor of this tubal rank; its singular values are of order 1."""
    left, right = noise(size, rank, tubes, seed=seed), noise(rank, size, tubes, seed=seed + 1)
    return tsvd.tprod(left / size**0.5, right / tubes**0.5)


def share(shape: torch.Size, of: float, seed: int = 7) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < of


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# ------------------------------------------------------------------ the t-product


def circulant(x: Tensor) -> Tensor:
    """The block-circulant matrix of the frontal slices, by its definition."""
    n3 = x.shape[2]
    rows = [torch.cat([x[:, :, (i - j) % n3] for j in range(n3)], 1) for i in range(n3)]
    return torch.cat(rows)


def t_product_is_the_block_circulant_product() -> None:
    for n3 in (1, 4, 5):  # both parities
        a, b = noise(5, 3, n3), noise(3, 6, n3, seed=1)
        stacked = torch.cat([b[:, :, k] for k in range(n3)])
        expected = torch.stack((circulant(a) @ stacked).split(5), 2)
        assert (tsvd.tprod(a, b) - expected).abs().max() < 1e-12
        transposed = circulant(tsvd.ttranspose(a))
        assert (transposed - circulant(a).T).abs().max() < 1e-12
        nuclear = torch.linalg.svdvals(circulant(a)).sum() / n3
        assert abs(tsvd.tnn(a) - nuclear) < 1e-12


def t_svd_rebuilds_the_tensor() -> None:
    for shape in ((5, 3, 4), (3, 5, 5)):
        x = noise(*shape)
        u, s, v = tsvd.tsvd(x)
        assert (tsvd.tprod(tsvd.tprod(u, s), tsvd.ttranspose(v)) - x).abs().max() < 1e-12
        eye = tsvd.tprod(tsvd.ttranspose(u), u)
        assert (eye[:, :, 0] - torch.eye(3)).abs().max() < 1e-12 and eye[
            :, :, 1:
        ].abs().max() < 1e-12
    assert tsvd.tubal_rank(planted(3)) == 3 and tsvd.tubal_rank(torch.zeros(2, 2, 2)) == 0


def one_slice_is_a_matrix() -> None:
    x = noise(5, 4)
    expected = np.linalg.svd(x.numpy(), compute_uv=False)
    assert np.allclose(tsvd.singular_values(x[..., None])[0], expected, atol=1e-12)
    matrix = planted(1, tubes=1)[..., 0] + share(torch.Size((16, 16)), 0.05)
    found = pliant.recover(matrix, None, "nonconvex_tsvd(rounds=1, growth=1.5)").value
    cube = pliant.recover(matrix[..., None], None, "nonconvex_tsvd(rounds=1, growth=1.5)").value
    assert torch.equal(found, cube[..., 0])


def shrinking_is_the_proximal_point() -> None:
    """Perturbations never lower tau TNN(x) + |x - y|^2 / 2; tau / n3 and tau n3 are worse."""
    y, tau = noise(6, 5, 4), 0.7
    cost = lambda x: tau * tsvd.tnn(x) + float((x - y).square().sum()) / 2  # noqa: E731
    best = tsvd.prox_spectral(y, tau)
    for seed in range(20):
        for size in (1e-3, 1e-1):
            assert cost(best + size * noise(6, 5, 4, seed=seed)) >= cost(best)
    assert min(cost(tsvd.prox_spectral(y, t)) for t in (tau / 4, tau * 4)) > cost(best) + 1e-3
    for x in (y, y.transpose(0, 1)):  # through both Gram matrices
        slices = tsvd.to_slices(x)
        u, s, vh = torch.linalg.svd(slices, full_matrices=False)
        slow = tsvd.from_slices((u * (s - tau).clamp_min(0)[:, None]) @ vh, 4)
        assert (tsvd.prox_spectral(x, tau) - slow).abs().max() < 1e-10


# ------------------------------------------------------------------ penalties, the driver


def penalties_are_concave_with_slope_one_at_zero() -> None:
    x = torch.linspace(0, 3, 3001, dtype=torch.float64)
    for name, penalty in PENALTIES.items():
        value, slope = penalty.value(x, 0.8), penalty.slope(x, 0.8)
        numeric = (value[1:] - value[:-1]) / 1e-3
        assert (numeric - (slope[1:] + slope[:-1]) / 2).abs().max() < 1e-3, name
        assert value[0] == 0 and abs(slope[0] - 1) < 1e-12, name
        assert (slope[1:] <= slope[:-1] + 1e-12).all() and (slope >= 0).all(), name


def proximal_points_of_penalties_are_minima() -> None:
    grid = torch.linspace(0, 4, 40001, dtype=torch.float64)
    x = torch.tensor([0.0, 0.3, 0.7, 1.5, 3.0], dtype=torch.float64)
    for name, penalty in PENALTIES.items():
        for threshold in (0.3, 1.0):
            found = penalty.prox(x, threshold, 1.2)
            cost = threshold * penalty.value(grid, 1.2) + (grid - x[:, None]).square() / 2
            own = threshold * penalty.value(found, 1.2) + (found - x).square() / 2
            assert (own <= cost.amin(1) + 1e-6).all(), name
    soft = (x - 0.3).clamp_min(0)
    assert torch.allclose(named("l1").prox(x, 0.3, 1.0), soft)


def the_driver_solves_a_problem_with_a_known_answer() -> None:
    """min |x - c|^2 / 2 + |z|_1 / 2 with x = z is soft thresholding of c."""
    c, zero = noise(9), torch.zeros(9, dtype=torch.float64)
    solved = admm(
        {"x": zero, "z": zero, "dual": zero},
        {
            "x": lambda now, mu: (c + mu * now["z"] - now["dual"]) / (1 + mu),
            "z": lambda now, mu: soft(now["x"] + now["dual"] / mu, 0.5 / mu),
        },
        {"dual": lambda now: now["x"] - now["z"]},
        Pace(mu=1.0, growth=1.0, tolerance=1e-10),
    )
    assert solved.converged and solved.residual < 1e-10
    assert (solved.blocks["z"] - soft(c, 0.5)).abs().max() < 1e-8


def soft(x: Tensor, by: float) -> Tensor:
    return x.sign() * (x.abs() - by).clamp_min(0)


# ------------------------------------------------------------------ planted tensors


def errors_are_removed_where_the_nuclear_norm_fails() -> None:
    low = planted(3)
    signs = noise(*low.shape, seed=3).sign()
    found = pliant.recover(low + signs * share(low.shape, 0.2), None, FAST)
    assert error(found.values["convex"], low) > 1e-1 and error(found.value, low) < 1e-6
    assert found.converged and tsvd.tubal_rank(found.value, 1e-5) == 3


def gaps_are_filled_where_the_nuclear_norm_fails() -> None:
    low = planted(2)
    known = share(low.shape, 0.4)
    found = pliant.recover(torch.where(known, low, torch.nan), known, FAST)
    assert error(found.values["convex"], low) > 1e-2 and error(found.value, low) < 1e-6
    assert torch.equal(found.value[known], low[known])


def the_objective_never_rises() -> None:
    low = planted(6)  # too much for either: it falls all the same
    wrong = low + noise(*low.shape, seed=3).sign() * share(low.shape, 0.25)
    for x, known in ((wrong, None), (low, share(low.shape, 0.4))):
        spec = "nonconvex_tsvd(rounds=2, settled=1e-9, growth=1.2)"
        rows = pliant.recover(x, known, spec).history
        fall = [after["objective"] - row["objective"] for row, after in pairwise(rows)]
        assert len(fall) == 2 and max(fall) < 1e-5


def both_majorizers_reach_one_point() -> None:
    low = planted(3)
    wrong = low + noise(*low.shape, seed=3).sign() * share(low.shape, 0.2)
    first, second = (
        pliant.recover(wrong, None, f"nonconvex_tsvd(majorizer='{how}', growth=1.15)").value
        for how in ("weights", "shift")
    )
    assert error(first, second) < 1e-5


def tubes_may_lie_along_any_axis() -> None:
    low = planted(2)
    known = share(low.shape, 0.6)
    first = pliant.recover(low, known, "nonconvex_tsvd(rounds=0, growth=1.5)").value
    moved = pliant.recover(
        low.movedim(2, 0), known.movedim(2, 0), "nonconvex_tsvd(rounds=0, growth=1.5, axis=0)"
    )
    assert torch.allclose(moved.value.movedim(0, 2), first, atol=1e-9)


# ------------------------------------------------------------------ options


def in_fourier(x: Tensor, change: Callable[[np.ndarray], np.ndarray]) -> Tensor:
    """Change the singular values of every Fourier slice, all of them by numpy."""
    slices = np.fft.fft(x.numpy(), axis=2)
    for k in range(slices.shape[2]):
        u, s, vh = np.linalg.svd(slices[:, :, k], full_matrices=False)
        slices[:, :, k] = (u * change(s)) @ vh
    return torch.as_tensor(np.fft.ifft(slices, axis=2).real)


def by_hand(x: Tensor, known: Tensor | None, **options: Any) -> list[Tensor]:
    """Two rounds of sweeps, written out: the low-rank parts and the objective of the last."""
    o = {**BASE, **options}
    g, h = named(o["penalty"]), named(o["error_penalty"])
    strength = o["strength"] / (max(x.shape[:2]) * x.shape[2]) ** 0.5
    low = rest = torch.zeros_like(x)
    found, a, b = [], 1.0, 1.0
    for number in range(2):
        mu, dual = 1e-3, torch.zeros_like(x)
        before, errors = low, rest

        def slope(s: np.ndarray, a: float = a, number: int = number) -> np.ndarray:
            return np.ones_like(s) if number == 0 else g.slope(torch.as_tensor(s), a).numpy()

        weighted = o["majorizer"] == "weights"
        sizes = torch.fft.fft(before, dim=2).movedim(2, 0)
        weights = [slope(np.linalg.svd(one, compute_uv=False)) for one in sizes.numpy()]
        pull = 0 * x if weighted else in_fourier(before, lambda s: 1 - slope(s))
        push = 0 * x if weighted or number == 0 else errors.sign() * (1 - h.slope(errors.abs(), b))
        thresholds = h.slope(errors.abs(), b) if weighted and number else torch.ones_like(x)
        for _ in range(o["iterations"]):
            each = iter(weights if weighted else [np.ones_like(one) for one in weights])
            target = x - rest + (dual + pull) / mu
            low = in_fourier(target, lambda s: np.maximum(s - next(each) / mu, 0))  # noqa: B023
            target = x - low + dual / mu
            if known is None:
                rest = soft(target + strength * push / mu, strength * thresholds / mu)
            else:
                rest = target.masked_fill(known, 0)
            dual, mu = dual + mu * (x - low - rest), mu * o["growth"]
        if number == 0:
            a = o["scale"] * float(tsvd.singular_values(low).max())
            b = o["error_scale"] * float(rest.square().sum() / rest.abs().sum())
        found.append(low)
    value = float(tsvd.mean_over_slices(g.value(tsvd.singular_values(low), a), x.shape[2]))
    if known is None:
        value += strength * float(h.value(rest.abs(), b).sum())
    return [*found, torch.tensor(value)]


BASE: dict[str, Any] = {
    "penalty": "mcp",
    "error_penalty": "mcp",
    "scale": 0.5,
    "error_scale": 0.5,
    "strength": 1.0,
    "majorizer": "weights",
    "iterations": 22,
    "growth": 1.5,
}
OTHER: tuple[dict[str, Any], ...] = (
    {},
    {"penalty": "log"},
    {"error_penalty": "laplace"},
    {"scale": 0.2},
    {"error_scale": 1.3},
    {"strength": 1.6},
    {"majorizer": "shift"},
    {"iterations": 26},
    {"growth": 1.4},
)


def two_rounds_are_those_of_the_equations() -> None:
    """Every option that has a part in them, one after the other, with errors and with gaps."""
    low = planted(2, size=8, tubes=3)
    wrong = low + noise(8, 8, 3, seed=3).sign() * share(low.shape, 0.15)
    wrong = wrong / wrong.abs().max()  # as the method scales it
    known = share(low.shape, 0.7)
    for options in OTHER:
        built = NonconvexTSVD(**{**BASE, **options, "rounds": 1, "settled": 1e-12})
        for x, mask in (
            (wrong, None),
            (torch.where(known, low, 0) / low[known].abs().max(), known),
        ):
            first, second, value = by_hand(x, mask, **options)
            found = pliant.recover(x, mask, built)
            for own, expected in ((found.values["convex"], first), (found.value, second)):
                part = expected if mask is None else torch.where(mask, x, expected)
                assert (own - part).abs().max() < 1e-7, options
            assert abs(found.history[1]["objective"] - value) < 1e-6, options


def rounds_end_where_they_are_told() -> None:
    low = planted(3)
    wrong = low + noise(*low.shape, seed=3).sign() * share(low.shape, 0.2)
    run = lambda **o: pliant.recover(wrong, None, f"nonconvex_tsvd({_said(growth=1.3, **o)})")  # noqa: E731
    assert [len(run(rounds=n, settled=1e-12).history) for n in (0, 1, 3)] == [1, 2, 4]
    assert len(run(settled=1e9).history) == 1 < len(run(settled=1e-3).history)
    short = run(iterations=7, rounds=0)
    assert short.iterations == 7 and not short.converged
    loose, tight = (run(tolerance=t, rounds=0).history[0] for t in (1e-3, 1e-8))
    assert tight["residual"] < 1e-8 < loose["residual"] < 1e-3
    assert loose["iterations"] < tight["iterations"]


def _said(**options: object) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


def what_nobody_can_fill_in_is_refused() -> None:
    known = torch.ones(6, 5, 3, dtype=torch.bool)
    known[2] = False
    for x, mask, words in (
        (noise(6, 5, 3), known, "row 2 has none"),
        (noise(6, 5, 3).transpose(0, 1), known.transpose(0, 1), "column 2 has none"),
        (noise(6), None, "third order"),
        (noise(2, 2, 2, 2), None, "third order"),
    ):
        try:
            pliant.recover(x, mask, "nonconvex_tsvd")
        except PliantError as refusal:
            assert words in str(refusal)
        else:
            raise AssertionError(words)


CASES = [
    Case(
        "nonconvex_tsvd",
        spec="nonconvex_tsvd(rounds=1, growth=1.5)",
        variants=(
            'nonconvex_tsvd(penalty="l1", error_penalty="l1", growth=1.5)',
            'nonconvex_tsvd(penalty="scad", error_penalty="laplace", rounds=1, growth=1.5)',
            'nonconvex_tsvd(majorizer="shift", penalty="log", rounds=1, axis=0, growth=1.5)',
        ),
        own=(
            t_product_is_the_block_circulant_product,
            t_svd_rebuilds_the_tensor,
            one_slice_is_a_matrix,
            shrinking_is_the_proximal_point,
            penalties_are_concave_with_slope_one_at_zero,
            proximal_points_of_penalties_are_minima,
            the_driver_solves_a_problem_with_a_known_answer,
            errors_are_removed_where_the_nuclear_norm_fails,
            gaps_are_filled_where_the_nuclear_norm_fails,
            the_objective_never_rises,
            both_majorizers_reach_one_point,
            tubes_may_lie_along_any_axis,
            two_rounds_are_those_of_the_equations,
            rounds_end_where_they_are_told,
            what_nobody_can_fill_in_is_refused,
        ),
    )
]
