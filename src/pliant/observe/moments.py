"""Looks at a network on unlabelled data: what each layer reads, how much its outputs matter."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from pliant.cost import Example, call
from pliant.errors import ModelError
from pliant.math.metric import Metric
from pliant.math.reads import Alike, Diagonal, Gram, Reads, Rows, over
from pliant.math.svd import self_product
from pliant.nn.kinds import TABLE, TRANSPOSED, channels_last, kernel
from pliant.nn.layers import Factorizable
from pliant.observe.outputs import answers
from pliant.observe.watch import capture, samples

WIDE = 4096  # outputs beyond which only their own sensitivities are kept, not those of pairs
MOST = 5000  # inputs beyond which samples are kept, and at most so many
GEOMETRY = ("kernel_size", "stride", "padding", "dilation", "padding_mode")


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
    pulls: dict[str, Tensor] = {}
    outputs: dict[str, list[GradientEdge]] = {}
    gathered = Gathered(layers)

    def see(name: str, inputs: Tensor, output: Tensor) -> None:
        if not inputs.numel():  # an expert to which nothing was routed
            return
        gathered.see(name, inputs)
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
        name: Metric(over(read, count), (pulls[name] if name in pulls else unknown(name)) / count)
        if pulls
        else Metric(over(read, count))
        for name, read in gathered.reads().items()
    }


def _unknown(
    pulls: Mapping[str, Tensor], layers: Mapping[str, Factorizable]
) -> Callable[[str], Tensor]:
    """Let outputs that no gradient reaches matter as much as those of other layers on average."""
    traces = [float((p if p.dim() == 1 else p.diagonal()).sum()) for p in pulls.values()]
    mean = sum(traces) / max(1, len(pulls))

    def moments(name: str) -> Tensor:
        weight = kernel(layers[name])
        each = torch.full((len(weight),), mean / len(weight), device=weight.device)
        return each if len(weight) > WIDE else torch.diag(each)

    return moments


def patches(module: Factorizable, inputs: Tensor) -> Tensor:
    """Return what each output position of a layer sees, as rows of a matrix.

    Positions are subsampled to at most 9 per axis: neighbours say nearly the same.
    """
    if isinstance(module, nn.Linear):
        return inputs.reshape(-1, module.in_features)
    if isinstance(module, TRANSPOSED):  # what one position gives to all it reaches
        for axis in range(2, inputs.ndim):
            inputs = _every(inputs, axis)
        return inputs.movedim(1, -1).reshape(-1, inputs.shape[1])
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


@dataclass
class Gathered:
    """Sums up what layers read, each in as few numbers as it takes.

    Layers that read the same tensor share the products. A layer with more inputs than twice the
    samples keeps these; beyond `MOST` inputs it keeps every second of them again and again.

    Args:
        layers: by name.
    """

    layers: Mapping[str, Any]
    grams: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[str, list[Tensor]] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)
    paces: dict[str, tuple[int, int]] = field(default_factory=dict)  # met so far, one kept of
    last: list[tuple[Any, Any, Tensor]] = field(default_factory=list)

    def see(self, name: str, inputs: Tensor) -> None:
        """Add what a layer reads in one call."""
        layer = self.layers[name]
        if isinstance(layer, TABLE):
            found = torch.bincount(inputs.flatten(), minlength=layer.num_embeddings)
            self.counts[name] = self.counts.get(name, 0) + found
            return
        rows = self._rows(layer, inputs)
        width, kept = rows.shape[1], self.kept.setdefault(name, [])
        few = 2 * (sum(map(len, kept)) + len(rows)) <= width
        if name not in self.grams and (few or width > MOST):
            self._keep(name, rows)
            return
        for earlier in kept:
            self.grams[name] = self.grams.get(name, 0) + self_product(earlier.T)
        kept.clear()
        self.grams[name] = self.grams.get(name, 0) + self._product(rows)

    def reads(self) -> dict[str, Reads]:
        """Return the sums of all layers that were called."""
        found: dict[str, Reads] = {name: Diagonal(count) for name, count in self.counts.items()}
        for name in [name for name in self.layers if name in self.kept]:
            layer, often = self.layers[name], self.paces.get(name, (0, 1))[1] ** 0.5
            few = [rows * often for rows in self.kept[name]]
            if isinstance(layer, TRANSPOSED):
                gram = self.grams[name] if name in self.grams else self_product(torch.cat(few).T)
                found[name] = Alike(gram, layer.weight[0, 0].numel())
            else:
                found[name] = Rows(torch.cat(few)) if few else Gram(self.grams[name])
        return {name: found[name] for name in self.layers if name in found}

    def _rows(self, layer: Any, inputs: Tensor) -> Tensor:
        """Patches whose squares sum to a mean over the positions of each sample."""
        geometry = [getattr(layer, name, None) for name in GEOMETRY]
        for seen, same, rows in self.last:
            if seen() is inputs and same == (geometry, inputs._version):
                return rows
        rows = patches(layer, inputs.detach().float())
        rows = rows * (len(inputs) / max(1, len(rows))) ** 0.5
        entry = weakref.ref(inputs), (geometry, inputs._version), rows
        self.last = [entry]
        self.gram_of = None
        return rows

    gram_of: Tensor | None = None

    def _product(self, rows: Tensor) -> Tensor:
        if self.gram_of is None:
            self.gram_of = self_product(rows.T)
        return self.gram_of

    def _keep(self, name: str, rows: Tensor) -> None:
        """Keep one of so many samples, and half of them where they have become too many."""
        kept, (met, stride) = self.kept[name], self.paces.get(name, (0, 1))
        kept.append(rows[-met % stride :: stride])
        while 2 * sum(map(len, kept)) > min(rows.shape[1], 2 * MOST):
            kept[:], stride = [torch.cat(kept)[::2]], 2 * stride
        self.paces[name] = met + len(rows), stride


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
        axis = -1 if channels_last(layers[name]) else 1
        rows = gradient.float().movedim(axis, -1).flatten(0, -2)
        wide = rows.shape[1] > WIDE
        moments = rows.square().sum(0) if wide else rows.T @ rows
        pulls[name] = pulls.get(name, torch.zeros((), device=rows.device)) + moments


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
