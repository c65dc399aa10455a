"""Self-representation: every sample as a combination of the others, and groups from that.

Samples are known by their Gram matrix G (N, N) alone. Column j of the representation Z says how
sample j is made of all samples; its squared error is Z_j^T G Z_j - 2 G_j^T Z_j + G_jj.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pliant.errors import MethodError, require
from pliant.families.solve.admm import Blocks, Pace, Solved
from pliant.result import Solution

RESTARTS = 20  # of k-means
SETTLED = 1e-4  # relative change of the robust objective at which reweighting stops
ROUNDS = 20  # of reweighting, at most
SMOOTHING = 1e-8  # of robust errors, relative to their mean: keeps weights finite
TINY = 1e-12
NEGLIGIBLE = 1e-6  # a singular value of Z below this share of the largest is none


def representation(gram: Tensor, strength: float, rank: int) -> Tensor:
    """Minimise tr(Z^T G Z) - 2 tr(G Z) + strength * (nuclear norm of Z) over rank(Z) <= rank.

    The global optimum in closed form, see `factors`. At full rank this is low-rank representation
    (LRR) itself.
    """
    left, right = factors(gram, strength, rank)
    return left @ right.T


def factors(gram: Tensor, strength: float, rank: int) -> tuple[Tensor, Tensor]:
    """Return that optimum as two factors (N, rank).

    Of the eigenvectors of G with the `rank` largest eigenvalues d, each is kept with the gain
    max(0, 1 - strength / (2 d)).
    """
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values[-rank:], vectors[:, -rank:]
    safe = values.clamp_min(torch.finfo(values.dtype).tiny)
    gain = (1 - strength / (2 * safe)).clamp_min(0)
    return vectors * gain, vectors


def errors(gram: Tensor, z: Tensor) -> Tensor:
    """Return the squared distance of every sample to its representation: (N,)."""
    found = ((gram @ z - 2 * gram) * z).sum(0) + gram.diagonal()
    return found.clamp_min(0)


def nuclear_norm(z: Tensor) -> Tensor:
    """Return the sum of the singular values."""
    return torch.linalg.svdvals(z).sum()


# ---------------------------------------------------------------- solvers


@dataclass(frozen=True, eq=False)
class Fit:
    """The squared errors as a function of Z, ready to be minimised: G is decomposed once.

    Args:
        gram: G, (N, N).
        values: its eigenvalues, ascending, (N, 1).
        vectors: its eigenvectors.
        weights: of the errors of the samples, (N,).
    """

    gram: Tensor
    values: Tensor
    vectors: Tensor
    weights: Tensor

    @property
    def linear(self) -> Tensor:
        """What Z is pulled towards: 2 G with weighted columns."""
        return 2 * self.weights * self.gram

    def least(self, right: Tensor, mu: float) -> Tensor:
        """Return the zero of the gradient of (weighted errors) + mu |Z|^2 / 2 - <right', Z>.

        Args:
            right: `linear` plus right'.
            mu: weight of the squares.
        """
        inner = (self.vectors.T @ right) / (2 * self.weights * self.values + mu)
        return self.vectors @ inner

    def pace(self, method: Any) -> Pace:
        """Return the pace that options ask for, with mu in units of the largest eigenvalue.

        A weight far below the eigenvalues lets Z drift to the identity, and the factors to a
        subspace of no meaning; one below the strength shrinks all factors to zero in the first
        sweep, after which they are arbitrary.
        """
        scale = float(self.values.max().clamp_min(TINY))
        mu = max(method.mu, 2 * method.strength) * scale
        return Pace(mu, method.growth, 1e6 * scale, method.iterations, method.tolerance)


@dataclass(frozen=True, eq=False)
class Represented:
    """A representation and how it was found.

    Args:
        z: (N, N).
        rows: of the history, one per round of reweighting.
        converged: whether the last round met its stopping rule.
        blocks: at the end; of a closed form the factors "u" and "v" of Z = U V^T.
        residuals: of the constraints after each iteration of the last round.
    """

    z: Tensor
    rows: tuple[dict[str, Any], ...]
    converged: bool
    blocks: Blocks
    residuals: tuple[float, ...] = ()


def closed_form(gram: Tensor, strength: float, rank: int) -> Represented:
    """Return the global optimum for squared errors."""
    left, right = factors(gram, strength, rank)
    z = left @ right.T
    value = float(errors(gram, z).sum() + strength * nuclear_norm(z))
    row = {"round": 0, "objective": value, "iterations": 1}
    return Represented(z, (row,), True, {"u": left, "v": right})


def iterated(
    gram: Tensor,
    solve: Callable[[Fit], Solved],
    product: Callable[[Blocks], Tensor],
    penalty: Callable[[Blocks], Tensor],
    *,
    robust: bool,
) -> Represented:
    """Minimise errors + penalty by a solver of squared errors with weights.

    The robust form sums errors instead of their squares: it weighs samples by 1 over their error
    until that changes nothing. Weights are scaled to a mean of 1 at the beginning, so that the
    strength of the penalty keeps its meaning. Each round minimises a bound of
    2 / c * (sum of errors) + penalty.

    Args:
        gram: G, (N, N).
        solve: minimises over the blocks.
        product: Z of the blocks.
        penalty: of the blocks, times its strength.
        robust: whether to reweigh.
    """
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp_min(0)[:, None]
    solved = solve(Fit(gram, values, vectors, torch.ones_like(gram[0])))
    z = product(solved.blocks)
    if not robust:
        value = float(errors(gram, z).sum() + penalty(solved.blocks))
        return _represented(z, [_row(0, value, solved)], solved)
    smooth = SMOOTHING * errors(gram, z).mean() + TINY
    scale = (errors(gram, z) + smooth).rsqrt().mean()
    rows: list[dict[str, Any]] = []
    for number in range(ROUNDS):
        weights = (errors(gram, z) + smooth).rsqrt() / scale
        solved = solve(Fit(gram, values, vectors, weights))
        z = product(solved.blocks)
        sizes = 2 / scale * (errors(gram, z) + smooth).sqrt().sum()
        rows.append(_row(number, float(sizes + penalty(solved.blocks)), solved))
        if number and abs(rows[-1]["objective"] / rows[-2]["objective"] - 1) < SETTLED:
            break
    return _represented(z, rows, solved)


def _represented(z: Tensor, rows: list[dict[str, Any]], solved: Solved) -> Represented:
    return Represented(z, tuple(rows), solved.converged, solved.blocks, solved.residuals)


def _row(number: int, objective: float, solved: Solved) -> dict[str, Any]:
    return {
        "round": number,
        "objective": objective,
        "iterations": solved.iterations,
        "residual": solved.residual,
    }


def check_error(name: str, method: Any) -> None:
    """Refuse the robust error of a closed form.

    Raises:
        MethodError: the solver has none.
    """
    if method.error == "l21" and method.solver == "spectral":
        raise MethodError(f'{name}: the robust error has no closed form: use solver="admm".')


# ---------------------------------------------------------------- groups


def grouped(found: Represented, groups: int, how: str, generator: torch.Generator) -> Solution:
    """Cut the graph of a representation: ``labels``, ``representation`` and ``affinity``.

    Args:
        found: the representation.
        groups: how many there are.
        how: a name in `AFFINITIES`.
        generator: of k-means.
    """
    likeness = AFFINITIES[how](found.z)
    values = {
        "labels": normalized_cut(likeness, groups, generator),
        "representation": found.z,
        "affinity": likeness,
    }
    made = sum(row["iterations"] for row in found.rows)
    return Solution(values, found.rows, found.converged, made)


def sizes(z: Tensor) -> Tensor:
    """Return how strongly samples represent one another, symmetric: (|Z| + |Z^T|) / 2."""
    return (z.abs() + z.abs().T) / 2


def angles(z: Tensor) -> Tensor:
    """Return squared cosines between samples in the space that Z spans, symmetric.

    With Z = U S V^T a sample is a row of U S^(1/2), of length 1; the same for V, and the mean of
    both (Liu et al. 2013, Robust Recovery of Subspace Structures by Low-Rank Representation).
    """
    u, s, vh = torch.linalg.svd(z)
    s = torch.where(s > NEGLIGIBLE * s.max(), s, 0).sqrt()
    rows = [torch.nn.functional.normalize(basis * s, dim=1) for basis in (u, vh.T)]
    return torch.stack([(one @ one.T).square() for one in rows]).mean(0)


AFFINITIES: dict[str, Callable[[Tensor], Tensor]] = {"sizes": sizes, "angles": angles}
"""What a representation says of the likeness of samples, by name."""


def normalized_cut(likeness: Tensor, groups: int, generator: torch.Generator) -> Tensor:
    """Divide samples into groups by spectral clustering: labels (N,), numbered as they appear.

    k-means on the rows, of length 1, of the first eigenvectors of D^-1/2 W D^-1/2. A sample
    without any affinity gets a small one to itself.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    eye = torch.eye(len(likeness), dtype=likeness.dtype, device=likeness.device)
    looped = likeness + 1e-10 * likeness.max().clamp_min(1e-12) * eye
    root = looped.sum(1).rsqrt()
    vectors = torch.linalg.eigh(root[:, None] * looped * root)[1][:, -groups:]
    rows = torch.nn.functional.normalize(vectors, dim=1)
    seed = int(torch.randint(2**31, (), generator=generator))
    means = require("sklearn.cluster", "cluster").KMeans(groups, n_init=RESTARTS, random_state=seed)
    found = torch.as_tensor(means.fit_predict(rows.cpu().numpy())).long()
    return renumbered(found).to(likeness.device)


def renumbered(labels: Tensor) -> Tensor:
    """Number groups in the order in which they appear, so that equal divisions are equal."""
    order = dict.fromkeys(labels.tolist())
    numbers = {label: number for number, label in enumerate(order)}
    return torch.tensor([numbers[label] for label in labels.tolist()])
