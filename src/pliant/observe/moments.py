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
from pliant.observe.gradients import CHANGED
from pliant.observe.outputs import wide_answers
from pliant.observe.watch import capture, samples

WIDE = 4096  # outputs beyond which only their own sensitivities are kept, not those of pairs
PULLED = 1024  # samples from whose gradients on no more are taken
MOST = 5000  # inputs beyond which samples are kept, and at most so many
FEW = 1024  # outputs from which on gradients of few samples are kept as they are
Pull = Tensor | list[Tensor]
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
    pulls: dict[str, Pull] = {}
    outputs: dict[str, list[GradientEdge]] = {}
    gathered = Gathered(layers)

    def see(name: str, inputs: Tensor, output: Tensor) -> None:
        if not inputs.numel():  # an expert to which nothing was routed
            return
        gathered.see(name, inputs)
        # The edge, not the tensor: an activation in place would change what the tensor is.
        if output.requires_grad:
            outputs.setdefault(name, []).append(get_gradient_edge(output))

    count = pulled = 0
    with _tracked(layers.values()):
        for number, batch in enumerate(batches):
            outputs.clear()
            again = pulled < PULLED
            with capture(model, layers, see, gradients=again):
                result = call(model, batch)
                count += samples(batch)
                if again:
                    pulled = count
                    pull = surprise(result, generator) if loss is None else loss(number, result)
                    _gather(pulls, outputs, pull, layers)
    means = {name: _mean(pull, pulled) for name, pull in pulls.items()}
    unknown = _unknown(means, layers)
    return {
        name: Metric(read, (means[name] if name in means else unknown(name)) if means else None)
        for name, read in _means(gathered.reads(), count).items()
    }


def _mean(pull: Pull, count: int) -> Tensor | Rows:
    return pull / count if isinstance(pull, Tensor) else Rows(torch.cat(pull) / count**0.5)


def _means(sums: Mapping[str, Reads], count: int) -> dict[str, Reads]:
    """Divide sums by the samples, those that several layers share once."""
    means = {id(read): over(read, count) for read in sums.values()}
    return {name: means[id(read)] for name, read in sums.items()}


def _unknown(
    pulls: Mapping[str, Tensor | Rows], layers: Mapping[str, Factorizable]
) -> Callable[[str], Tensor]:
    """Let outputs that no gradient reaches matter as much as those of other layers on average."""
    traces = [
        float(p.trace if isinstance(p, Rows) else (p if p.dim() == 1 else p.diagonal()).sum())
        for p in pulls.values()
    ]
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
class Sums:
    """What the layers that read the same tensors have read, in as few numbers as it takes.

    Args:
        gram: second moments, None as long as samples are kept in their place.
        kept: samples.
        pace: samples met so far, and one kept of how many.
        calls: how often the layers were called.
    """

    gram: Tensor | None = None
    kept: tuple[Tensor, ...] = ()
    pace: tuple[int, int] = (0, 1)
    calls: int = 0


@dataclass
class Gathered:
    """Sums up what layers read, each in as few numbers as it takes.

    Layers that read the same tensors share their sums. A layer with more inputs than twice the
    samples keeps these; beyond `MOST` inputs it keeps every second of them again and again.

    Args:
        layers: by name.
    """

    layers: Mapping[str, Any]
    counts: dict[str, Tensor] = field(default_factory=dict)
    sums: dict[str, Sums] = field(default_factory=dict)
    last: tuple[Any, Any, Tensor] | None = None
    gram: Tensor | None = None  # of the rows that were read last
    steps: list[tuple[Sums, Sums]] = field(default_factory=list)  # with these rows: before, after

    def see(self, name: str, inputs: Tensor) -> None:
        """Add what a layer reads in one call."""
        layer = self.layers[name]
        if isinstance(layer, TABLE):
            found = torch.bincount(inputs.flatten(), minlength=layer.num_embeddings)
            self.counts[name] = self.counts.get(name, 0) + found
            return
        rows, before = self._rows(layer, inputs), self.sums.get(name, NOTHING)
        after = next((new for old, new in self.steps if old is before), None)
        if after is None:
            after = self._added(before, rows)
            self.steps.append((before, after))
        self.sums[name] = after

    def reads(self) -> dict[str, Reads]:
        """Return the sums of all layers that were called; shared ones are one object."""
        found: dict[str, Reads] = {name: Diagonal(count) for name, count in self.counts.items()}
        made: dict[Any, Reads] = {}
        for name, sums in self.sums.items():
            layer = self.layers[name]
            key = id(sums), layer.weight[0, 0].numel() if isinstance(layer, TRANSPOSED) else 0
            if key not in made:
                made[key] = _read(sums, key[1])
            found[name] = made[key]
        return {name: found[name] for name in self.layers if name in found}

    def _rows(self, layer: Any, inputs: Tensor) -> Tensor:
        """Patches whose squares sum to a mean over the positions of each sample."""
        geometry = [getattr(layer, name, None) for name in GEOMETRY]
        if self.last is not None:
            seen, same, rows = self.last
            if seen() is inputs and same == (geometry, inputs._version):
                return rows
        rows = patches(layer, inputs.detach().float())
        rows = rows * (len(inputs) / max(1, len(rows))) ** 0.5
        self.last = weakref.ref(inputs), (geometry, inputs._version), rows
        self.gram = None
        self.steps = []
        return rows

    def _added(self, sums: Sums, rows: Tensor) -> Sums:
        """Return sums with the rows of one more call."""
        width, calls = rows.shape[1], sums.calls + 1
        few = 2 * (sum(map(len, sums.kept)) + len(rows)) <= width
        if sums.gram is None and (few or width > MOST):
            return Sums(None, *_kept(sums, rows), calls)
        gram: Any = 0 if sums.gram is None else sums.gram
        for earlier in sums.kept:
            gram = gram + self_product(earlier.T)
        if self.gram is None:
            self.gram = self_product(rows.T)
        return Sums(gram + self.gram, (), sums.pace, calls)


