"""What batch normalization needs after a model was changed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pliant.cost import Example, call, evaluating
from pliant.nn.kinds import TRANSPOSED, to_rows
from pliant.observe.watch import capture, first_tensor, samples


def recalibrate(model: nn.Module, batches: Iterable[Example]) -> int:
    """Re-estimate the running statistics of every batch norm from forward passes alone.

    Statistics are averaged over all batches with equal weight, then used in evaluation; weights
    and training flags stay as they are. A last batch of less than half the size is left out, and
    without any batch of two samples the statistics stay. The batches must be shuffled: statistics
    of a sample sorted by class are far worse than the stale ones.

    Returns:
        The number of batch norms that were recalibrated.
    """
    norms = [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    ]
    if not norms:
        return 0
    momenta = {norm: norm.momentum for norm in norms}
    before = {norm: {n: b.clone() for n, b in norm.named_buffers()} for norm in norms}
    handles = [norm.register_forward_pre_hook(_average, with_kwargs=True) for norm in norms]
    try:
        most = 0
        with evaluating(model), torch.no_grad():  # only the norms see training mode, not dropout
            for batch in batches:
                size = samples(batch)
                if size < 2 or 2 * size < most:
                    continue
                if not most:
                    _begin(norms)
                call(model, batch)
                most = max(most, size)
    finally:
        for handle in handles:
            handle.remove()
        for norm in norms:
            norm.momentum = momenta[norm]
            if not norm.num_batches_tracked:  # nothing was routed to it
                norm.load_state_dict(before[norm], strict=False)
    return len(norms)


def _average(norm: nn.Module, args: Any, kwargs: Any) -> None:
    """Let a norm take part if it reads what a variance can be told from, before it is called."""
    given = first_tensor(args, kwargs)
    norm.train(given is not None and given.numel() > given.shape[1])


def _begin(norms: Iterable[_BatchNorm]) -> None:
    """Forget what was measured, and average from now on."""
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average


def absorb(
    model: nn.Module, leaving: Mapping[str, Sequence[int]], batches: Iterable[Example]
) -> int:
    """Add to biases, in place, what input channels that are about to leave give on average.

    A filter that is zero still makes a batch norm emit a constant, and any channel has a mean;
    the layers that read it can keep that much of it, but for padded borders. Layers without a
    bias are left to the batch norm behind them: recalibrate it after the cut.

    Args:
        model: convolutions and linear layers are changed in their biases only.
        leaving: the input channels that leave, by layer.
        batches: inputs to take the means from.

    Returns:
        The number of layers whose biases were changed.
    """
    biased = [n for n in leaving if getattr(model.get_submodule(n), "bias", None) is not None]
    for name, mean in _mean_inputs(model, biased, batches).items():
        layer: Any = model.get_submodule(name)
        gone = torch.zeros_like(mean)
        gone[list(leaving[name])] = mean[list(leaving[name])]
        kernel = read_from_constants(layer, to_rows(layer, layer.weight.detach().double()))
        blocks = kernel.unflatten(0, (getattr(layer, "groups", 1), -1))
        shift = (blocks @ gone.reshape(len(blocks), -1, 1)).flatten()
        layer.bias.detach().add_(shift.to(layer.bias.dtype))
    return len(biased)


def read_from_constants(layer: Any, rows: Tensor) -> Tensor:
    """Return what each output gets on average from inputs that are 1, (rows, inputs).

    Padded borders aside. A position of what a transposed convolution gives is reached by one in
    so many positions of its kernel as its stride has steps.

    Args:
        layer: says its stride.
        rows: of its weight, (rows, inputs, ...).
    """
    sums = rows.reshape(*rows.shape[:2], -1).sum(2)  # over the positions of a patch
    return sums / math.prod(layer.stride) if isinstance(layer, TRANSPOSED) else sums


def _mean_inputs(
    model: nn.Module, layers: Sequence[str], batches: Iterable[Example]
) -> dict[str, Tensor]:
    """The mean of every input channel of some layers, (channels,) each."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def see(name: str, given: Tensor, output: Tensor) -> None:
        linear = isinstance(model.get_submodule(name), nn.Linear)
        flat = given.flatten(0, -2) if linear else given.transpose(0, 1).flatten(1).T
        sums[name] = sums.get(name, 0) + flat.double().sum(0)
        counts[name] = counts.get(name, 0) + len(flat)

    with capture(model, layers, see):
        for batch in batches:
            call(model, batch)
    return {name: total / counts[name] for name, total in sums.items() if counts[name]}
