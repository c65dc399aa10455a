"""What the cases of clustering share: subspaces, planted groups, and a run on a Gram matrix."""

from collections.abc import Callable

import torch
from torch import Tensor

import pliant
from pliant.errors import PliantError
from pliant.families.solve import selfrep
from pliant.families.solve.grassmann import grassmann_gram, points
from pliant.registry import construct
from pliant.result import Solution

MERGED = ((0, 1), (2, 3))  # groups that look the same, in each view


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=random(seed), dtype=torch.float64)


def bases(*shape: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(noise(*shape, seed=seed))[0]


def complementary(seed: int, spread: float = 0.2) -> tuple[list[Tensor], Tensor]:
    """Four groups of 15 subspaces; each of two views cannot tell two of the groups apart."""
    truth, views, draw = torch.arange(4).repeat_interleave(15), [], random(seed)
    for first, second in MERGED:
        centres = torch.linalg.qr(torch.randn(4, 30, 3, generator=draw, dtype=torch.float64))[0]
        centres[second] = centres[first]
        moved = torch.randn(60, 30, 3, generator=draw, dtype=torch.float64)
        views.append(torch.linalg.qr(centres[truth] + spread * moved)[0])
    return views, truth


def families(seed: int, spread: float = 0.3) -> tuple[Tensor, Tensor]:
    """Four groups of 15 subspaces of R^30 around four centres of three dimensions."""
    truth, draw = torch.arange(4).repeat_interleave(15), random(seed)
    centres = torch.linalg.qr(torch.randn(4, 30, 3, generator=draw, dtype=torch.float64))[0]
    moved = torch.randn(60, 30, 3, generator=draw, dtype=torch.float64)
    return torch.linalg.qr(centres[truth] + spread * moved)[0], truth


def accuracy(labels: Tensor, truth: Tensor) -> float:
    """The share of samples whose group is that of most of its members."""
    counts = torch.stack([torch.bincount(truth[labels == k], minlength=4) for k in range(4)])
    return float(counts.amax(1).sum()) / len(truth)


def solved(gram: Tensor, method: str, **options: object) -> Solution:
    """Cluster what is known by its Gram matrix, into four groups."""
    built = construct(method, {"precomputed": True, **options})
    return pliant.cluster(gram, 4, built)


def z_of(x: object, method: str, **options: object) -> Tensor:
    """The representation of samples of any form."""
    built = construct(method, options)
    return pliant.cluster(x, 4, built).values["representation"]


def top(gram: Tensor) -> float:
    return float(torch.linalg.eigvalsh(gram)[-1])


def objective(gram: Tensor, z: Tensor, strength: float) -> float:
    error = torch.trace(z.T @ gram @ z) - 2 * torch.trace(gram @ z) + gram.trace()
    return float(error + strength * torch.linalg.svdvals(z).sum())


def refused(words: str, x: object, method: str, **options: object) -> None:
    """Check that a call ends in a refusal with these words."""
    try:
        z_of(x, method, **options)
    except PliantError as refusal:
        assert words in str(refusal), refusal
    else:
        raise AssertionError(f"{words!r} was not said")


# ------------------------------------------------------------------ options both methods have


def subspaces_are_of_the_size_and_centring_asked_for(method: str) -> None:
    """Z of sets is Z of the Gram matrix of their points, whatever the size, and with centring."""
    x = noise(12, 7, 4) + 2 * noise(7, 1, seed=1)
    for size in (1, 2, 3):
        for centre in (True, False):
            moved = x - x.mean((0, 2), keepdim=True) if centre else x
            gram = grassmann_gram(points(list(moved), size))
            expected = z_of(gram, method, precomputed=True, strength=0.0, rank=5)
            found = z_of(x, method, size=size, centre=centre, strength=0.0, rank=5)
            assert (found - expected).abs().max() < 1e-8, (size, centre)


def weights_weigh_the_views(method: str) -> None:
    views = [bases(12, 9, 3), bases(12, 6, 2, seed=1)]
    one = z_of(views[0], method, rank=3)
    assert torch.allclose(z_of(views, method, rank=3, weights=(1.0, 0.0)), one)
    both, uneven = (z_of(views, method, rank=3, weights=w) for w in ((), (1.0, 0.2)))
    assert (both - one).abs().max() > 1e-2 < (both - uneven).abs().max()
    assert torch.allclose(both, z_of(views, method, rank=3, weights=(1.0, 1.0)))
    refused("one number of 0 or more", views, method, weights=(1.0,))
    refused("weights must be", views, method, weights=(1.0, -1.0))


def rank_and_strength_are_those_of_the_closed_form(method: str) -> None:
    """Eigenvalues of Z are 1 - strength d_1 / (2 d_i) for the r largest d_i, and zero else."""
    gram = noise(12, 20) @ noise(12, 20).T
    d = torch.linalg.eigvalsh(gram).flip(0)
    for rank in (2, 5):
        for strength in (0.0, 0.1, 0.5):
            z = z_of(gram, method, precomputed=True, rank=rank, strength=strength)
            expected = (1 - strength * d[0] / (2 * d)).clamp_min(0)
            expected[rank:] = 0
            assert torch.allclose(torch.linalg.svdvals(z), expected.sort(descending=True)[0])
    z = z_of(gram, method, precomputed=True, strength=0.0)
    assert torch.linalg.matrix_rank(z) == 5  # one more than the four groups
    refused("strength must", gram, method, precomputed=True, strength=2.0)
    refused("rank must be int of at least 1", gram, method, precomputed=True, rank=0)


def affinities_are_entries_or_cosines(method: str) -> None:
    gram = noise(12, 20) @ noise(12, 20).T
    found = {
        name: solved(gram, method, affinity=name, rank=3, strength=0.1).values
        for name in ("sizes", "angles")
    }
    z = found["sizes"]["representation"]
    assert torch.allclose(found["sizes"]["affinity"], z.abs())  # Z is symmetric here
    root = torch.linalg.eigh(z)
    rows = root.eigenvectors[:, -3:] * root.eigenvalues[-3:].sqrt()
    cosines = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=2)
    assert torch.allclose(found["angles"]["affinity"], cosines.square())
    skew = noise(6, 2) @ noise(6, 2, seed=1).T  # not symmetric: rows and columns count alike
    for name in ("sizes", "angles"):
        likeness = selfrep.AFFINITIES[name](skew)
        assert torch.allclose(likeness, likeness.T)
        assert torch.allclose(likeness, selfrep.AFFINITIES[name](skew.T))


