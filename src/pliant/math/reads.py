"""Second moments of what a layer reads, in as many numbers as it takes.

A wide layer that has read few samples has moments of low rank, and a table that looks up rows has
moments that are a diagonal: neither needs a matrix as wide as its inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pliant.math.moments import DAMPING, channel_moments, dampen
from pliant.math.svd import self_product

PART = 512  # samples that are widened to float64 at once
ZERO = torch.zeros((), dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class Gram:
    """All second moments.

    Args:
        moments: (D, D), symmetric.
    """

    moments: Tensor

    @property
    def size(self) -> int:
        """How many inputs there are, D."""
        return len(self.moments)

    def dense(self) -> Tensor:
        """Return them as a matrix (D, D)."""
        return self.moments

    def channels(self, positions: int) -> Tensor:
        """Return the moments summed over the positions of a kernel."""
        return channel_moments(self.moments.double(), positions)

    def outer(self, matrix: Tensor) -> Tensor:
        """Return W C W^T of a matrix W (T, D), in float64, with C dampened."""
        wide = matrix.double()
        return _symmetric(wide @ self.dampened @ wide.T)

    def energy(self, matrix: Tensor) -> float:
        """Return the trace of W C W^T."""
        wide = matrix.double()
        return float((wide @ self.moments.double() * wide).sum())

    @cached_property
    def dampened(self) -> Tensor:
        """The moments in float64, made safely positive definite."""
        return dampen(self.moments.double())

    @cached_property
    def root(self) -> Tensor:
        """The Cholesky root of the dampened moments."""
        return torch.linalg.cholesky(self.dampened)


@dataclass(frozen=True, eq=False)
class Rows:
    """Second moments of fewer samples than inputs: C = X^T X.

    Args:
        rows: X, (samples, D).
    """

    rows: Tensor

    @property
    def size(self) -> int:
        """How many inputs there are, D."""
        return self.rows.shape[1]

    def dense(self) -> Tensor:
        """Return them as a matrix (D, D)."""
        return self_product(self.rows.T)

    def channels(self, positions: int) -> Tensor:
        """Return the moments summed over the positions of a kernel."""
        found: Tensor | None = None
        for part in self.rows.split(PART):
            apart = part.double().unflatten(1, (-1, positions)).transpose(1, 2).flatten(0, 1)
            more = self_product(apart.T)
            found = more if found is None else found.add_(more)
        assert found is not None
        return found

    def outer(self, matrix: Tensor) -> Tensor:
        """Return W C W^T of a matrix W (T, D), in float64, with C dampened."""
        wide = matrix.double()
        mean = self.trace / self.size
        plain = self_product(wide)
        return plain if mean <= 0 else self_product(self._given(wide)) + DAMPING * mean * plain

    def energy(self, matrix: Tensor) -> float:
        """Return the trace of W C W^T."""
        return float(self._given(matrix.double()).square().sum())

    @cached_property
    def trace(self) -> Tensor:
        """The sum of the second moments, in float64."""
        return sum((part.double().square().sum() for part in self.rows.split(PART)), ZERO)

    def _given(self, wide: Tensor) -> Tensor:
        """W X^T, without a copy of all samples in float64."""
        return torch.cat([wide @ part.double().T for part in self.rows.split(PART)], 1)


@dataclass(frozen=True, eq=False)
class Diagonal:
    """Second moments of inputs of which one at a time is 1: how often each is.

    Every row of a table counts as if it had been looked up once more, by the rule of succession:
    those that calibration never met are met later.

    Args:
        counts: (D,), how often each of the inputs was met.
        total: what they are divided by.
    """

    counts: Tensor
    total: float = 1.0

    @property
    def size(self) -> int:
        """How many inputs there are, D."""
        return len(self.counts)

    @cached_property
    def shares(self) -> Tensor:
        """How often each of the inputs is met."""
        return (self.counts.double() + 1) / self.total

    def dense(self) -> Tensor:
        """Return them as a matrix (D, D)."""
        return torch.diag(self.shares)

    def channels(self, positions: int) -> Tensor:
        """Return the moments: there are no positions."""
        return self.dense()

    def outer(self, matrix: Tensor) -> Tensor:
        """Return W C W^T of a matrix W (T, D), in float64."""
        return self_product(matrix.double() * self.shares.sqrt())

    def energy(self, matrix: Tensor) -> float:
        """Return the trace of W C W^T."""
        return float((matrix.double().square() * self.shares).sum())


@dataclass(frozen=True, eq=False)
class Alike:
    """Second moments over channels that hold at every position of a kernel, positions apart.

    Args:
        moments: over channels, (S, S).
        positions: how many the kernel has, K; D is S*K.
    """

    moments: Tensor
    positions: int

    @property
    def size(self) -> int:
        """How many inputs there are, D."""
        return len(self.moments) * self.positions

    def dense(self) -> Tensor:
        """Return them as a matrix (D, D)."""
        eye = torch.eye(self.positions, device=self.moments.device, dtype=self.moments.dtype)
        return torch.kron(self.moments, eye)

    def channels(self, positions: int) -> Tensor:
        """Return the moments summed over the positions of a kernel."""
        return self.moments.double() * positions

    def outer(self, matrix: Tensor) -> Tensor:
        """Return W C W^T of a matrix W (T, D), in float64, with C dampened."""
        apart = matrix.double().unflatten(1, (-1, self.positions))
        mixed = torch.einsum("tsk,sq->tqk", apart, dampen(self.moments.double()))
        return _symmetric(mixed.flatten(1) @ apart.flatten(1).T)

    def energy(self, matrix: Tensor) -> float:
        """Return the trace of W C W^T."""
        apart = matrix.double().unflatten(1, (-1, self.positions))
        return float((torch.einsum("tsk,sq->tqk", apart, self.moments.double()) * apart).sum())


Reads = Gram | Rows | Diagonal | Alike


def over(reads: Reads, count: int) -> Reads:
    """Return sums over samples as means."""
    if isinstance(reads, Gram):
        return Gram(reads.moments / count)
    if isinstance(reads, Rows):
        return Rows(reads.rows / count**0.5)
    if isinstance(reads, Alike):
        return Alike(reads.moments / count, reads.positions)
    return Diagonal(reads.counts, reads.total * count)


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T) / 2


def forget(reads: Reads) -> None:
    """Drop what was computed from second moments in float64; it is computed again when needed."""
    for name in ("dampened", "root"):
        reads.__dict__.pop(name, None)


@dataclass(frozen=True, eq=False)
class LowRoots:
    """The symmetric root of G + d I and its inverse, for G = Y^T Y of few samples Y (N, T).

    Both are multiples of the identity but in the N directions of the samples, so that no matrix is
    as wide as the outputs.

    Args:
        basis: those directions, (T, N), orthonormal, in float64.
        gains: how much the root stretches each of them beside all others.
        scale: the root of d.
    """

    basis: Tensor
    gains: Tensor
    scale: Tensor

    @classmethod
    def of(cls, rows: Tensor, damping: float) -> LowRoots:
        """Decompose the small matrix Y Y^T; ``damping`` is a share of the mean eigenvalue of G."""
        wide = rows.double()
        values, vectors = torch.linalg.eigh(self_product(wide))
        floor = values.sum().clamp_min(torch.finfo(values.dtype).tiny) * damping / wide.shape[1]
        kept = values > 1e-9 * floor
        basis = wide.T @ (vectors[:, kept] / values[kept].sqrt())
        return cls(basis, (1 + values[kept] / floor).sqrt(), floor.sqrt())

    def apply(self, matrix: Tensor, *, inverse: bool) -> Tensor:
        """Multiply a matrix (T, n) by the root, or by its inverse."""
        gains, scale = (1 / self.gains, 1 / self.scale) if inverse else (self.gains, self.scale)
        wide = matrix.double()
        return scale * (wide + self.basis @ ((gains - 1)[:, None] * (self.basis.T @ wide)))
