"""Energy ranks by hand; EVBMF against planted ranks and a brute-force free energy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from pliant.errors import PliantError
from pliant.math.rank import energy_rank, evbmf_rank, numerical_rank
from pliant.math.svd import spectrum, unfold
from tests.conftest import needs_data


def test_energy_rank_by_hand():
    sigma = torch.tensor([2.0, 1.0, 1.0, 0.0])  # shares 4/6, 5/6, 1
    assert [energy_rank(sigma, p) for p in (0, 0.6, 0.7, 0.84, 1)] == [1, 1, 2, 3, 3]
    assert energy_rank(sigma.flip(0), 0.7) == 2
    assert energy_rank(torch.zeros(5), 0.95) == 1


@given(st.lists(st.floats(0, 1e3, width=32), min_size=1, max_size=12), st.floats(0, 1))
def test_energy_rank_is_the_smallest_that_reaches_p(values, p):
    sigma = torch.tensor(values).sort(descending=True).values
    energy = sigma.double().square()
    rank = energy_rank(sigma, p)
    assert 1 <= rank <= len(sigma)
    assert energy[:rank].sum() >= p * energy.sum() * (1 - 1e-12)
    if rank > 1:
        assert energy[: rank - 1].sum() <= p * energy.sum() * (1 + 1e-12)


def test_energy_rank_refuses_percent():
    with pytest.raises(PliantError, match="between 0 and 1"):
        energy_rank(torch.ones(3), 95)


def test_numerical_rank_counts_against_the_largest():
    assert numerical_rank(torch.tensor([5.0, 1.0, 1e-6, 0.0])) == 2
    assert numerical_rank(torch.zeros(3)) == 0


def noisy(rows, columns, rank, noise, seed=0):
    rng = np.random.default_rng(seed)
    low = rng.normal(size=(rows, rank)) @ rng.normal(size=(rank, columns))
    return torch.from_numpy(low + noise * rng.normal(size=(rows, columns)))


@pytest.mark.parametrize(
    ("rows", "columns"), [(40, 40), (30, 120), (120, 30), (64, 576), (16, 1000)]
)
@pytest.mark.parametrize("rank", [0, 1, 6])
@pytest.mark.parametrize("noise", [0.1, 0.5])
def test_evbmf_finds_a_planted_rank(rows, columns, rank, noise):
    sigma = torch.linalg.svdvals(noisy(rows, columns, rank, noise))
    assert evbmf_rank(sigma, (rows, columns)) == rank
    assert evbmf_rank(100 * sigma.float(), (columns, rows)) == rank


def component(gamma, variance, large, small):
    """Least free energy of one component, by a grid over its two variance-to-mean ratios.

    With unit-free p = M var(a) / |a|^2 and q = L var(b) / |b|^2 the hyper-parameters and the
    norms of the means can be eliminated by hand; only (p, q) are left. Zero is the energy of
    the pruned component.
    """
    ratio = np.logspace(-4, 3, 150)
    p, q = ratio[:, None], ratio[None, :]
    energy = large * np.log1p(1 / p) + small * np.log1p(1 / q)
    return min(0.0, float((energy - gamma**2 / (variance * (1 + p) * (1 + q))).min()))


def brute_force_rank(sigma, small, large):
    """Minimise the summed free energy over a fine grid of noise variances."""
    energy = sigma**2
    best = (np.inf, 0)
    for variance in energy.sum() / (small * large) * np.logspace(-3, 0, 60):
        parts = [component(gamma, variance, large, small) for gamma in sigma]
        total = small * large * np.log(variance) + energy.sum() / variance + sum(parts)
        best = min(best, (total, sum(part < 0 for part in parts)))
    return best[1]


@pytest.mark.parametrize(
    ("rows", "columns", "rank", "noise"), [(6, 9, 2, 0.3), (5, 20, 1, 0.5), (8, 8, 3, 0.4)]
)
def test_evbmf_minimises_the_free_energy(rows, columns, rank, noise):
    for seed in range(2):
        sigma = torch.linalg.svdvals(noisy(rows, columns, rank, noise, seed))
        assert evbmf_rank(sigma, (rows, columns)) == brute_force_rank(sigma.numpy(), rows, columns)


def lowest_of_a_fine_grid(sigma, small, large, points=100_000):
    """The rank at the lowest of many values of the free energy, each by theorems 2 and 4.

    No Gaussian noise belies a component whose x = gamma^2 / (large variance) is at the edge: there
    its free energies with a mean and without one are equal, which gives the edge by bisection.
    """
    alpha = small / large

    def signal(x):
        shifted = np.maximum(x - (1 + alpha), 2 * np.sqrt(alpha))
        tau = (shifted + np.sqrt(np.maximum(shifted**2 - 4 * alpha, 0))) / 2
        return x - tau + np.log((tau + 1) / x) + alpha * np.log(tau / alpha + 1)

    low, high = (1 + np.sqrt(alpha)) ** 2, 100.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if signal(middle) < middle - np.log(middle) else (middle, high)
    energy = np.maximum(sigma**2, sigma.max() ** 2 * 1e-13) / large
    grid = np.linspace(np.log(energy.min() / high), np.log(energy.mean()), points)
    best = (np.inf, 0.0)
    for part in np.array_split(grid, max(1, points * small // 4_000_000)):
        x = energy / np.exp(part)[:, None]
        values = np.where(x > high, signal(x), x - np.log(x)).sum(1)
        best = min(best, (values.min(), part[values.argmin()]))
    return int((energy > high * np.exp(best[1])).sum())


@pytest.mark.parametrize(
    ("rows", "columns", "seed"),
    [(64, 576, 11), (64, 576, 44), (64, 576, 48), (48, 64, 8), (48, 64, 33), (16, 144, 0)],
)
def test_evbmf_finds_the_lowest_of_many_minima(rows, columns, seed):
    """Spectra that fall slowly, as those of trained kernels do, have a minimum at many ranks."""
    rng = np.random.default_rng(seed)
    fall = np.linspace(1, 0, rows) ** rng.uniform(0.5, 2) + 0.02
    sigma = np.sort(fall * rng.uniform(0.8, 1.2, rows))[::-1].copy()
    expected = lowest_of_a_fine_grid(sigma, rows, columns)
    assert evbmf_rank(torch.from_numpy(sigma), (rows, columns)) == expected


def test_evbmf_finds_the_lowest_minimum_of_trained_kernels():
    folder = needs_data("pretrained")
    for depth in (20, 56):
        weights = load_file(folder / f"resnet{depth}-cifar10.safetensors")
        for name, weight in weights.items():
            for mode in (0, 1) if weight.ndim == 4 else ():
                rows, columns = unfold(weight, mode).shape
                sigma = spectrum(weight, mode).double()
                expected = lowest_of_a_fine_grid(sigma.numpy(), rows, columns, points=50_000)
                assert evbmf_rank(sigma, (rows, columns)) == expected, f"{name}, mode {mode}"


def test_evbmf_of_an_exact_or_empty_matrix():
    assert evbmf_rank(torch.linalg.svdvals(noisy(20, 50, 4, 0.0)), (20, 50)) == 4
    assert evbmf_rank(torch.zeros(20), (20, 50)) == 0


def test_evbmf_refuses_a_wrong_shape():
    with pytest.raises(PliantError, match="shape of the unfolding"):
        evbmf_rank(torch.ones(9), (8, 20))
