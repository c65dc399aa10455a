"""Plans a factorization: what each rank of each form loses and costs, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from pliant.budget import Option
from pliant.cost import LayerCost
from pliant.math import forms
from pliant.math.metric import Metric
from pliant.math.moments import dampen, mix_inputs, whitening
from pliant.math.svd import spectrum
from pliant.ops.edits import Factor
from pliant.ops.layers import Factorizable

LEVELS = 48  # rungs per form that a plan considers
PROBES = 6  # of them whose factors are computed for exact scores
CLOSEST = 1e-4  # an exact score is no smaller part of its bound


def losses(weight: Tensor, form: str, metric: Metric | None = None) -> list[Tensor]:
    """Return, for each rank of a form, the share of energy lost when it is cut to 0, 1, 2, ...

    Energy is that of the weights, or what the metric says (exact for output and svd; for the
    others as if the positions of a patch were uncorrelated).

    Returns:
        One row per rank of the form, (full rank + 1,), falling from 1 to 0.
    """
    return _losses(weight, form, metric, _moments(metric))


def _losses(
    weight: Tensor, form: str, metric: Metric | None, moments: Tensor | None
) -> list[Tensor]:
    """The losses in a metric, whose input moments come made positive definite."""
    weight = weight.detach().float()
    if metric is not None:
        weight = metric.enter(weight)
    if form in ("output", "svd"):
        return [_tail(_output_energies(weight, moments))]
    block = forms.blocks(weight, form)
    if moments is not None:
        block = mix_inputs(block.double(), whitening(moments, block.shape[2])).float()
    modes = (1, 0) if form == "tucker2" else (1,)
    return [_tail(spectrum(block, mode).double().square()) for mode in modes]


def _moments(metric: Metric | None) -> Tensor | None:
    return None if metric is None else dampen(metric.inputs.double())


def lost_at(weight: Tensor, form: str, ranks: Sequence[int]) -> float:
    """Return the share of a kernel's energy that a form loses at these ranks, of all sides."""
    rows = losses(weight, form)
    return sum(float(row[rank]) for row, rank in zip(rows, ranks, strict=True))


def _output_energies(weight: Tensor, moments: Tensor | None) -> Tensor:
    if moments is None:
        return spectrum(weight, 0).double().square()
    flat = weight.flatten(1).double()
    return torch.linalg.eigvalsh(flat @ moments @ flat.T).flip(0).clamp_min(0)


def _tail(energies: Tensor) -> Tensor:
    kept = energies.cumsum(0) / energies.sum().clamp_min(torch.finfo(energies.dtype).tiny)
    return torch.cat([kept.new_ones(1), (1 - kept).clamp_min(0)])


def options(
    layer: str,
    weight: Tensor,
    cost: LayerCost,
    *,
    allowed: Sequence[str],
    metric: Metric | None = None,
    steps: Mapping[str, int] | None = None,
    exact: bool = False,
) -> list[Option]:
    """Return what can be done with one layer: leave it, or factorize it at a ladder of ranks.

    The score of an option is the share of energy it loses. With plain Tucker-2 alone it is 1 - p
    of the rung, R3 and R4 read off at one p as the paper does; otherwise the losses of Tucker-2's
    unfoldings are added, which bounds its error and compares it with the other forms. With a
    metric all forms but output and svd have bounds, which can be several times too high.

    Args:
        layer: its name.
        weight: its kernel.
        cost: what it costs now.
        allowed: forms to consider; pointwise and Linear kernels always take svd.
        metric: what it reads and how much its outputs matter.
        steps: for a form, the multiple to which its ranks are rounded up; 1 where not named.
        exact: in a metric, correct the bounds by what factors lose at a few ranks of each form.
    """
    rows = [Option(0.0, cost)]
    paper = metric is None and tuple(allowed) == ("tucker2",)
    combine: Callable[[list[float]], float] = max if paper else sum
    moments = _moments(metric)
    for form in forms_of(weight.shape, allowed):
        lost = _losses(weight, form, metric, moments)
        most, step = forms.max_ranks(weight.shape, form), (steps or {}).get(form, 1)
        ladder = (_rounded_up(ranks, most, step) for ranks in _ladder(lost, most))
        found = []
        for ranks in dict.fromkeys(ladder):
            edit = Factor(layer, form, ranks)
            score = combine([float(row[rank]) for row, rank in zip(lost, ranks, strict=True)])
            after = edit.predict(cost)
            if after.params < cost.params:
                found.append(Option(score, after, edit))
        if exact and metric is not None and form not in ("output", "svd"):
            found = _corrected(found, weight.detach(), metric)
        rows += found
    return rows


