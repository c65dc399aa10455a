"""Fits factorized layers to what the dense network said, one after the other, without labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from pliant.cost import Example, call
from pliant.nn.layers import Factorizable
from pliant.observe.moments import patches, thinned
from pliant.observe.watch import capture

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
    the compressed one: each layer also mends what the layers before it have spoiled (He, Zhang
    and Sun, ICCV 2017, eq. 5). The kernel is changed in place.

    Args:
        dense: the network before.
        model: the network after; its ``layers`` are rows of plain layers.
        layers: names of the factorized layers; those that are never called stay as they are.
        batches: inputs of forward calls.
    """
    batches = list(batches)
    for name, targets in _outputs(dense, layers, batches).items():
        row = model.get_submodule(name)
        last: Factorizable = row[-1]  # type: ignore[index]
        child = f"{name}.{[key for key, _ in row.named_children()][-1]}"
        gram, cross = _products(model, child, last, targets, batches)
        _refit(last, gram, cross)


def _outputs(
    model: nn.Module, layers: Sequence[str], batches: Sequence[Example]
) -> dict[str, list[Tensor]]:
    """What the layers say, thinned out as patches are, in the order of their first calls."""
    found: dict[str, list[Tensor]] = {}

    def see(name: str, inputs: Tensor, output: Tensor) -> None:
        found.setdefault(name, []).append(thinned(model.get_submodule(name), output))

    with capture(model, layers, see):
        for batch in batches:
            call(model, batch)
    return found


def _products(
    model: nn.Module,
    child: str,
    last: Factorizable,
    targets: Sequence[Tensor],
    batches: Sequence[Example],
) -> tuple[Tensor, Tensor]:
    """Sums of x x^T and x y^T, with a constant among the regressors if there is a bias."""
    queue, sums = iter(targets), []

    def see(name: str, inputs: Tensor, output: Tensor) -> None:
        rows = patches(last, inputs.float())
        if last.bias is not None:
            rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
        sums.append((rows.T @ rows, rows.T @ next(queue).to(rows)))

    with capture(model, [child], see):
        for batch in batches:
            call(model, batch)
    grams, crosses = zip(*sums, strict=True)
    return sum(grams[1:], grams[0]).double(), sum(crosses[1:], crosses[0]).double()


@torch.no_grad()
def _refit(last: Factorizable, gram: Tensor, cross: Tensor) -> None:
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
