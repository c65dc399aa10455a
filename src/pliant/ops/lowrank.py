"""Plans a factorization: what each rank of each form loses and costs, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.budget import Option
from pliant.cost import LayerCost, call
from pliant.math import forms
from pliant.math.moments import dampen, whiten
from pliant.math.svd import spectrum
from pliant.ops.capture import capture
from pliant.ops.edits import Factor
from pliant.ops.layers import Factorizable

Moments = Mapping[str, Tensor]

EXACT = 1200  # columns up to which the error is minimised over whole patches: a matter of seconds
LEVELS = 48  # ranks per form that a plan considers


def moments(
    model: nn.Module, layers: Mapping[str, Factorizable], batches: Iterable[object]
) -> dict[str, Tensor]:
    """Accumulate the second moments of every layer's inputs, over patches of its kernel.

    Args:
        model: the dense network, run in eval mode without gradients.
        layers: the layers to look at, by name.
        batches: inputs of forward calls, without labels.

    Returns:
        For each layer a matrix (S*prod(kernel),) * 2 in the order of ``weight.flatten(1)``.
    """
    found: dict[str, Tensor] = {}

    def see(name: str, inputs: Tensor, output: Tensor) -> None:
        rows = patches(layers[name], inputs.float())
        found[name] = found.get(name, torch.zeros(())) + rows.T @ rows

    with capture(model, layers, see):
        for batch in batches:
            call(model, batch if isinstance(batch, Mapping | tuple) else (batch,))
    return found


def patches(module: Factorizable, inputs: Tensor) -> Tensor:
    """Return what each output position of a layer sees, as rows of a matrix.

    Positions are subsampled to about 64 per sample: neighbours say nearly the same.
    """
    if isinstance(module, nn.Linear):
        return inputs.reshape(-1, module.in_features)
    if isinstance(module.padding, str):
        pads = module._reversed_padding_repeated_twice
    else:
        pads = [amount for amount in reversed(module.padding) for _ in range(2)]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    view = F.pad(inputs, pads, mode=mode) if any(pads) else inputs
    dims = len(module.kernel_size)
    for axis, (size, stride, gap) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True)
    ):
        view = view.unfold(2 + axis, gap * (size - 1) + 1, stride)[..., ::gap]
        view = view[(slice(None),) * (2 + axis) + (slice(None, None, 1 + view.shape[2 + axis] // 9),)]
    order = [0, *range(2, 2 + dims), 1, *range(2 + dims, 2 + 2 * dims)]
    return view.permute(order).reshape(-1, module.weight[0].numel())


def losses(weight: Tensor, form: str, moments: Tensor | None = None) -> list[Tensor]:
    """Return, for each rank of a form, the share of energy lost when it is cut to 0, 1, 2, ...

    Energy is that of the weights, or of the layer's outputs given the moments of its inputs
    (exact for output and svd; for the others as if neighbouring positions were uncorrelated).
    """
    weight = weight.detach().float()
    if form in ("output", "svd"):
        return [_tail(_output_energies(weight, moments))]
    block = forms.blocks(weight, form)
    if moments is not None:
        block = whiten(block.double(), dampen(moments.double()))[0].float()
    modes = (1, 0) if form == "tucker2" else (1,)
    return [_tail(spectrum(block, mode).double().square()) for mode in modes]


def _output_energies(weight: Tensor, moments: Tensor | None) -> Tensor:
    if moments is None:
        return spectrum(weight, 0).double().square()
    flat = weight.flatten(1).double()
    seen = flat @ dampen(moments.double()) @ flat.T
    return torch.linalg.eigvalsh(seen).flip(0).clamp_min(0)


def _tail(energies: Tensor) -> Tensor:
    kept = energies.cumsum(0) / energies.sum().clamp_min(1e-300)
    return torch.cat([torch.ones(1, dtype=kept.dtype), (1 - kept).clamp_min(0)])


def options(
    layer: str,
    weight: Tensor,
    cost: LayerCost,
    *,
    allowed: Sequence[str],
    moments: Tensor | None = None,
) -> list[Option]:
    """Return what can be done with one layer: leave it, or factorize it at a ladder of ranks.

    The score of an option is the share of energy it loses. With Tucker-2 alone it is 1 - p of
    the rung (R3 and R4 read off at one p, as the paper does); among several forms the losses of
    both unfoldings are added, which bounds the error of Tucker-2 and compares it with the rest.

    Args:
        layer: its name.
        weight: its kernel.
        cost: what it costs now.
        allowed: forms to consider; those that the kernel cannot take are passed over.
        moments: of its inputs, for data-aware losses.
    """
    rows = [Option(0.0, cost)]
    combine: Callable[[list[float]], float] = max if tuple(allowed) == ("tucker2",) else sum
    for form in forms_of(weight.shape, allowed):
        lost = losses(weight, form, moments)
        most = forms.max_ranks(tuple(weight.shape), form)
        for ranks in _ladder(lost, most):
            edit = Factor(layer, form, ranks)
            score = combine([float(row[rank]) for row, rank in zip(lost, ranks, strict=True)])
            after = edit.predict(cost)
            if after.params < cost.params:
                rows.append(Option(score, after, edit))
    return rows


def forms_of(shape: Sequence[int], allowed: Sequence[str]) -> list[str]:
    """Return the allowed forms that suit a kernel: pointwise and Linear kernels take svd only."""
    possible = forms.forms_for(tuple(shape))
    return ["svd"] if "svd" in possible else [form for form in possible if form in allowed]


def _ladder(lost: Sequence[Tensor], most: Sequence[int]) -> list[tuple[int, ...]]:
    """Ranks read off at falling levels of energy, at most about ``LEVELS`` rungs."""
    levels = sorted({float(value) for row in lost for value in row[1:]}, reverse=True)
    thin = levels[:: max(1, len(levels) // LEVELS)]
    ladder = [ranks_at(lost, level, most) for level in thin]
    return [rung for i, rung in enumerate(ladder) if i == 0 or rung != ladder[i - 1]]


def ranks_at(lost: Sequence[Tensor], level: float, most: Sequence[int]) -> tuple[int, ...]:
    """Return the smallest ranks that lose at most ``level`` of the energy in each unfolding."""
    found = (int((row > level + 1e-12).sum()) for row in lost)
    return tuple(min(max(rank, 1), top) for rank, top in zip(found, most, strict=True))


def with_kernels(
    edits: Iterable[Factor], layers: Mapping[str, Factorizable], seen: Moments | None
) -> list[Factor]:
    """Compute the factors of planned edits, minimising the output error where inputs are known.

    Over whole patches up to ``EXACT`` columns (and always for forms with a closed solution),
    over channels beyond.
    """
    return [
        replace(edit, kernels=_kernels(edit, layers[edit.layer].weight.detach(), seen))
        for edit in edits
    ]


def _kernels(edit: Factor, weight: Tensor, seen: Moments | None) -> tuple[Tensor, ...]:
    known = None if seen is None else seen[edit.layer]
    if known is not None and len(known) > EXACT and edit.form not in ("output", "svd"):
        positions = weight[0, 0].numel()
        known = torch.einsum("pkqk->pq", known.reshape(len(known) // positions, positions, -1, positions))
    return forms.decompose(weight, edit.form, edit.ranks, moments=known)