def _corrected(rows: Sequence[Option], weight: Tensor, metric: Metric) -> list[Option]:
    """Scale the bounds of one form, from few ranks to many, to what its factors lose.

    Factors are computed at a few ranks. Between them the logarithm of what is lost, as a part of
    the bound, changes evenly with the logarithm of the bound.
    """
    whole, bounds, parts = metric.energy(weight), [], []
    places = {round(place) for place in np.linspace(len(rows) - 1, 0, PROBES)} if rows else set()
    for place in sorted(places, reverse=True):
        score, edit = rows[place].score, rows[place].edit
        if score > 0 and whole > 0 and isinstance(edit, Factor):
            kernels = metric.decompose(weight, edit.form, edit.ranks)
            lost = damage(weight, forms.compose(kernels, edit.form), metric) / whole
            bounds.append(math.log(score))
            parts.append(math.log(min(1.0, max(CLOSEST, lost / score))))
    if not bounds:
        return list(rows)

    def corrected(score: float) -> float:
        return score and score * math.exp(np.interp(math.log(score), bounds, parts))

    return [replace(row, score=corrected(row.score)) for row in rows]


def damage(weight: Tensor, near: Tensor, metric: Metric | None) -> float:
    """Return what a kernel loses that another replaces: in the metric, or a share of its energy."""
    return metric.energy(weight - near) if metric else forms.relative_error(weight, near)


def forms_of(shape: Sequence[int], allowed: Sequence[str]) -> list[str]:
    """Return the allowed forms that suit a kernel: pointwise and Linear kernels take svd only."""
    possible = forms.forms_for(shape)
    return ["svd"] if "svd" in possible else [form for form in possible if form in allowed]


def _ladder(lost: Sequence[Tensor], most: Sequence[int]) -> list[tuple[int, ...]]:
    """Ranks read off at falling levels of energy, at most about ``LEVELS`` rungs."""
    levels = sorted({float(value) for row in lost for value in row[1:]}, reverse=True)
    thin = levels[:: 1 + len(levels) // LEVELS]
    return list(dict.fromkeys(ranks_at(lost, level, most) for level in thin))


def _rounded_up(ranks: Sequence[int], most: Sequence[int], step: int) -> tuple[int, ...]:
    return tuple(min(-(-rank // step) * step, top) for rank, top in zip(ranks, most, strict=True))


def ranks_at(lost: Sequence[Tensor], level: float, most: Sequence[int]) -> tuple[int, ...]:
    """Return the smallest ranks that lose at most ``level`` of the energy in each unfolding."""
    found = (int((row > level + 1e-12).sum()) for row in lost)
    return tuple(min(max(rank, 1), top) for rank, top in zip(found, most, strict=True))


def with_kernels(
    edits: Iterable[Factor], layers: Mapping[str, Factorizable], metrics: Mapping[str, Metric]
) -> list[Factor]:
    """Compute the factors of planned edits in the metrics of their layers, where there are any."""
    return [
        replace(
            edit,
            kernels=metrics[edit.layer].decompose(
                layers[edit.layer].weight.detach(), edit.form, edit.ranks
            ),
        )
        if edit.layer in metrics
        else edit
        for edit in edits
    ]
