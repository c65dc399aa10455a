"""What each rank of a form loses of a kernel: of its weights, or of what they are worth on data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pliant.math import forms
from pliant.math.metric import WHOLE, Metric
from pliant.math.moments import dampen, explained, mix_inputs
from pliant.math.reads import Gram, Reads
from pliant.math.svd import precise_dtype, self_product, spectrum


@dataclass(frozen=True, eq=False)
class Losses:
    """Shares of a kernel's energy that a form loses.

    Args:
        sides: for each rank of the form, what is lost if that side alone is cut to 0, 1, 2, ...
            directions: falling from 1, to 0 at full rank. The one side of input and spatial may
            end earlier, at the last rank that makes the kernel smaller.
        seen: for a form with two ranks, (r_in, K, T): see `pliant.math.moments.explained`.
    """

    sides: list[Tensor]
    seen: Tensor | None = None

    def at(self, ladder: Sequence[Sequence[int]]) -> list[float]:
        """Return what is lost at each of these ranks: that of factors one pass away from best.

        Sweeps over the factors lower it: mostly by a few to 20 %, by more for kernels of few
        channels near full rank, where little is lost.
        """
        if self.seen is None:
            return [float(self.sides[0][ranks[0]]) for ranks in ladder]
        kept, before = {}, 0
        outputs = self.seen.new_zeros(self.seen.shape[2], self.seen.shape[2])
        for into in sorted({ranks[0] for ranks in ladder}):
            outputs += self_product(self.seen[before:into].flatten(0, 1).T)
            kept[into], before = torch.linalg.eigvalsh(outputs).flip(0).cumsum(0), into
        whole = _positive(self.seen.square().sum())
        return [max(0.0, 1 - float(kept[into][out - 1] / whole)) for into, out in ladder]


def losses(weight: Tensor, kinds: Iterable[str], metric: Metric | None = None) -> dict[str, Losses]:
    """Return what every rank of these forms loses: of the weights, or in the metric of the data.

    Output and svd are exact, and without a metric all forms of one rank are. For the others the
    first layer reads the directions that are best if the positions of a patch were uncorrelated,
    and the last layers are the best for it.

    Raises:
        EditError: a kernel of this shape cannot take one of the forms.
    """
    dense, reads = weight.detach(), None
    if metric is not None:
        dense, reads = metric.enter(dense), metric.seen
    dense = dense.float()
    kinds, found, passes = list(kinds), {}, {}
    if metric is not None and kinds == ["svd"]:  # whose factors will need the vectors too
        energies = metric.principal(weight.detach())
    else:
        energies = _output_energies(dense, reads)
    outputs = _tail(energies, energies.sum())
    for kind in kinds:
        forms.max_ranks(dense.shape, kind)
        if kind in ("output", "svd"):
            found[kind] = Losses([outputs])
            continue
        columns = "spatial" if kind == "spatial" else "input"  # which Tucker-2 begins with
        if columns not in passes:
            both = columns == "input" and "tucker2" in kinds
            passes[columns] = _explained(forms.blocks(dense, columns), reads, all_ranks=both)
        seen, inputs = passes[columns]
        two = kind == "tucker2"
        found[kind] = Losses([inputs, outputs], seen) if two else Losses([inputs])
    return found


def _explained(block: Tensor, reads: Reads | None, *, all_ranks: bool) -> tuple[Tensor, Tensor]:
    """What the ranks of a first layer explain, and what is lost with each of them alone."""
    metric, positions = None, block.shape[2]
    if reads is None:
        block = block.to(precise_dtype(block.flatten(1)))
    elif reads.size > WHOLE:
        root = torch.linalg.cholesky(dampen(reads.channels(positions)))
        block = mix_inputs(block.double(), root)
    else:
        gram = reads if isinstance(reads, Gram) else Gram(reads.dense())
        block, metric = block.double(), gram.dampened
    flat = block.flatten(1)
    whole = (flat if metric is None else flat @ metric).mul(flat).sum()
    # Beyond this rank, half of all for a square kernel, the form is no smaller than the layer.
    last = (block.numel() - 1) // (block.shape[1] + len(block) * positions)
    seen = explained(block, metric, None if all_ranks else max(1, last))
    return seen, _tail(seen.square().sum((1, 2)), whole)


def _output_energies(weight: Tensor, reads: Reads | None) -> Tensor:
    if reads is None:
        return spectrum(weight, 0).double().square()
    flat = weight.flatten(1).double()
    if len(flat) <= flat.shape[1]:
        energies = reads.outer(flat)
    else:
        root = (reads if isinstance(reads, Gram) else Gram(reads.dense())).root
        energies = self_product((flat @ root).T)
    return torch.linalg.eigvalsh(energies).flip(0).clamp_min(0)


def _tail(energies: Tensor, whole: Tensor) -> Tensor:
    kept = energies.cumsum(0) / _positive(whole)
    return torch.cat([kept.new_ones(1), (1 - kept).clamp_min(0)])


def _positive(total: Tensor) -> Tensor:
    return total.clamp_min(torch.finfo(total.dtype).tiny)
