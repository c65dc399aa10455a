"""Looks at a network on unlabelled data: what each layer reads, how much its outputs matter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from pliant.cost import Example, call
from pliant.errors import ModelError
from pliant.math.metric import Metric
from pliant.math.svd import self_product
from pliant.nn.layers import Factorizable
from pliant.observe.outputs import answers
from pliant.observe.watch import capture, samples


def metrics(
    model: nn.Module,
    layers: Mapping[str, Factorizable],
    batches: Iterable[Example],
    generator: torch.Generator,
    loss: Callable[[int, Any], Tensor] | None = None,
) -> dict[str, Metric]:
    """Return the metric of every layer that is called, from inputs alone, without labels.

    Gradients are those of the network's own uncertainty: a label is drawn from the predicted
    distribution of each sample (the true Fisher), or, where the output is not a row of logits, a
    random direction is. The model is in eval mode meanwhile; its gradients stay as they are.

    Args:
        model: the dense network.
        layers: the layers to look at, by name.
        batches: inputs of forward calls.
        generator: draws the labels.
        loss: function of a batch's number and its output, summed over samples, whose gradients
            count instead.
    """
    reads: dict[str, Tensor] = {}
    pulls: dict[str, Tensor] = {}
    outputs: dict[str, list[GradientEdge]] = {}

    def see(name: str, inputs: Tensor, output: Tensor) -> None:
        rows = patches(layers[name], inputs.detach().float())
        if not len(rows):  # an expert to which nothing was routed
            return
        moments = self_product(rows.T) * (len(inputs) / len(rows))  # a mean over positions
        reads[name] = reads.get(name, torch.zeros((), device=rows.device)) + moments
        # The edge, not the tensor: an activation in place would change what the tensor is.
        if output.requires_grad:
            outputs.setdefault(name, []).append(get_gradient_edge(output))

    count = 0
    with _tracked(layers.values()), capture(model, layers, see, gradients=True):
        for number, batch in enumerate(batches):
            outputs.clear()
            result = call(model, batch)
            count += samples(batch)
            pull = surprise(result, generator) if loss is None else loss(number, result)
            _gather(pulls, outputs, pull, layers)
    unknown = _unknown(pulls, layers)
    return {
        name: Metric(read / count, (pulls[name] if name in pulls else unknown(name)) / count)
        if pulls
        else Metric(read / count)
        for name, read in reads.items()
    }


def _unknown(
    pulls: Mapping[str, Tensor], layers: Mapping[str, Factorizable]
) -> Callable[[str], Tensor]:
    """Let outputs that no gradient reaches matter as much as those of other layers on average."""
    mean = sum(float(pull.trace()) for pull in pulls.values()) / max(1, len(pulls))

    def moments(name: str) -> Tensor:
        weight = layers[name].weight
        return torch.eye(len(weight), device=weight.device) * (mean / len(weight))

    return moments


def patches(module: Factorizable, inputs: Tensor) -> Tensor:
    """Return what each output position of a layer sees, as rows of a matrix.

    Positions are subsampled to at most 9 per axis: neighbours say nearly the same.
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
        zip(module.kernel_size, module.stride, module.dilation, strict=True), start=2
    ):
        view = view.unfold(axis, gap * (size - 1) + 1, stride)[..., ::gap]
        view = _every(view, axis)
    order = [0, *range(2, 2 + dims), 1, *range(2 + dims, 2 + 2 * dims)]
    return view.permute(order).reshape(-1, module.weight[0].numel())


def thinned(module: nn.Module, output: Tensor) -> Tensor:
    """Return a layer's outputs as rows, at the positions that ``patches`` keeps."""
    if isinstance(module, nn.Linear):
        return output.reshape(-1, output.shape[-1])
    for axis in range(2, output.ndim):
        output = _every(output, axis)
    return output.movedim(1, -1).reshape(-1, output.shape[1])


def _every(view: Tensor, axis: int) -> Tensor:
    return view[(slice(None),) * axis + (slice(None, None, 1 + view.shape[axis] // 9),)]


@contextmanager
def _tracked(layers: Iterable[Factorizable]) -> Iterator[None]:
    """Let gradients reach the outputs of frozen layers too."""
    frozen = [layer.weight for layer in layers if not layer.weight.requires_grad]
    try:
        for weight in frozen:
            weight.requires_grad_(True)
        yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)


def _gather(
    pulls: dict[str, Tensor],
    outputs: Mapping[str, list[GradientEdge]],
    loss: Tensor,
    layers: Mapping[str, Factorizable],
) -> None:
    """Add the second moments of the gradients by every output."""
    if not outputs:
        return
    names = [name for name, calls in outputs.items() for _ in calls]
    edges = [edge for calls in outputs.values() for edge in calls]
    gradients: Sequence[Tensor | None] = torch.autograd.grad(loss, edges, allow_unused=True)
    for name, gradient in zip(names, gradients, strict=True):
        if gradient is None:
            continue
        axis = -1 if isinstance(layers[name], nn.Linear) else 1
        rows = gradient.float().movedim(axis, -1).flatten(0, -2)
        pulls[name] = pulls.get(name, torch.zeros((), device=rows.device)) + rows.T @ rows


def surprise(result: Any, generator: torch.Generator) -> Tensor:
    """Return a scalar whose gradients have the Fisher information as second moments.

    For one row of logits a sample it is the loss, summed over samples, at a label drawn from the
    predictions of each. Any other output goes in a random direction; of several outputs every one
    counts alike, by its own spread.

    Raises:
        ModelError: an output is not a number, or the network gives none.
    """
    outputs = [output.float() for output in answers(result)]
    if any(output.isnan().any() or output.isposinf().any() for output in outputs):
        raise ModelError(
            "The network must give finite outputs to be looked at, but some are not: its weights "
            "or inputs are broken; begin with a network that works, or train more gently."
        )
    if len(outputs) > 1:
        return sum((_moved(one, generator) / _spread(one) for one in outputs), torch.zeros(()))
    (output,) = outputs
    if output.ndim == 2 and output.shape[1] > 1:
        chances = output.detach().softmax(1).cpu()
        labels = torch.multinomial(chances, 1, generator=generator)[:, 0].to(output.device)
        return F.cross_entropy(output, labels, reduction="sum")
    return _moved(output, generator)


def _moved(output: Tensor, generator: torch.Generator) -> Tensor:
    """Go in a random direction; masked numbers, which are minus infinity, stay out of it."""
    direction = torch.randn(output.shape, generator=generator).to(output.device)
    moves = torch.where(output.isneginf(), 0.0, output) * direction
    return moves.sum() / max(1, output[:1].numel()) ** 0.5


def _spread(output: Tensor) -> Tensor:
    known = output.detach()[~output.isneginf()]
    return known.std(correction=0).clamp_min(torch.finfo(known.dtype).eps)
