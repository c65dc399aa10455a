"""Finds layers that can be a part of the layer before them, and proves it by forward passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map

from pliant.cost import Example, call, twin
from pliant.edits import Edit, Fold, Merge, replay
from pliant.edits.merge import fits
from pliant.observe.outputs import alike, answers
from pliant.observe.watch import capture
from pliant.surgery.select import readable

TOLERANCE = 1e-3  # of the largest output: rounding stays far below, a wrong fold far above

Known = list[tuple[Example, list[Tensor]]]  # inputs, and what the network answers
E = TypeVar("E", bound=Edit)


def foldable(model: nn.Module, example: Example) -> list[Fold]:
    """Return an edit for every batch norm that reads nothing but the output of one layer.

    Candidates are found by following tensors through one forward pass; then they are folded in
    a copy, whose outputs must stay as they are, for the example and for noise of its shape. If
    they do not, each is tried on its own.

    Args:
        model: any module; it stays as it is.
        example: inputs of one forward call.

    Raises:
        ModelError: the network answers with no tensor that could be compared.
    """
    found = _folds(model, example)
    return _proven(model, found, _known(model, example)) if found else []


def mergeable(model: nn.Module, example: Example) -> list[Merge]:
    """Return edits that make two linear layers in a row one, where that has fewer MACs.

    Pairs are found and proven as by `foldable`, those that save most first. What was merged may
    be merged again, so the edits are to be applied in their order. Everything is as it is in
    evaluation: dropout between two layers does not keep them apart.

    Args:
        model: any module; it stays as it is.
        example: inputs of one forward call.

    Raises:
        ModelError: the network answers with no tensor that could be compared.
    """
    merged, known = twin(model), _known(model, example)
    found: list[Merge] = []
    refused: set[Merge] = set()
    while pairs := _apart([m for m in _merges(merged, example) if m not in refused]):
        proven = _proven(merged, pairs, known)
        replay(merged, proven)
        found += proven
        refused |= {*pairs} - {*proven}
    return found


# ---------------------------------------------------------------- candidates


def _folds(model: nn.Module, example: Example) -> list[Fold]:
    layers, _ = readable(model)
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }
    return [
        Fold(norm, into)
        for norm, (into, output) in _sources(model, example, layers, norms).items()
        if _in_place(layers[into], norms[norm], output)
    ]


def _in_place(layer: Any, norm: _BatchNorm, output: Tensor) -> bool:
    """A Linear has its channels last and a batch norm second: the same only in a matrix."""
    same = len(layer.weight) == norm.num_features
    return same and (not isinstance(layer, nn.Linear) or output.dim() == 2)


def _merges(model: nn.Module, example: Example) -> list[Merge]:
    """Return all pairs that save MACs, those that save most first."""
    layers, _ = readable(model)
    found = []
    for reader, (layer, _) in _sources(model, example, layers, layers).items():
        first, second = layers[layer], layers[reader]
        if fits(first, second) and (saved := _saved(first, second)) > 0:
            found.append((saved, Merge.of(model, layer, reader)))
    return [merge for _, merge in sorted(found, key=lambda pair: -pair[0])]


def _saved(first: Any, second: Any) -> int:
    """Count the weights that go; MACs go with them, since both work at the same positions."""
    merged = len(second.weight) * first.weight[0].numel()
    return int(first.weight.numel() + second.weight.numel() - merged)


def _apart(merges: Sequence[Merge]) -> list[Merge]:
    """Take the first of those that share a layer."""
    found: list[Merge] = []
    taken: set[str] = set()
    for merge in merges:
        if taken.isdisjoint({merge.layer, merge.reader}):
            found.append(merge)
            taken |= {merge.layer, merge.reader}
    return found


def _sources(
    model: nn.Module,
    example: Example,
    layers: Mapping[str, nn.Module],
    readers: Mapping[str, nn.Module],
) -> dict[str, tuple[str, Tensor]]:
    """Name the layer, and its output, that each reader reads, where both are called just once."""
    said: dict[str, list[tuple[Tensor, int]]] = {name: [] for name in layers}
    read: dict[str, list[str | None]] = {name: [] for name in readers}

    def see(name: str, inputs: Tensor, output: Tensor) -> None:
        if name in read:
            # The very tensor, not changed in place since the layer gave it.
            before = [
                n for n, row in said.items() for t, v in row if t is inputs and t._version == v
            ]
            read[name].append(before[-1] if before else None)
        if name in said:
            said[name].append((output, output._version))

    with capture(model, {**layers, **readers}, see):
        call(model, example)
    return {
        reader: (source, said[source][0][0])
        for reader, sources in read.items()
        if len(sources) == 1 and (source := sources[0]) is not None and len(said[source]) == 1
    }


# ---------------------------------------------------------------- proof


def _proven(model: nn.Module, found: list[E], known: Known) -> list[E]:
    """Return the edits after which the network answers as before: all, or each that does."""
    if _same(model, found, known):
        return found
    proven: list[E] = []
    for edit in found:
        if _same(model, [*proven, edit], known):
            proven.append(edit)
    return proven


def _known(model: nn.Module, example: Example) -> Known:
    """Ask the network about the example, and about noise where it can answer."""
    known = [(example, _outputs(model, example))]
    noise = _noise(example)
    try:
        answer = _outputs(model, noise)
    except Exception:  # not every network reads everything
        return known
    finite = all(torch.isfinite(output).all() for output in answer)
    return [*known, (noise, answer)] if finite else known


def _noise(example: Example) -> Any:
    random = torch.Generator().manual_seed(0)

    def like(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value  # words, masks, lengths: others need not make sense
        return torch.randn(value.shape, generator=random).to(value)

    return tree_map(like, dict(example) if isinstance(example, Mapping) else example)


def _same(model: nn.Module, edits: Sequence[Edit], known: Known) -> bool:
    edited = twin(model)
    replay(edited, edits)
    try:
        return all(alike(had, _outputs(edited, inputs), TOLERANCE) for inputs, had in known)
    except Exception:  # something else reads the layer too, and fails on its new shape
        return False


def _outputs(model: nn.Module, example: Example) -> list[Tensor]:
    with capture(model, [], lambda *_: None):  # eval mode, no gradients
        return answers(call(model, example))
