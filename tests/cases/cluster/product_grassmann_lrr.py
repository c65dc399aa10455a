"""Clustering on product Grassmann manifolds: Gram matrices, the closed form as an oracle."""

from collections.abc import Sequence

import torch
from torch import Tensor

import pliant
from pliant.families.solve import grassmann, selfrep
from pliant.methods.cluster.product_grassmann_lrr import ProductGrassmannLRR
from pliant.testing import Case
from tests.cases.cluster import sets
from tests.cases.cluster.sets import accuracy, bases, complementary, noise, objective, top

OWN = "product_grassmann_lrr"


def solved(gram: Tensor, **options: object) -> pliant.Solution:
    return sets.solved(gram, OWN, **options)


# ------------------------------------------------------------------ Gram matrices


def gram_is_that_of_the_projectors() -> None:
    x = bases(6, 9, 3)
    projectors = (x @ x.mT).flatten(1)
    gram = grassmann.grassmann_gram(x)
    assert (gram - projectors @ projectors.T).abs().max() < 1e-10
    turned = x @ bases(6, 3, 3, seed=1)
    assert (grassmann.grassmann_gram(turned) - gram).abs().max() < 1e-10
    assert torch.linalg.eigvalsh(gram)[0] > -1e-10 and abs(gram.trace() - 18) < 1e-10
    both = grassmann.product_gram([x, bases(6, 5, 2)], (1.0, 0.5))
    assert abs(both.trace() - (18 + 6)) < 1e-10
    found = grassmann.points(
        [3 * one @ torch.diag(torch.tensor([3.0, 2, 1]).double()) for one in x], 3
    )
    assert (grassmann.grassmann_gram(found) - gram).abs().max() < 1e-10


def sets_that_span_too_little_are_refused() -> None:
    flat = torch.ones(5, 6, 3, dtype=torch.float64)
    for x, words in (
        (flat, "sample 0 of n_samples = 5 spans 1"),
        (torch.zeros(5, 6), "spans 0"),
        (bases(5, 3, 3), "choose another size"),
    ):
        sets.refused(words, x, OWN, centre=False)
    sets.refused("spans 0", flat, OWN)  # all vectors are the mean


# ------------------------------------------------------------------ the oracle


def closed_form_is_the_minimum_of_nuclear_norm_lrr() -> None:
    """Proximal gradient descent on the convex problem ends in the same matrix."""
    gram = grassmann.product_gram(complementary(0)[0])[::3, ::3]
    top = float(torch.linalg.eigvalsh(gram)[-1])
    strength = 0.05 * top
    z = torch.zeros_like(gram)
    for _ in range(6000):
        u, s, vh = torch.linalg.svd(z - (gram @ z - gram) / top)
        before, z = z, (u * (s - strength / (2 * top)).clamp_min(0)) @ vh
        if (z - before).abs().max() < 1e-12:
            break
    assert (selfrep.representation(gram, strength, 20) - z).abs().max() < 1e-8


def iteration_agrees_with_the_closed_form() -> None:
    gram = grassmann.product_gram(complementary(0)[0])
    for share in (0.05, 0.3, 1.0):
        strength = share * top(gram)
        for rank, gap in ((60, 1e-9), (2, 1e-6), (4, 1e-6), (8, 0.02)):
            found = solved(gram, rank=rank, strength=share, solver="admm", tolerance=1e-9)
            z, oracle = found.values["representation"], selfrep.representation(gram, strength, rank)
            assert objective(gram, z, strength) / objective(gram, oracle, strength) - 1 < gap
            assert int((torch.linalg.svdvals(z) > 1e-9).sum()) <= rank
            assert rank < 60 or share > 0.05 or (z - oracle).abs().max() < 1e-8


