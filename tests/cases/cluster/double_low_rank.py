"""Double low rank: its optimum in closed form, what it reduces to, what its factors' norms are."""

import numpy as np
import torch
from sklearn.cluster import KMeans
from torch import Tensor

import pliant
from pliant.api.estimator import Clusterer
from pliant.families.solve.grassmann import grassmann_gram
from pliant.families.solve.selfrep import errors, representation
from pliant.testing import Case
from tests.cases.cluster import sets
from tests.cases.cluster.sets import accuracy, bases, families, noise, objective, top, z_of

OWN = "double_low_rank"


def admm(gram: Tensor, **options: object) -> Tensor:
    return z_of(gram, OWN, precomputed=True, solver="admm", **options)


# ------------------------------------------------------------------ the optimum


def iteration_reaches_the_closed_form() -> None:
    gram = grassmann_gram(families(0)[0])
    for share in (0.05, 0.3):
        for rank in (2, 8, 20, 60):
            for penalty in ("none", "fro"):
                z = admm(gram, rank=rank, strength=share, factor_penalty=penalty, growth=1.05)
                oracle = representation(gram, share * top(gram), rank)
                values = [objective(gram, one, share * top(gram)) for one in (z, oracle)]
                assert values[0] / values[1] - 1 < 1e-3, (share, rank, penalty)
                assert int((torch.linalg.svdvals(z) > 1e-9).sum()) <= rank
    z = admm(gram, rank=60, tolerance=1e-9)
    assert (z - representation(gram, 0.05 * top(gram), 60)).abs().max() < 1e-6


def at_full_rank_it_is_the_nuclear_norm_alone() -> None:
    """Proximal gradient descent on the convex problem ends in the same matrix."""
    gram = grassmann_gram(families(0)[0])[::3, ::3]
    strength, z = 0.05 * top(gram), torch.zeros(20, 20, dtype=torch.float64)
    for _ in range(6000):
        u, s, vh = torch.linalg.svd(z - (gram @ z - gram) / top(gram))
        before, z = z, (u * (s - strength / (2 * top(gram))).clamp_min(0)) @ vh
        if (z - before).abs().max() < 1e-12:
            break
    assert (admm(gram, rank=20, tolerance=1e-9) - z).abs().max() < 1e-6


def without_a_penalty_it_is_a_projector() -> None:
    gram = grassmann_gram(families(0)[0])
    first = torch.linalg.eigh(gram)[1][:, -5:]
    for penalty in ("none", "fro", "nuclear"):
        z = admm(gram, rank=5, strength=0.0, factor_penalty=penalty, tolerance=1e-9)
        assert (z - first @ first.T).abs().max() < 1e-4


def lines_are_known_by_their_squared_cosines() -> None:
    """For vectors it is LRR on the kernel (x_i^T x_j)^2 of unit vectors."""
    x = noise(24, 6)
    unit = torch.nn.functional.normalize(x, dim=1)
    kernel = (unit @ unit.T).square()
    found = z_of(x, OWN, centre=False, rank=24, strength=0.2)
    assert (found - representation(kernel, 0.2 * top(kernel), 24)).abs().max() < 1e-10


# ------------------------------------------------------------------ factors


def squares_of_factors_are_the_nuclear_norm() -> None:
    """Where r is no less than the rank of the solution: |U|^2 + |V|^2 = 2 |Z|_*."""
    gram, strength = grassmann_gram(families(0)[0]), 0.3
    oracle = representation(gram, strength * top(gram), 60)
    options = {"solver": "admm", "strength": strength, "rank": 20, "tolerance": 1e-9}
    found = sets.solved(gram, OWN, factor_penalty="fro", **options)
    best, value = objective(gram, oracle, strength * top(gram)), found.history[0]["objective"]
    assert torch.linalg.matrix_rank(oracle) <= 20 and abs(value / best - 1) < 1e-4
    left, right = found.values["left"], found.values["right"]
    sigma = torch.linalg.svdvals(found.values["representation"])
    assert abs((left.square().sum() + right.square().sum()) / (2 * sigma.sum()) - 1) < 1e-4


def norms_of_factors_are_never_below_the_roots() -> None:
    """|U|_* + |V|_* >= 2 sum sqrt(sigma_i(U V^T)), with equality where the SVD is shared out."""
    for seed in range(10):
        u, v = noise(9, 4, seed=seed), noise(7, 4, seed=seed + 50)
        left, sigma, right = torch.linalg.svd(u @ v.T)
        roots = 2 * sigma[:4].sqrt().sum()
        both = [torch.linalg.svdvals(one).sum() for one in (u, v)]
        assert sum(both) >= roots - 1e-8
        even = [basis[:, :4] * sigma[:4].sqrt() for basis in (left, right.T)]
        assert abs(sum(torch.linalg.svdvals(one).sum() for one in even) - roots) < 1e-8


def nuclear_norms_of_factors_hold_down_the_roots() -> None:
    """Each eigenvalue d of G keeps the s that minimises d (1 - s)^2 + strength sqrt(s).

    From 0.3 on that is zero for all but one of them, and the iteration stays at a local minimum.
    """
    gram, grid = grassmann_gram(families(0)[0]), torch.linspace(0, 1, 20001).double()
    for share in (0.05, 0.2):
        strength, d = share * top(gram), torch.linalg.eigvalsh(gram).flip(0)[:5]
        costs = d[:, None] * (1 - grid).square() + strength * grid.sqrt()
        z = admm(gram, rank=5, strength=share, factor_penalty="nuclear", tolerance=1e-9)
        sigma = torch.linalg.svdvals(z)
        assert (sigma[:5] - grid[costs.argmin(1)]).abs().max() < 1e-3, share
        cost = float(errors(gram, z).sum() + strength * sigma.sqrt().sum())
        best = float(costs.amin(1).sum() + torch.linalg.eigvalsh(gram)[:-5].sum())
        assert cost / best - 1 < 1e-3, share


