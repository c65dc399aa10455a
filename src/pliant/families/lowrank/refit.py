"""Fits factorized layers to what the dense network gives, one after the other, without labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pliant.cost import Example, call, evaluating
from pliant.nn.kinds import TRANSPOSED
from pliant.nn.layers import Factorizable
from pliant.observe.moments import patches, thinned
from pliant.observe.watch import Stepped, first_tensor

RIDGE = 1e-2
"""Pull towards the present kernel, in units of the mean energy of what it reads."""


def reconstruct(
    dense: nn.Module,
    model: nn.Module,
    layers: Sequence[str],
    batches: Iterable[Example],
) -> None:
    """Refit the last kernel of every factorized layer, in order of calls, by linear regression.

    The target is the layer's output in the dense network, the regressors what the layer reads in
    the compressed one: each layer also makes up for the layers before it (He, Zhang and Sun,
    ICCV 2017, eq. 5). Both networks are walked once per batch, side by side; a layer is refitted
    when the walk comes to it, from all that was seen of it so far, and what follows reads what it
    gives then. The time grows with the depth, the memory with the largest layer. The kernel is
    changed in place.

    Args:
        dense: the network before.
        model: the network after; its ``layers`` are rows of plain layers.
        layers: names of the factorized layers; those that are never called stay as they are, and
            so do those that end with a transposed convolution, whose outputs overlap.
        batches: inputs of forward calls; one large batch serves best.
    """
    lasts = {name: model.get_submodule(name)[-1] for name in layers}  # type: ignore[index]
    fits = {n: _Fit(last) for n, last in lasts.items() if not isinstance(last, TRANSPOSED)}
    for batch in batches:
        with Stepped(dense, list(fits), batch) as wanted, evaluating(model), torch.no_grad():
            handles = [
                fit.last.register_forward_pre_hook(_refitting(name, fit, wanted), with_kwargs=True)
                for name, fit in fits.items()
            ]
            try:
                call(model, batch)
            finally:
                for handle in handles:
                    handle.remove()


def _refitting(name: str, fit: _Fit, wanted: Stepped) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        target = wanted.until(name)
        if target is not None:
            fit.see(first_tensor(args, kwargs), target)

    return hook


@dataclass
class _Fit:
    """One regression: sums of x x^T and x y^T, a constant among the regressors for a bias."""

    last: Factorizable
    gram: Tensor | float = 0.0
    cross: Tensor | float = 0.0

    def see(self, inputs: Tensor, target: Tensor) -> None:
        """Add samples, and solve anew."""
        rows = patches(self.last, inputs.float())
        if self.last.bias is not None:
            rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
        wanted = thinned(self.last, target).to(rows)
        if not len(rows) or len(rows) != len(wanted):  # nothing, or something else, was routed here
            return
        self.gram = self.gram + (rows.T @ rows).double()
        self.cross = self.cross + (rows.T @ wanted).double()
        self._solve(self.gram, self.cross)

    def _solve(self, gram: Tensor, cross: Tensor) -> None:
        last = self.last
        now = last.weight.flatten(1).double().T
        if last.bias is not None:
            now = torch.cat([now, last.bias.double()[None]])
        pull = RIDGE * gram.diagonal().mean()
        eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        best = torch.linalg.solve(gram + pull * eye, cross + pull * now)
        if last.bias is not None:
            last.bias.copy_(best[-1])
            best = best[:-1]
        last.weight.copy_(best.T.reshape(last.weight.shape))