def two_sweeps_are_those_of_the_equations() -> None:
    """ADMM by hand, with inverses and whole matrices, for two paces."""
    gram = noise(9, 20) @ noise(9, 20).T
    strength = 0.1 * top(gram)
    for start, growth in ((0.3, 1.01), (0.8, 1.4)):
        mu, eye = start * top(gram), torch.eye(9, dtype=torch.float64)
        p = q = torch.linalg.eigh(gram)[1][:, -3:]
        s, y = eye[:3, :3], 0 * gram
        for _ in range(2):
            z = torch.linalg.inv(2 * gram + mu * eye) @ (2 * gram + mu * p @ s @ q.T - y)
            t = z + y / mu
            p = nearest(t @ q @ s.T)
            q = nearest(t.T @ p @ s)
            u, sigma, vh = torch.linalg.svd(p.T @ t @ q)
            s = u @ torch.diag((sigma - strength / mu).clamp_min(0)) @ vh
            y, mu = y + mu * (z - p @ s @ q.T), mu * growth
        options = {"rank": 3, "strength": 0.1, "mu": start, "growth": growth, "iterations": 2}
        found = solved(gram, solver="admm", **options)
        assert (found.values["representation"] - p @ s @ q.T).abs().max() < 1e-9


def nearest(matrix: Tensor) -> Tensor:
    """The orthonormal factor of the polar decomposition, by M (M^T M)^(-1/2)."""
    values, vectors = torch.linalg.eigh(matrix.T @ matrix)
    return matrix @ (vectors / values.sqrt()) @ vectors.T


# ------------------------------------------------------------------ groups


def views_complete_one_another() -> None:
    """On the product all four groups are found; no view alone, nor full rank, does as well."""
    full = []
    for seed in range(3):
        views, truth = complementary(seed)
        assert found(views, truth) == 1.0
        assert all(found([view], truth) < 0.85 for view in views)
        full.append(found(views, truth, rank=60))
    assert sum(full) / 3 < 1.0


def found(views: Sequence[Tensor], truth: Tensor, rank: int = 4) -> float:
    method = ProductGrassmannLRR(rank=rank, affinity="sizes", centre=False)
    return accuracy(pliant.cluster(list(views), 4, method).value, truth)


def strange_samples_do_not_mix_the_groups() -> None:
    """With the robust error, six samples of no group leave the others where they belong."""
    views, truth = complementary(1)
    views = [torch.cat([view, bases(6, 30, 3, seed=9 + k)]) for k, view in enumerate(views)]
    spec = 'product_grassmann_lrr(solver="admm", error="l21", growth=1.05)'
    assert accuracy(pliant.cluster(views, 4, spec).value[:60], truth) > 0.9


def a_gram_matrix_may_be_given() -> None:
    views, _ = complementary(0)
    gram = grassmann.product_gram(views)
    labels = pliant.cluster(views, 4, "product_grassmann_lrr(centre=False)").value
    assert torch.equal(solved(gram).value, labels)
    sets.refused("Gram matrix", noise(6, 6), OWN, precomputed=True)


def what_all_sets_share_tells_none_apart() -> None:
    """A common image moves nothing if it is taken off, and spoils the groups if it is not."""
    x, truth = sets.families(2)
    moved = x + 3 * noise(1, 30, 1, seed=5)
    plain, there = (pliant.cluster(y, 4, f"{OWN}(size=3)").value for y in (x, moved))
    assert torch.equal(plain, there) and accuracy(plain, truth) > 0.9
    left = pliant.cluster(moved, 4, f"{OWN}(size=3, centre=False)").value
    assert accuracy(left, truth) < 0.7


CASES = [
    Case(
        OWN,
        variants=(
            f'{OWN}(solver="admm", size=2, rank=5)',
            f'{OWN}(solver="admm", error="l21", growth=1.05)',
        ),
        witnesses={
            "precomputed": sets.a_gram_matrix_is_taken_for_one_if_said(OWN),
        },
        own=(
            gram_is_that_of_the_projectors,
            sets_that_span_too_little_are_refused,
            closed_form_is_the_minimum_of_nuclear_norm_lrr,
            iteration_agrees_with_the_closed_form,
            two_sweeps_are_those_of_the_equations,
            views_complete_one_another,
            strange_samples_do_not_mix_the_groups,
            a_gram_matrix_may_be_given,
            what_all_sets_share_tells_none_apart,
            *sets.shared(OWN),
        ),
    )
]
