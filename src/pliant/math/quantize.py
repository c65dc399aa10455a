"""Rounds tensors to few levels: groups of channels with one scale each, scales by least error."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

Grouping = Literal["range", "equal", "contiguous"]

FLOOR = 1e-8  # least scale: a channel of zeros has none of its own
FACTORS = torch.linspace(0.3, 1.0, 71)  # of the scale that clips nothing
AT_ONCE = 2**22  # numbers that a search for scales holds in memory
ROUNDS = 30  # of k-means; a cut in sorted order settles in a few


def levels(bits: int) -> tuple[int, int]:
    """Return the lowest and highest level of a signed number: -8 and 7 at 4 bits."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


# ---------------------------------------------------------------- groups of channels


def grouping(weight: Tensor, groups: int, rule: Grouping) -> Tensor:
    """Assign every output channel to a group; no group is empty.

    ``range`` puts channels of similar largest weight together: the channels sorted by it are cut
    into runs by 1-d k-means on its logarithm. ``equal`` cuts the same order into runs of equal
    length, ``contiguous`` the natural order.

    Args:
        weight: (channels, ...).
        groups: how many; at most one for each channel.
        rule: see above.

    Returns:
        The group of each channel, (channels,) of int64; groups of larger ranges come later.
    """
    channels = len(weight)
    groups = min(groups, channels)
    run = torch.arange(channels, device=weight.device) * groups // channels
    if rule == "contiguous" or groups in (1, channels):
        return run
    reach = weight.detach().flatten(1).abs().amax(1).double().clamp(min=FLOOR).log()
    ordered, order = reach.sort(stable=True)
    index = torch.empty_like(run)
    index[order] = run if rule == "equal" else _cut(ordered, run, groups)
    return index


def _cut(ordered: Tensor, run: Tensor, groups: int) -> Tensor:
    """Lloyd's k-means of sorted values, from runs of equal length; every run keeps a member."""
    places = torch.arange(len(ordered), device=ordered.device)
    for _ in range(ROUNDS):
        sums = ordered.new_zeros(groups).index_add(0, run, ordered)
        means = sums / torch.bincount(run, minlength=groups)
        cuts = torch.searchsorted(ordered, (means[1:] + means[:-1]) / 2)
        steps = torch.arange(1, groups, device=cuts.device)
        cuts = (cuts - steps).cummax(0).values.clamp(min=0) + steps
        cuts = torch.minimum(cuts, len(ordered) - groups + steps)
        now = torch.searchsorted(cuts, places, right=True)
        if torch.equal(now, run):
            break
        run = now
    return run


# ---------------------------------------------------------------- scales


