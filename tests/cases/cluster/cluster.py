"""Clustering on Grassmann manifolds: Gram matrices by definition, the closed form as an oracle."""

from collections.abc import Sequence

import torch
from torch import Tensor

import pliant
from pliant.errors import PliantError
from pliant.families.solve import grassmann
from pliant.methods.cluster.product_grassmann_lrr import ProductGrassmannLRR
from pliant.result import Solution
from pliant.testing import Case

MERGED = ((0, 1), (2, 3))  # groups that look the same, in each view


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bases(*shape: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(torch.randn(shape, generator=random(seed), dtype=torch.float64))[0]


def complementary(seed: int, noise: float = 0.2) -> tuple[list[Tensor], Tensor]:
    """Four groups of 15 subspaces; each of two views cannot tell two of the groups apart."""
    truth, views, draw = torch.arange(4).repeat_interleave(15), [], random(seed)
    for first, second in MERGED:
        centres = torch.linalg.qr(torch.randn(4, 30, 3, generator=draw, dtype=torch.float64))[0]
        centres[second] = centres[first]
        moved = torch.randn(60, 30, 3, generator=draw, dtype=torch.float64)
        views.append(torch.linalg.qr(centres[truth] + noise * moved)[0])
    return views, truth


def accuracy(labels: Tensor, truth: Tensor) -> float:
    """The share of samples whose group is that of most of its members."""
    counts = torch.stack([torch.bincount(truth[labels == k], minlength=4) for k in range(4)])
    return float(counts.amax(1).sum()) / len(truth)


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
        (flat, "sample 0 spans 1"),
        (torch.zeros(5, 6), "spans 0"),
        (bases(5, 3, 3), "choose another size"),
    ):
        try:
            pliant.cluster(x, 2, "product_grassmann_lrr")
        except PliantError as refusal:
            assert words in str(refusal), refusal
        else:
            raise AssertionError(words)


# ------------------------------------------------------------------ the oracle


def objective(gram: Tensor, z: Tensor, strength: float) -> float:
    error = torch.trace(z.T @ gram @ z) - 2 * torch.trace(gram @ z) + gram.trace()
    return float(error + strength * torch.linalg.svdvals(z).sum())


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
    assert (grassmann.representation(gram, strength, 20) - z).abs().max() < 1e-8


def iteration_agrees_with_the_closed_form() -> None:
    gram = grassmann.product_gram(complementary(0)[0])
    strength = 0.05 * float(torch.linalg.eigvalsh(gram)[-1])
    for rank, gap in ((60, 1e-12), (2, 1e-6), (4, 1e-6), (8, 0.02)):
        found = solved(gram, rank=rank, solver="admm", tolerance=1e-9)
        z, oracle = found.values["representation"], grassmann.representation(gram, strength, rank)
        assert objective(gram, z, strength) / objective(gram, oracle, strength) - 1 < gap
        assert int((torch.linalg.svdvals(z) > 1e-9).sum()) <= rank
        assert rank < 60 or (z - oracle).abs().max() < 1e-8


def solved(gram: Tensor, **options: object) -> Solution:
    method = ProductGrassmannLRR(precomputed=True, **options)  # type: ignore[arg-type]
    return pliant.cluster(gram, 4, method)


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


def found(views: Sequence[Tensor], truth: Tensor, rank: int | None = None) -> float:
    labels = pliant.cluster(list(views), 4, ProductGrassmannLRR(rank=rank)).value
    return accuracy(labels, truth)


def the_robust_error_bears_strange_samples() -> None:
    """Its objective falls from round to round, and strange samples weigh less."""
    views, truth = complementary(1)
    views = [torch.cat([view, bases(6, 30, 3, seed=9 + k)]) for k, view in enumerate(views)]
    rows = pliant.cluster(
        views, 4, 'product_grassmann_lrr(solver="admm", error="l21", growth=1.05)'
    )
    values = [row["objective"] for row in rows.history]
    assert len(values) > 1 and values[-1] < values[0]
    assert accuracy(rows.value[:60], truth) > 0.9


def a_gram_matrix_may_be_given() -> None:
    views, truth = complementary(0)
    labels = solved(grassmann.product_gram(views)).value
    assert torch.equal(labels, pliant.cluster(views, 4, "product_grassmann_lrr").value)
    try:
        solved(torch.randn(6, 6, generator=random(0)))
    except PliantError as refusal:
        assert "Gram matrix" in str(refusal)
    else:
        raise AssertionError("an asymmetric matrix was taken")


CASES = [
    Case(
        "product_grassmann_lrr",
        variants=(
            'product_grassmann_lrr(solver="admm", size=2, rank=5)',
            'product_grassmann_lrr(solver="admm", error="l21", growth=1.05)',
        ),
        own=(
            gram_is_that_of_the_projectors,
            sets_that_span_too_little_are_refused,
            closed_form_is_the_minimum_of_nuclear_norm_lrr,
            iteration_agrees_with_the_closed_form,
            views_complete_one_another,
            the_robust_error_bears_strange_samples,
            a_gram_matrix_may_be_given,
        ),
    )
]