NOTHING = Sums()  # before the first call


def _kept(sums: Sums, rows: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, int]]:
    """Keep one of so many samples, and half of them where they have become too many."""
    met, stride = sums.pace
    kept = [*sums.kept, rows[-met % stride :: stride]]
    while 2 * sum(map(len, kept)) > min(rows.shape[1], 2 * MOST):
        kept, stride = [torch.cat(kept)[::2]], 2 * stride
    return tuple(kept), (met + len(rows), stride)


def _read(sums: Sums, positions: int) -> Reads:
    """Return sums as what they are second moments of; those of a transposed kernel's channels."""
    rows = torch.cat([each * sums.pace[1] ** 0.5 for each in sums.kept]) if sums.kept else None
    if rows is not None and not positions:
        return Rows(rows)
    gram = sums.gram if rows is None else self_product(rows.T)
    assert gram is not None  # sums hold samples or their moments
    return Alike(gram, positions) if positions else Gram(gram)


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
    pulls: dict[str, Pull],
    outputs: Mapping[str, list[GradientEdge]],
    loss: Tensor,
    layers: Mapping[str, Factorizable],
) -> None:
    """Add the second moments of the gradients by every output."""
    if not outputs:
        return
    names = [name for name, calls in outputs.items() for _ in calls]
    edges = [edge for calls in outputs.values() for edge in calls]
    for name, gradient in zip(names, _pulled(loss, edges), strict=True):
        if gradient is None:
            continue
        axis = -1 if channels_last(layers[name]) else 1
        rows = torch.atleast_2d(gradient.float()).movedim(axis, -1).flatten(0, -2)
        pulls[name] = _with(pulls.get(name, []), rows)


def _pulled(loss: Tensor, edges: Sequence[GradientEdge]) -> Sequence[Tensor | None]:
    """Return gradients; none where the network overwrites what they need."""
    try:
        return torch.autograd.grad(loss, edges, allow_unused=True)
    except RuntimeError as error:
        if CHANGED not in str(error):
            raise
        return [None] * len(edges)


def _with(known: Pull, rows: Tensor) -> Pull:
    """Add gradients by outputs: as they are while they are few, else as their second moments."""
    width = rows.shape[1]
    if not isinstance(known, Tensor):
        if width >= FEW and 2 * (sum(map(len, known)) + len(rows)) <= width:
            return [*known, rows]
        rows, known = torch.cat([*known, rows]), torch.zeros((), device=rows.device)
    return known + (rows.square().sum(0) if width > WIDE else self_product(rows.T))


def surprise(result: Any, generator: torch.Generator) -> Tensor:
    """Return a scalar whose gradients have the Fisher information as second moments.

    For one row of logits a sample it is the loss, summed over samples, at a label drawn from the
    predictions of each. Any other output goes in a random direction; of several outputs every one
    counts alike, by its own spread.

    Raises:
        ModelError: an output is not a number, or the network gives none.
    """
    outputs = [output.float() for output in wide_answers(result)]
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
    each = output[0].numel() if output.dim() and len(output) else 1
    return moves.sum() / max(1, each) ** 0.5


def _spread(output: Tensor) -> Tensor:
    known = output.detach()[~output.isneginf()]
    return known.std(correction=0).clamp_min(torch.finfo(known.dtype).eps)