def factors_make_the_representation() -> None:
    gram = grassmann_gram(families(0)[0])
    for options in ({}, {"solver": "admm"}, {"solver": "admm", "factor_penalty": "nuclear"}):
        found = sets.solved(gram, OWN, rank=7, **options).values
        assert found["left"].shape == found["right"].shape == (60, 7)
        assert torch.allclose(found["left"] @ found["right"].T, found["representation"])
        assert ("residuals" in found) == ("solver" in options)
    assert found["residuals"][-1] < 1e-6 < found["residuals"][0]


def two_sweeps_are_those_of_the_equations() -> None:
    """ADMM by hand, with inverses and whole matrices, for two paces."""
    gram = noise(9, 20) @ noise(9, 20).T
    strength, eye = 0.1 * top(gram), torch.eye(9, dtype=torch.float64)
    for start, growth in ((0.3, 1.01), (0.8, 1.4)):
        mu, j = start * top(gram), 0 * gram
        u = v = torch.linalg.eigh(gram)[1][:, -3:]
        y1 = y2 = 0 * gram
        for _ in range(2):
            right = 2 * gram + mu * (j + u @ v.T) - y1 - y2
            z = torch.linalg.inv(2 * gram + 2 * mu * eye) @ right
            a, sigma, b = torch.linalg.svd(z + y1 / mu)
            j = a @ torch.diag((sigma - strength / mu).clamp_min(0)) @ b
            t = z + y2 / mu
            u = torch.linalg.qr(t @ v)[0]
            v = t.T @ u
            y1, y2, mu = y1 + mu * (z - j), y2 + mu * (z - u @ v.T), mu * growth
        options = {"rank": 3, "strength": 0.1, "mu": start, "growth": growth, "iterations": 2}
        assert (admm(gram, **options) - u @ v.T).abs().max() < 1e-9


# ------------------------------------------------------------------ groups


def a_cap_on_the_rank_finds_more_than_the_nuclear_norm_alone() -> None:
    """Four families of subspaces, five draws: also more than k-means of the vectors."""
    capped, plain, means = [], [], []
    for seed in range(5):
        x, truth = families(seed)
        for found, rank in ((capped, 4), (plain, 60)):
            spec = f"{OWN}(size=3, rank={rank})"
            found.append(accuracy(pliant.cluster(x, 4, spec, seed=seed).value, truth))
        model = KMeans(4, n_init=20, random_state=seed).fit(x.flatten(1).numpy())
        means.append(accuracy(torch.as_tensor(model.labels_).long(), truth))
    assert min(sum(capped) - sum(plain), sum(capped) - sum(means)) > 5 * 0.2
    assert all(one > other for one, other in zip(capped, plain, strict=True))


def the_estimator_shows_all_values() -> None:
    x = noise(24, 8, 4).numpy()
    model = Clusterer(4, method=f'{OWN}(solver="admm", size=2, rank=3)', random_state=0).fit(x)
    found = model.solution_.values
    assert np.array_equal(model.left_ @ model.right_.T, found["representation"])
    assert np.array_equal(model.representation_, found["representation"])
    assert model.affinity_.shape == (24, 24) and len(model.residuals_) == model.n_iter_
    assert model.objective_path_ == [row["objective"] for row in model.solution_.history]


def what_cannot_be_done_is_refused() -> None:
    gram = noise(9, 20) @ noise(9, 20).T
    for words, options in (
        ("nuclear norms of the factors have no closed form", {"factor_penalty": "nuclear"}),
        ("Gram matrix", {"factor_penalty": "fro"}),
    ):
        given = noise(9, 9) if words == "Gram matrix" else gram
        sets.refused(words, given, OWN, precomputed=True, **options)
    sets.refused("choose another size", bases(5, 3, 3), OWN)


CASES = [
    Case(
        OWN,
        variants=(
            f'{OWN}(solver="admm", size=2, rank=5)',
            f'{OWN}(solver="admm", factor_penalty="nuclear")',
            f'{OWN}(solver="admm", factor_penalty="fro", error="l21", growth=1.05)',
        ),
        witnesses={
            "precomputed": sets.a_gram_matrix_is_taken_for_one_if_said(OWN),
        },
        own=(
            iteration_reaches_the_closed_form,
            at_full_rank_it_is_the_nuclear_norm_alone,
            without_a_penalty_it_is_a_projector,
            lines_are_known_by_their_squared_cosines,
            squares_of_factors_are_the_nuclear_norm,
            norms_of_factors_are_never_below_the_roots,
            nuclear_norms_of_factors_hold_down_the_roots,
            factors_make_the_representation,
            two_sweeps_are_those_of_the_equations,
            a_cap_on_the_rank_finds_more_than_the_nuclear_norm_alone,
            the_estimator_shows_all_values,
            what_cannot_be_done_is_refused,
            *sets.shared(OWN),
        ),
    )
]
