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
        apart = self.rows.double().unflatten(1, (-1, positions)).transpose(1, 2).flatten(0, 1)
        return self_product(apart.T)

    def outer(self, matrix: Tensor) -> Tensor:
        """Return W C W^T of a matrix W (T, D), in float64, with C dampened."""
        wide, rows = matrix.double(), self.rows.double()
        mean = rows.square().sum() / self.size
        plain = self_product(wide)
        return plain if mean <= 0 else self_product(wide @ rows.T) + DAMPING * mean * plain

    def energy(self, matrix: Tensor) -> float:
        """Return the trace of W C W^T."""
        return float((matrix.double() @ self.rows.double().T).square().sum())


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
