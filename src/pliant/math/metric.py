"""How much a change of a kernel matters: second moments of what a layer reads and of what follows.

A change E of a kernel, as a matrix (T, S*prod(kernel)), raises the loss by about tr(G E C E^T) / 2
with C the second moments of the layer's input patches and G those of the loss's gradient by its
outputs (K-FAC: Martens and Grosse, ICML 2015, eq. 1-6). With G left out it is the error of the
layer's own output; with both left out the error of its weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pliant.math import forms
from pliant.math.moments import dampen
from pliant.math.reads import Diagonal, Gram, LowRoots, Reads, Rows
from pliant.math.svd import CHEAP, norm_shares, plain_dtype

SENSITIVITY_DAMPING = 0.1
"""Share of the mean eigenvalue added to G: it is estimated from few gradients."""

SETTLING = 1200  # patch columns up to which forms without a closed solution sweep to the end
BRIEF = 2  # sweeps beyond
WHOLE = 5000  # patch columns up to which they use whole patches, and not channels alone


@dataclass(frozen=True, eq=False)
class Metric:
    """What a layer reads and how much its outputs matter.

    Args:
        reads: C, the mean over samples and positions: a matrix (S*prod(kernel),) * 2, or one that
            is kept in fewer numbers.
        outputs: G, (T, T), the mean over samples of the sum over positions (as if the gradients
            of different positions were uncorrelated), or its diagonal (T,), or the few samples
            (N, T) of which it is the sum of squares; None if the outputs count alike.
    """

    reads: Tensor | Reads
    outputs: Tensor | Rows | None = None

    @cached_property
    def seen(self) -> Reads:
        """What the layer reads."""
        return Gram(self.reads) if isinstance(self.reads, Tensor) else self.reads

    @property
    def size(self) -> int:
        """How many numbers one position of the output reads."""
        return self.seen.size

    @property
    def inputs(self) -> Tensor:
        """C as a matrix."""
        return self.seen.dense()

    def enter(self, weight: Tensor) -> Tensor:
        """Scale a kernel's outputs so that plain errors of the result are sensitivities."""
        if self.outputs is None:
            return weight
        for known in self._entered:
            if known.holds(weight):
                return known.found
        found = self._mixed(weight, inverse=False)
        self._entered[:] = [_Known(weight, weight._version, found)]
        return found

    def leave(self, kernel: Tensor) -> Tensor:
        """Undo ``enter`` on the last kernel of a factorization."""
        return kernel if self.outputs is None else self._mixed(kernel, inverse=True)

    def energy(self, weight: Tensor) -> float:
        """Return what losing the whole kernel would cost: tr(G W C W^T)."""
        return self.seen.energy(self.enter(weight).flatten(1))

    def decompose(
        self,
        weight: Tensor,
        form: str,
        ranks: tuple[int, ...],
        sizes: Sequence[tuple[int, ...]] = (),
    ) -> tuple[Tensor, ...]:
        """Factorize a kernel so that the damage in this metric is least.

        By sweeps where there is no closed solution: few of them for large kernels, and over
        channels instead of whole patches for the largest. ``sizes`` are ranks to which the
        factors will be cut (`pliant.math.forms.decompose`).
        """
        if form in ("output", "svd"):
            *first, last = self._projected(weight, form, ranks)
            return tuple(norm_shares(*first, self.leave(last)))
        dense = self.enter(weight)
        seen = self.seen.channels(weight[0, 0].numel()) if self.size > WHOLE else self.inputs
        sweeps = forms.SWEEPS if self.size <= SETTLING else BRIEF
        *first, last = forms.decompose(dense, form, ranks, moments=seen, sweeps=sweeps, sizes=sizes)
        return tuple(norm_shares(*first, self.leave(last)))

    def principal(self, weight: Tensor) -> Tensor:
        """Return what each direction of a matrix's outputs is worth, and keep the strongest.

        Factors of the same matrix need no other decomposition then.
        """
        dense = self.enter(weight)
        most = max(1, (dense.numel() - 1) // (len(dense) + dense[0].numel()))
        energies, basis = forms.principal(dense, self.seen, most)
        basis = basis if len(basis) <= CHEAP else basis.float()
        self._bases[:] = [_Known(weight, weight._version, basis)]
        return energies

    def _projected(self, weight: Tensor, form: str, ranks: tuple[int, ...]) -> tuple[Tensor, ...]:
        dense = self.enter(weight)
        for known in self._bases:
            if known.holds(weight) and ranks[0] <= known.found.shape[1]:
                return forms.onto(dense, form, known.found[:, : ranks[0]].double())
        return forms.projected(dense, form, ranks, self.seen)

    def forget(self) -> None:
        """Drop what the outputs' moments gave and can be computed again; directions are kept."""
        for name in ("_roots", "_low", "_entered"):
            self.__dict__.pop(name, None)

    @property
    def work(self) -> int:
        """Bytes of what is computed in float64 from the moments, and kept until `forget`."""
        inner = 2 * self.size**2 if isinstance(self.seen, Gram) else 0
        if isinstance(self.outputs, Rows):
            return 8 * (inner + 2 * self.outputs.rows.numel())
        return 8 * (inner + (0 if self.outputs is None else 3 * self.outputs.numel()))

    def _mixed(self, kernel: Tensor, *, inverse: bool) -> Tensor:
        if isinstance(self.outputs, Rows):
            found = self._low.apply(kernel.flatten(1), inverse=inverse)
            return found.reshape(kernel.shape).to(plain_dtype(kernel.dtype))
        return _mix(kernel, self._roots[1 if inverse else 0])

    @cached_property
    def _low(self) -> LowRoots:
        assert isinstance(self.outputs, Rows)
        return LowRoots.of(self.outputs.rows, SENSITIVITY_DAMPING)

    @cached_property
    def _entered(self) -> list[_Known]:
        return []

    @cached_property
    def _bases(self) -> list[_Known]:
        return []

    @cached_property
    def _roots(self) -> tuple[Tensor, Tensor]:
        assert isinstance(self.outputs, Tensor)
        if self.outputs.dim() == 1:
            each = self.outputs.double()
            mean = each.mean().clamp_min(torch.finfo(each.dtype).tiny)
            root = (each + SENSITIVITY_DAMPING * mean).sqrt()
            return root, 1 / root
        # Any root serves: that of Cholesky is the symmetric one turned, and takes less time.
        root = torch.linalg.cholesky(dampen(self.outputs.double(), SENSITIVITY_DAMPING))
        eye = torch.eye(len(root), dtype=root.dtype, device=root.device)
        return root.T, torch.linalg.solve_triangular(root.T, eye, upper=True)


@dataclass(frozen=True, eq=False)
class _Known:
    """What was found of a kernel as it was; it is held, so that its memory is nobody else's."""

    weight: Tensor
    version: int
    found: Tensor

    def holds(self, weight: Tensor) -> bool:
        """Whether this is the same kernel, unchanged, or a copy of it."""
        mine = self.weight
        if mine._version != self.version or mine.shape != weight.shape:
            return False
        here = mine.data_ptr() == weight.data_ptr() and mine.stride() == weight.stride()
        return here or torch.equal(mine, weight)


def _mix(kernel: Tensor, matrix: Tensor) -> Tensor:
    """Multiply the outputs of a kernel by a matrix, or by a number each; not in half precision."""
    kind = plain_dtype(kernel.dtype)
    if matrix.dim() == 1:
        return (matrix.view(-1, *[1] * (kernel.dim() - 1)) * kernel.double()).to(kind)
    return torch.einsum("ab,b...->a...", matrix, kernel.double()).to(kind)


def together(table: Metric, heads: Sequence[Metric]) -> Metric:
    """Return one metric of a table for all that its weight does, for layers tied to it too.

    What a table looks up is what a tied Linear gives, and the other way round. A sum of Kronecker
    products is none; it is taken for that of its parts, each by its share of the whole.

    Args:
        table: of the table.
        heads: of the layers whose weight is its own; those that say nothing of outputs are left.
    """
    known = [head for head in heads if head.outputs is not None]
    if table.outputs is None or not isinstance(table.seen, Diagonal) or not known:
        return table
    sides = [(table.seen.shares, _whole(table.outputs))]
    sides += [(_each(head.outputs), head.inputs.double()) for head in known]
    parts = [(rows / rows.mean(), columns, float(rows.mean())) for rows, columns in sides]
    whole = sum(float(columns.trace()) * mean for _, columns, mean in parts)
    if not 0 < whole < float("inf"):
        return table
    total = torch.stack([columns * mean for _, columns, mean in parts]).sum(0)
    each = [rows * (float(columns.trace()) * mean / whole) for rows, columns, mean in parts]
    return Metric(Diagonal(torch.stack(each).sum(0) - 1), total.float())


def _whole(outputs: Tensor | Rows | None) -> Tensor:
    assert outputs is not None
    if isinstance(outputs, Rows):
        return outputs.dense().double()
    return (torch.diag(outputs) if outputs.dim() == 1 else outputs).double()


def _each(outputs: Tensor | Rows | None) -> Tensor:
    assert outputs is not None
    if isinstance(outputs, Rows):
        return outputs.rows.double().square().sum(0)
    return (outputs if outputs.dim() == 1 else outputs.diagonal()).double()