def best_scales(
    weight: Tensor, index: Tensor, bits: int, *, candidates: Tensor | None = None
) -> Tensor:
    """Return for every group the scale with the least squared error of its weights.

    Args:
        weight: (channels, ...).
        index: the group of each channel.
        bits: of each weight.
        candidates: scales to try, (tries, groups) or (tries, 1); 0.3 to 1.0 of the scale at
            which nothing is clipped if None.

    Returns:
        (groups,) of float32.
    """
    rows = weight.detach().flatten(1).float()
    groups = int(index.max()) + 1
    if candidates is None:
        reach = rows.new_zeros(groups).scatter_reduce(0, index, rows.abs().amax(1), "amax")
        candidates = FACTORS.to(rows)[:, None] * reach / levels(bits)[1]
    candidates = candidates.expand(-1, groups).clamp(min=FLOOR)
    several = max(1, AT_ONCE // rows.numel())
    errors = torch.cat([_errors(rows, index, bits, some) for some in candidates.split(several)])
    return candidates.gather(0, errors.argmin(0, keepdim=True))[0]


def even_scales(weight: Tensor, index: Tensor, bits: int, step: float) -> Tensor:
    """Return for every group one and the same scale, or more where a weight would be clipped.

    For levels that are coded: one far out costs a long codeword, and clipping it would cost more.

    Args:
        weight: (channels, ...).
        index: the group of each channel.
        bits: of each weight.
        step: the scale.

    Returns:
        (groups,) of float32.
    """
    rows = weight.detach().flatten(1).float()
    reach = rows.new_zeros(int(index.max()) + 1)
    reach = reach.scatter_reduce(0, index, rows.abs().amax(1), "amax")
    return (reach / levels(bits)[1]).clamp(min=max(step, FLOOR))


def _errors(rows: Tensor, index: Tensor, bits: int, candidates: Tensor) -> Tensor:
    """Squared error of every group for several scales: (tries, groups)."""
    scales = candidates[:, index, None]
    level = (rows * (1 / scales)).round_().clamp_(*levels(bits)).mul_(scales)
    found = (level - rows).square_().sum(2)
    return torch.zeros_like(candidates).index_add(1, index, found)


def integers(weight: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Return the level of every weight, given one scale for each channel; in float32."""
    weight = weight.detach().float()
    return (weight * (1 / column(scales, weight))).round().clamp(*levels(bits))


def rounded(weight: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Return the weights at their levels, given one scale for each channel.

    Bit for bit what ``torch.fake_quantize_per_channel_affine`` gives with zero points of 0.
    """
    return integers(weight, scales, bits) * column(scales, weight)


def column(scales: Tensor, weight: Tensor) -> Tensor:
    """Shape one number per channel so that it multiplies a weight."""
    return scales.view(-1, *[1] * (weight.dim() - 1))


def best_range(values: Tensor, low: float, high: float, bits: int) -> tuple[float, int]:
    """Return scale and zero point of the range with the least squared error of activations.

    Activations that are never negative get the unsigned levels from 0; others an affine range
    in which 0 is a level.

    Args:
        values: a sample of them.
        low: the least of all.
        high: the largest of all.
        bits: of each.
    """
    most, low, high = 2**bits - 1, min(low, 0.0), max(high, 0.0)
    values, found = values.flatten().float(), []
    for factor in FACTORS.tolist():
        scale = max(factor * (high - low) / most, FLOOR)
        zero = max(0, min(most, round(-factor * low / scale)))
        level = (values / scale).round().clamp(-zero, most - zero)
        found.append((float((values - level * scale).square().mean()), -factor, scale, zero))
    return min(found)[2:]


# ---------------------------------------------------------------- rounding that can be trained


class _Rounding(torch.autograd.Function):
    """Rounds to levels; straight through for the input, LSQ's gradient for the scale."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int, high: int, factor: float) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.bounds = low, high, factor
        return (x * (1 / scale)).round_().clamp_(low, high).mul_(scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (x, scale), (low, high, factor) = ctx.saved_tensors, ctx.bounds
        place = x * (1 / scale)
        level = place.round().clamp_(low, high)
        inside = (place >= low) & (place <= high)
        slope = torch.where(inside, level - place, level).mul_(gradient)
        pull = slope.sum_to_size(scale.shape) * factor
        return gradient * inside, pull, None, None, None


def learnable(x: Tensor, scale: Tensor, low: int, high: int, count: int) -> Tensor:
    """Round to the levels ``low`` to ``high`` times ``scale``, with gradients for both.

    Esser et al., "Learned step size quantization", ICLR 2020, eqs. (3) to (5): the gradient of
    the input passes where it is not clipped, that of the scale is divided by
    ``sqrt(count * high)``.

    Args:
        x: any tensor.
        scale: broadcasts to it; one number, or one for each first index.
        low: lowest level.
        high: highest level.
        count: numbers of one sample or one weight that share a scale.
    """
    factor = (count * max(high, 1)) ** -0.5
    found: Tensor = _Rounding.apply(x, scale, low, high, factor)
    return found


# ---------------------------------------------------------------- grids of given ends


def unit_grid(weight: Tensor, bits: int) -> Tensor:
    """Round to the nearest of 2^bits numbers from -1 to 1, evenly spaced; none of them is 0.

    Zhou et al., "DoReFa-Net", arXiv 1606.06160: at 1 bit these are -1 and 1, at 2 bits -1, -1/3,
    1/3 and 1.
    """
    most = 2**bits - 1
    return 2 * ((weight + 1) / 2 * most).round().div(most).clamp(0, 1) - 1


def span_grid(weight: Tensor, bits: int) -> Tensor:
    """Round to one of 2^bits numbers from the least weight on, which never reach the largest."""
    low, high = weight.aminmax()
    step = (high - low) / 2**bits
    if not step:
        return weight.clone()
    return low + ((weight - low) / step).round().clamp(0, 2**bits - 1) * step