def iterations_stop_where_they_are_told(method: str) -> None:
    gram = noise(12, 20) @ noise(12, 20).T
    short = solved(gram, method, solver="admm", iterations=3)
    assert short.iterations == 3 and not short.converged
    loose, tight = (solved(gram, method, solver="admm", tolerance=t) for t in (1e-2, 1e-8))
    assert loose.converged and tight.converged and loose.iterations < tight.iterations
    assert tight.history[-1]["residual"] < 1e-8 < loose.history[-1]["residual"] < 1e-2
    for option, value in (
        ("mu", 0.0),
        ("tolerance", 0.0),
        ("iterations", 0),
        ("growth", 1.0),
        ("growth", 11.0),
    ):
        refused(option, gram, method, precomputed=True, **{option: value})


def the_robust_error_is_a_sum_of_norms(method: str) -> None:
    """2 / c sum_j |E_j| + strength |Z|_* falls below its value at the squared-error solution."""
    centres = noise(3, 8).repeat_interleave(8, 0)
    x = torch.cat([centres + 0.1 * noise(24, 8, seed=1), 3 * noise(4, 8, seed=2)])
    gram = x @ x.T
    options = {"solver": "admm", "growth": 1.05, "rank": 4}
    plain, robust = (solved(gram, method, error=error, **options) for error in ("fro", "l21"))
    scale = norms(gram, plain).reciprocal().mean()

    def cost(found: Solution) -> float:
        nuclear = torch.linalg.svdvals(found.values["representation"]).sum()
        return float(2 / scale * norms(gram, found).sum() + 0.05 * top(gram) * nuclear)

    assert cost(robust) < 0.95 * cost(plain)
    assert abs(robust.history[-1]["objective"] / cost(robust) - 1) < 1e-4
    values = [row["objective"] for row in robust.history]
    assert len(values) > 1 and values[-1] < values[0]
    refused('use solver="admm"', gram, method, precomputed=True, error="l21")


def norms(gram: Tensor, found: Solution) -> Tensor:
    """The distance of each sample to its representation."""
    z = found.values["representation"]
    eye = torch.eye(len(z), dtype=z.dtype)
    return torch.einsum("ij,ik,kj->j", eye - z, gram, eye - z).clamp_min(0).sqrt()


SHARED = (
    subspaces_are_of_the_size_and_centring_asked_for,
    weights_weigh_the_views,
    rank_and_strength_are_those_of_the_closed_form,
    affinities_are_entries_or_cosines,
    iterations_stop_where_they_are_told,
    the_robust_error_is_a_sum_of_norms,
)


def shared(method: str) -> tuple[Callable[[], None], ...]:
    """What holds for the options of every self-representation, as examples of one method."""

    def of(example: Callable[[str], None]) -> Callable[[], None]:
        def check() -> None:
            example(method)

        check.__name__ = example.__name__
        return check

    return tuple(of(example) for example in SHARED)


def a_gram_matrix_is_taken_for_one_if_said(method: str) -> Callable[[], None]:
    """Return a test that square numbers are samples, or what samples have in common."""

    def check() -> None:
        half = noise(12, 5)
        found = [
            pliant.cluster(half @ half.T, 3, construct(method, {"precomputed": said}))
            for said in (True, False)
        ]
        one, other = (solution.values["representation"] for solution in found)
        assert not torch.equal(one, other)
        top = torch.linalg.eigh(half @ half.T)[1][:, -4:]
        assert torch.allclose(top @ top.T @ one, one, atol=1e-6)  # of its leading directions

    return check
