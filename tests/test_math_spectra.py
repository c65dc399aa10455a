"""Spectra, penalties and the proximal step against plain SVD and autograd."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pliant.errors import PliantError
from pliant.math.norms import PENALTIES, penalty, penalty_gradient
from pliant.math.prox import shrink
from pliant.math.rank import energy_rank, numerical_rank
from pliant.math.svd import (
    balance,
    fold,
    gram,
    leading,
    spectral_map,
    spectrum,
    truncated_svd,
    unfold,
)

KERNELS = [(64, 32, 3, 3), (16, 24, 5), (6, 5, 3, 2, 2), (10, 30), (30, 10), (48, 3, 3, 3)]
shapes = st.lists(st.integers(1, 6), min_size=2, max_size=5).map(tuple)


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def planted(rank, shape=(32, 24, 3, 3), noise=0.0):
    """A kernel of exact input and output rank, plus noise."""
    core = seeded(rank, rank, *shape[2:], seed=1)
    dense = torch.einsum("ab...,ta,sb->ts...", core, seeded(shape[0], rank), seeded(shape[1], rank))
    return dense / dense.std() + noise * seeded(*shape, seed=2)


@settings(max_examples=30, deadline=None)
@given(shapes, st.sampled_from([0, 1]))
def test_unfold_puts_one_channel_in_a_row_and_fold_undoes_it(shape, mode):
    weight = seeded(*shape)
    matrix = unfold(weight, mode)
    assert torch.equal(matrix[0], weight.select(mode, 0).reshape(-1))
    assert torch.equal(fold(matrix, shape, mode), weight)


@pytest.mark.parametrize("shape", KERNELS)
@pytest.mark.parametrize("mode", [0, 1])
def test_spectrum_equals_the_svd(shape, mode):
    weight = seeded(*shape)
    expected = torch.linalg.svdvals(unfold(weight.double(), mode))
    assert torch.allclose(spectrum(weight, mode).double(), expected, rtol=1e-5, atol=1e-5)
    assert len(gram(weight, mode)) == len(expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_short_floats_have_float32_spectra(dtype):
    weight = seeded(8, 6, 3, 3).to(dtype)
    sigma = spectrum(weight, 1)
    assert sigma.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.allclose(sigma, torch.linalg.svdvals(unfold(weight.to(sigma.dtype), 1)), rtol=1e-4)
    assert penalty_gradient(weight).dtype == shrink(weight, 0, 0.1).dtype == dtype


def test_large_gram_by_blocks_equals_the_plain_product():
    weight = seeded(300, 310)
    assert torch.allclose(gram(weight, 0), weight.double() @ weight.double().T)


@pytest.mark.parametrize("mode", [0, 1])
@pytest.mark.parametrize("shape", KERNELS)
def test_spectral_map_changes_singular_values_only(shape, mode):
    weight = seeded(*shape)
    u, sigma, vt = torch.linalg.svd(unfold(weight, mode), full_matrices=False)
    expected = fold(u @ torch.diag(sigma**2) @ vt, shape, mode)
    assert torch.allclose(spectral_map(weight, mode, torch.square), expected, rtol=1e-3, atol=1e-3)


def test_spectral_map_is_unique_where_singular_values_repeat():
    weight = torch.linalg.qr(seeded(12, 12))[0]
    assert torch.allclose(spectral_map(weight, 0, lambda sigma: 2 * sigma), 2 * weight, atol=1e-5)


@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (5, 5), (1, 4)])
def test_truncated_svd_is_best_and_balanced(shape):
    matrix = seeded(*shape)
    for rank in range(1, min(shape) + 1):
        left, right = truncated_svd(matrix, rank)
        lost = torch.linalg.svdvals(matrix)[rank:].square().sum()
        assert left.shape == (shape[0], rank) and right.shape == (rank, shape[1])
        assert torch.allclose((matrix - left @ right).square().sum(), lost, atol=1e-4)
        assert torch.allclose(left.norm(dim=0), right.norm(dim=1), rtol=1e-4)


def test_truncated_svd_refuses_an_impossible_rank():
    with pytest.raises(PliantError, match="between 1 and 3"):
        truncated_svd(seeded(3, 5), 4)


def test_balance_keeps_the_product_and_evens_the_norms():
    left, right = seeded(9, 4), 100 * seeded(4, 11)
    even, other = balance(left, right)
    assert torch.allclose(even @ other, left @ right, rtol=1e-4, atol=1e-2)
    assert torch.allclose(even.norm(dim=0), other.norm(dim=1), rtol=1e-4)


@pytest.mark.parametrize(("shape", "rank"), [((8, 20), 3), ((20, 8), 3), ((20, 8), 12)])
def test_leading_directions_are_orthonormal_and_strongest(shape, rank):
    matrix = seeded(*shape)
    basis = leading(matrix, rank).float()
    kept = torch.linalg.svdvals(matrix)[:rank].square().sum()
    assert torch.allclose(basis.T @ basis, torch.eye(rank), atol=1e-5)
    assert torch.allclose((basis.T @ matrix).square().sum(), kept, rtol=1e-4)


def by_autograd(weight, kind, modes):
    leaf = weight.double().requires_grad_()
    sigmas = [torch.linalg.svdvals(unfold(leaf, mode)) for mode in modes]
    value = sum(PENALTIES[kind].value(sigma) for sigma in sigmas)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient


@pytest.mark.parametrize("kind", PENALTIES)
@pytest.mark.parametrize("shape", KERNELS)
@pytest.mark.parametrize("modes", [(0,), (1,), (0, 1)])
def test_penalty_and_gradient_equal_autograd(shape, kind, modes):
    weight = seeded(*shape) / 10
    value, gradient = by_autograd(weight, kind, modes)
    assert torch.allclose(penalty(weight, modes, kind).double(), value, rtol=1e-4)
    error = (penalty_gradient(weight, modes, kind).double() - gradient).norm()
    assert error <= 1e-4 * gradient.norm()


@pytest.mark.parametrize("kind", PENALTIES)
def test_gradient_stays_exact_where_float32_squares_would_not(kind):
    u, _, vt = torch.linalg.svd(seeded(48, 200), full_matrices=False)
    weight = (u * torch.linspace(0, -2.5, 48).pow(3).exp2()) @ vt  # sigma from 1 to 2e-5
    _, gradient = by_autograd(weight, kind, (0,))
    error = (penalty_gradient(weight, (0,), kind).double() - gradient).norm()
    assert error <= 1e-3 * gradient.norm()


def test_penalties_are_computed_by_hand_for_a_diagonal():
    weight = torch.diag(torch.tensor([3.0, 4.0]))
    assert float(penalty(weight, (0,))) == pytest.approx(7)
    assert float(penalty(weight, (0, 1))) == pytest.approx(14)
    assert float(penalty(weight, (0,), "hoyer")) == pytest.approx(7 / 5)
    assert float(penalty(weight, (0,), "schatten")) == pytest.approx(3**0.5 + 2, rel=1e-5)
    knee = 0.125  # a hundredth of (9 + 16) / 2
    expected = torch.tensor([1 + 9 / knee, 1 + 16 / knee]).log().sum()
    assert float(penalty(weight, (0,), "logdet")) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("kind", ["logdet", "hoyer"])
def test_scale_free_penalties_do_not_shrink_the_kernel(kind):
    weight = seeded(12, 9, 3, 3)
    assert torch.allclose(penalty(weight, kind=kind), penalty(5 * weight, kind=kind), rtol=1e-4)
    assert abs(float((penalty_gradient(weight, kind=kind) * weight).sum())) < 1e-3


@pytest.mark.parametrize("kind", PENALTIES)
def test_zero_kernels_have_finite_penalties_and_no_gradient(kind):
    weight = torch.zeros(4, 3, 3, 3)
    assert penalty(weight, kind=kind).isfinite()
    assert not penalty_gradient(weight, kind=kind).any()


def test_the_penalty_names_what_it_knows():
    with pytest.raises(PliantError, match="nuclear"):
        penalty(seeded(2, 2), kind="nucular")
    with pytest.raises(PliantError, match="mode 0"):
        penalty(seeded(2, 2), modes=(2,))


THRESHOLDS = [("soft", 2.0), ("relative", 0.2), ("reweighted", 0.05)]


@pytest.mark.parametrize(("kind", "threshold"), THRESHOLDS)
@pytest.mark.parametrize("mode", [0, 1])
def test_shrinking_lowers_the_nuclear_norm_and_never_raises_the_rank(mode, kind, threshold):
    for weight in (seeded(16, 12, 3, 3), planted(4), seeded(9, 14)):
        less = shrink(weight, mode, threshold, kind=kind)
        before, after = spectrum(weight, mode), spectrum(less, mode)
        assert penalty(less, (mode,)) < penalty(weight, (mode,))
        assert numerical_rank(after) <= numerical_rank(before)
        assert (after <= before * (1 + 1e-5) + 1e-4).all()


@pytest.mark.parametrize(("kind", "threshold"), [("soft", 6.0), ("relative", 0.1)])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_shrinking_recovers_a_planted_rank_exactly(kind, threshold, rank):
    noisy = planted(rank, noise=0.05)
    for mode in (0, 1):
        assert numerical_rank(spectrum(noisy, mode)) == noisy.shape[mode]
        assert numerical_rank(spectrum(shrink(noisy, mode, threshold, kind=kind), mode)) == rank


@pytest.mark.parametrize("mode", [0, 1])
def test_reweighted_shrinking_recovers_a_planted_rank_and_spares_the_strong(mode):
    noisy = planted(4, noise=0.05)
    less = shrink(noisy, mode, 0.05, kind="reweighted")
    before, after = spectrum(noisy, mode), spectrum(less, mode)
    assert numerical_rank(after) == 4
    lost = (before - after)[:4]
    assert (lost.diff() > -1e-4).all()


def test_soft_shrinking_subtracts_the_threshold():
    weight = seeded(8, 20)
    after = spectrum(shrink(weight, 0, 2.5), 0)
    assert torch.allclose(after, (spectrum(weight, 0) - 2.5).clamp_min(0), atol=1e-4)


@pytest.mark.parametrize(("kind", "threshold"), THRESHOLDS)
def test_the_norm_is_kept_when_asked(kind, threshold):
    weight = seeded(16, 12, 3, 3)
    kept = shrink(weight, 0, threshold, kind=kind, keep_norm=True)
    plain = shrink(weight, 0, threshold, kind=kind)
    assert torch.allclose(kept.norm(), weight.norm(), rtol=1e-5)
    assert torch.allclose(kept / kept.norm(), plain / plain.norm(), atol=1e-6)


@pytest.mark.parametrize("keep_norm", [False, True])
def test_shrinking_everything_leaves_zero(keep_norm):
    weight = seeded(4, 3, 3, 3)
    assert not shrink(weight, 0, 1e6, keep_norm=keep_norm).any()
    assert not shrink(0 * weight, 0, 0.1, kind="reweighted", keep_norm=keep_norm).any()


def test_scale_free_thresholds_commute_with_scaling():
    weight = seeded(10, 8, 3, 3)
    for kind in ("relative", "reweighted"):
        scaled = shrink(100 * weight, 0, 0.1, kind=kind)
        assert torch.allclose(scaled, 100 * shrink(weight, 0, 0.1, kind=kind), rtol=1e-3, atol=1e-3)


def test_shrink_refuses_what_it_does_not_know():
    with pytest.raises(PliantError, match="soft"):
        shrink(seeded(2, 2), 0, 0.1, kind="hard")
    with pytest.raises(PliantError, match="0 or more"):
        shrink(seeded(2, 2), 0, -1.0)


def test_shrunken_kernels_keep_their_energy_rank():
    weight = shrink(planted(5, noise=0.02), 0, 5.0)
    assert energy_rank(spectrum(weight, 0), 1 - 1e-9) <= 5
