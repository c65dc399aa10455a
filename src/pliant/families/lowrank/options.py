"""Plans a factorization: what each rank of each form loses and costs, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from pliant.budget import Option
from pliant.cost import LayerCost
from pliant.edits import Factor
from pliant.families.lowrank.losses import Losses, losses
from pliant.math import forms
from pliant.math.metric import Metric
from pliant.math.reads import forget
from pliant.nn.kinds import kernel
from pliant.nn.layers import Factorizable

LEVELS = 48  # rungs per form that a plan considers
LEAN = 2**30  # bytes of float64 beyond which moments are decomposed again instead of kept


def options(
    layer: str,
    weight: Tensor,
    cost: LayerCost,
    *,
    allowed: Sequence[str],
    metric: Metric | None = None,
    steps: Mapping[str, int] | None = None,
    level: float | None = None,
) -> list[Option]:
    """Return what can be done with one layer: leave it, or factorize it at a ladder of ranks.

    The score of an option is the share of the energy that its factors lose (see `losses`). It is
    computed for the factors themselves and is no bound, so different forms can be compared. Where
    plain Tucker-2 is the only form, the score is 1 - p, and both ranks are the smallest that keep
    the share p of the energy of their unfolding, as in the paper.

    Args:
        layer: its name.
        weight: its kernel.
        cost: what it costs now.
        allowed: forms to consider; pointwise and Linear kernels always take svd.
        metric: what it reads and how much its outputs matter.
        steps: for a form, the multiple to which its ranks are rounded up; 1 where not named.
        level: a share of energy to lose at whose very ranks there is an option, between rungs too.
    """
    rows = [Option(0.0, cost)]
    paper = metric is None and tuple(allowed) == ("tucker2",)
    found = losses(weight, forms_of(weight.shape, allowed), metric)
    for form, lost in found.items():
        most, step = forms.max_ranks(weight.shape, form), (steps or {}).get(form, 1)
        rungs = _ladder(lost.sides, most)
        if level is not None:
            rungs.append(ranks_at(lost.sides, level, most))
        ladder = (_rounded_up(ranks, most, step) for ranks in rungs)
        edits = [Factor(layer, form, ranks) for ranks in dict.fromkeys(ladder)]
        costs = [(edit.predict(cost), edit) for edit in edits]
        smaller = [(after, edit) for after, edit in costs if after.params < cost.params]
        ranks = [edit.ranks for _, edit in smaller]
        scores = [_worst(lost, each) for each in ranks] if paper else lost.at(ranks)
        rows += [Option(score, *row) for score, row in zip(scores, smaller, strict=True)]
    return rows


def _worst(lost: Losses, ranks: Sequence[int]) -> float:
    return max(float(side[rank]) for side, rank in zip(lost.sides, ranks, strict=True))


def forms_of(shape: Sequence[int], allowed: Sequence[str]) -> list[str]:
    """Return the allowed forms that suit a kernel: pointwise and Linear kernels take svd only."""
    possible = forms.forms_for(shape)
    return ["svd"] if "svd" in possible else [form for form in possible if form in allowed]


def _ladder(lost: Sequence[Tensor], most: Sequence[int]) -> list[tuple[int, ...]]:
    """Ranks read off at falling levels of energy, at most about ``LEVELS`` rungs."""
    levels = sorted({value for row in lost for value in row[1:].tolist()}, reverse=True)
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
    found, spare = [], spared(metrics)
    for edit in edits:
        metric = metrics.get(edit.layer)
        spare(metric)
        if metric is not None:
            weight = kernel(layers[edit.layer]).detach()
            edit = replace(edit, kernels=metric.decompose(weight, edit.form, edit.ranks))
        found.append(edit)
    spare(None)
    return found


def spared(seen: Mapping[str, Metric]) -> Callable[[Metric | None], None]:
    """Return what is called before each layer's turn, so that memory is that of one layer.

    What is computed from a layer's moments in float64 is kept for its second turn while it takes
    less than `LEAN` bytes for all layers; beyond, it goes after every turn.
    """
    lean, last = sum(metric.work for metric in seen.values()) > LEAN, list[Metric]()

    def spare(metric: Metric | None) -> None:
        if lean and last and last[0] is not metric:
            before = last.pop()
            before.forget()
            if metric is None or metric.seen is not before.seen:
                forget(before.seen)
        if metric is not None:
            last[:] = [metric]

    return spare
