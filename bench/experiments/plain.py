"""Rivals without training, in plain code: a whitened SVD of every layer, and BALF's procedure."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pliant.nn.layers import replace
from pliant.observe.moments import patches

Layers = Mapping[str, Any]
RIDGE = 1e-4  # share of the mean eigenvalue added to what is inverted


def layers_of(model: nn.Module, skip: Sequence[str] = ()) -> dict[str, Any]:
    """Return linear layers and ungrouped convolutions, by name, but for those named."""
    return {
        name: module
        for name, module in model.named_modules()
        if name not in skip
        and (
            isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
        )
    }


@torch.no_grad()
def grams(model: nn.Module, layers: Layers, batches: Iterable[Any]) -> dict[str, Tensor]:
    """Sum the second moments of what every layer reads."""
    found: dict[str, Tensor] = {}

    def look(name: str) -> Callable[..., None]:
        def hook(layer: Any, args: tuple[Tensor, ...]) -> None:
            rows = patches(layer, args[0])
            found[name] = found.get(name, torch.zeros(())) + rows.T @ rows

        return hook

    handles = [m.register_forward_pre_hook(look(name)) for name, m in layers.items()]
    for batch in batches:
        model(**batch) if isinstance(batch, Mapping) else model(*batch)
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
def whitened(
    model: nn.Module, batches: Iterable[Any], share: float, skip: Sequence[str] = ()
) -> None:
    """Replace every layer by its whitened SVD, all at one share of their parameters."""
    layers = layers_of(model, skip)
    for name, gram in grams(model, layers, batches).items():
        layer: Any = layers[name]
        root = torch.linalg.cholesky(_ridged(gram))
        u, s, vt = torch.linalg.svd(layer.weight.flatten(1).double() @ root, full_matrices=False)
        outs, ins = len(u), len(root)
        rank = max(1, int(share * outs * ins / (outs + ins)))
        right = torch.linalg.solve_triangular(root, vt[:rank], upper=False, left=False)
        replace(model, name, _pair(layer, u[:, :rank] * s[:rank], right))


@torch.no_grad()
def balf(
    model: nn.Module,
    batches: Iterable[Any],
    limit: float,
    costs: Mapping[str, int],
    skip: Sequence[str] = (),
) -> None:
    """Activation-aware SVD of every layer, with ranks by a Lagrangian relaxation (BALF).

    The whitener is the root of the second moments, whose zero eigenvalues are left out (a pseudo
    inverse). What a rank loses is the tail of the squared singular values over all of its layer;
    the sum over layers is made least under a bound (D. Gonzalez Martinez, 2025, arXiv:2509.25136,
    sections 3 and 4, as far as the text gives them).

    Args:
        model: changed in place.
        batches: inputs of forward calls.
        limit: what the layers may cost together.
        costs: of one weight of each layer: 1 for parameters, its positions for MACs.
        skip: layers that stay as they are.
    """
    layers, parts = layers_of(model, skip), {}
    for name, gram in grams(model, layers, batches).items():
        layer: Any = layers[name]
        values, vectors = torch.linalg.eigh(gram.double())
        kept = values > 1e-10 * values.max()
        root = vectors[:, kept] * values[kept].sqrt()
        u, s, vt = torch.linalg.svd(layer.weight.flatten(1).double() @ root, full_matrices=False)
        parts[name] = u, s, vt @ (vectors[:, kept] / values[kept].sqrt()).T
    for name, rank in _ranks(layers, parts, limit, costs).items():
        u, s, right = parts[name]
        replace(model, name, _pair(layers[name], u[:, :rank] * s[:rank], right[:rank]))


def _ranks(
    layers: Layers, parts: Mapping[str, Any], limit: float, costs: Mapping[str, int]
) -> dict[str, int]:
    """Find the price of a unit of cost at which the bound is kept; 0 stands for the whole layer."""
    tables = {}
    for name, (u, s, right) in parts.items():
        outs, ins, energy = len(u), right.shape[1], s.square()
        ranks = torch.arange(1, len(s) + 1)
        lost = 1 - energy.cumsum(0) / energy.sum()
        cost = ranks * (outs + ins) * costs[name]
        whole = outs * ins * costs[name]
        fits = cost < whole
        tables[name] = (
            [0, *ranks[fits].tolist()],
            torch.cat([torch.zeros(1).double(), lost[fits]]),
            torch.cat([torch.tensor([whole]), cost[fits]]).double(),
        )

    def at(price: float) -> dict[str, int]:
        return {n: int((lost + price * cost).argmin()) for n, (_, lost, cost) in tables.items()}

    low, high = 0.0, 1.0
    for _ in range(200):
        middle = (low + high) / 2
        total = sum(float(tables[name][2][place]) for name, place in at(middle).items())
        low, high = (low, middle) if total <= limit else (middle, high)
    chosen = {name: tables[name][0][place] for name, place in at(high).items()}
    return {name: rank for name, rank in chosen.items() if rank}


def _ridged(gram: Tensor) -> Tensor:
    gram = gram.double()
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    return gram


def _pair(layer: Any, left: Tensor, right: Tensor) -> nn.Module:
    """Two layers in the place of one: the first reads, the second writes."""
    rank, bias = len(right), layer.bias is not None
    if isinstance(layer, nn.Linear):
        first: Any = nn.Linear(layer.in_features, rank, bias=False)
        last: Any = nn.Linear(rank, layer.out_features, bias=bias)
    else:
        same = {k: getattr(layer, k) for k in ("kernel_size", "stride", "padding", "dilation")}
        first = nn.Conv2d(layer.in_channels, rank, bias=False, **same)
        last = nn.Conv2d(rank, layer.out_channels, 1, bias=bias)
    first.weight.copy_(right.reshape(first.weight.shape))
    last.weight.copy_(left.reshape(last.weight.shape))
    if bias:
        last.bias.copy_(layer.bias)
    return nn.Sequential(first, last)
