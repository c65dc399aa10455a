"""One layer becomes two or three smaller ones in a row."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pliant.cost import LayerCost
from pliant.edits.edit import OPTIONAL, Replaced, layer_of
from pliant.errors import EditError
from pliant.math import forms
from pliant.nn import factorized, kinds, layers

TABLE = nn.Embedding.__name__


@dataclass(frozen=True)
class Factor:
    """Replaces one layer by two or three smaller ones in a row.

    Args:
        layer: name of a Conv1d/2d/3d or ConvTranspose1d/2d/3d (groups=1), Linear or Embedding.
        form: ``tucker2`` (1x1, DxD, 1x1), ``input`` (1x1, DxD), ``output`` (DxD, 1x1),
            ``spatial`` (Dx1, 1xD) or ``svd`` (Linear and pointwise).
        ranks: ``(r_in, r_out)`` for ``tucker2``, one rank for the others.
        kernels: weights of the new layers; computed from the dense weight if None. They are
            tensors, not part of the plan: not compared and not written to JSON.
        source: of a Linear, the name of a table to whose weight its own is tied and which was
            factorized before, by the same ranks: its factors are shared. Empty for own ones.

    Raises:
        EditError: the layer cannot be read, or form or ranks do not fit it.
    """

    layer: str
    form: str
    ranks: tuple[int, ...]
    kernels: tuple[Tensor, ...] | None = field(default=None, compare=False, repr=False)
    source: str = field(default="", metadata=OPTIONAL)

    def apply(self, model: nn.Module, *, weights: bool = True) -> Replaced:
        """Put the smaller layers in the place of the dense one."""
        module = self._read(model)
        if self.source:
            return self._share(model, module)
        kernels = None
        if weights:
            dense = kinds.kernel(module).detach()
            kernels = self.kernels or forms.decompose(dense, self.form, self.ranks)
        new: Any = factorized.factorized(module, self.form, self.ranks, kernels)
        layers.replace(model, self.layer, new)
        added: tuple[Any, ...] = tuple(child.weight for child in new)
        turned = kinds.kernel(module) is not module.weight
        back = partial(_pull_back, row=new, form=self.form, turned=turned)
        dense_weight: Any = module.weight
        return Replaced((dense_weight,), added, back)

    def predict(self, before: LayerCost) -> LayerCost:
        """Return the cost of the smaller layers together."""
        shape = _shape(before)
        self._check(shape)
        shapes = forms.kernel_shapes(shape, self.form, self.ranks)
        positions = _positions(before, self.form)
        weights = [math.prod(shape) for shape in shapes]
        first = sum(w * p for w, p in zip(weights, positions, strict=True))
        dense = math.prod(before.weight) * positions[0 if _turned(before) else -1]
        bias = before.params - math.prod(before.weight)
        params = (0 if self.source else sum(weights)) + bias
        return LayerCost(
            kind=self.form,
            params=params,
            macs=before.calls * first  # a look-up multiplies nothing
            if before.kind == TABLE
            else before.macs * first // dense  # calls may differ in size
            if dense
            else 0,
            bytes=params * before.bytes // max(before.params, 1),
            input=before.input,
            output=before.output,
            calls=before.calls,
        )

    def _share(self, model: nn.Module, head: Any) -> Replaced:
        table = layer_of(model, self.source)
        fits = isinstance(table, nn.Sequential) and [type(part) for part in table] == [
            nn.Embedding,
            nn.Linear,
        ]
        shapes = fits and (table[1].out_features, table[0].num_embeddings, table[0].embedding_dim)
        if shapes != (head.in_features, head.out_features, self.ranks[0]):
            raise EditError(
                f"{self.layer} shares the factors of {self.source}, which must be factorized "
                "before, by the same ranks."
            )
        layers.replace(model, self.layer, factorized.tied(head, table))
        return Replaced((head.weight,))

    def _read(self, model: nn.Module) -> layers.Factorizable:
        module: layers.Factorizable = layer_of(model, self.layer)
        if reason := layers.obstacle(model, self.layer, every=True):
            raise EditError(f"{self.layer or 'The model'} cannot be factorized: {reason}.")
        self._check(tuple(kinds.kernel(module).shape))
        return module

    def _check(self, shape: tuple[int, ...]) -> None:
        if self.form not in forms.FORMS:
            raise EditError(
                f"Unknown form {self.form!r} for {self.layer}: one of {', '.join(forms.FORMS)}."
            )
        if self.form not in forms.forms_for(shape):
            raise EditError(f"{self.layer} with weight {shape} has no {self.form} form.")
        highest = forms.max_ranks(shape, self.form)
        fit = len(self.ranks) == len(highest) and all(
            type(rank) is int and 1 <= rank <= most
            for rank, most in zip(self.ranks, highest, strict=True)
        )
        if not fit:
            raise EditError(
                f"Ranks {self.ranks} do not fit {self.layer}: {self.form} takes whole numbers "
                f"from 1 to {highest}."
            )


def _turned(before: LayerCost) -> bool:
    return before.kind.startswith("ConvTranspose")


def _shape(before: LayerCost) -> tuple[int, ...]:
    """The shape of a layer's kernel (T, S, *kernel)."""
    if len(before.weight) > 1 and (_turned(before) or before.kind == TABLE):
        first, second, *rest = before.weight
        return (second, first, *rest)
    return before.weight


def _positions(before: LayerCost, form: str) -> list[int]:
    """How often each new kernel is applied to one sample."""
    if len(before.weight) == 2:
        times = math.prod(before.output[:-1])
        return [0 if before.kind == TABLE else times, times]
    into, out = math.prod(before.input[1:]), math.prod(before.output[1:])
    if _turned(before):  # a transposed convolution multiplies at every position of its input
        between = before.output[1] * math.prod(before.input[2:])
        rows = {"spatial": [into, between], "output": [into, out], "tucker2": [into, into, out]}
        return rows.get(form, [into, into])
    if form == "spatial":
        return [before.output[1] * math.prod(before.input[2:]), out]
    return {"tucker2": [into, out, out], "input": [into, out]}.get(form, [out, out])


def _pull_back(grad: Tensor, row: Any, form: str, *, turned: bool) -> list[Tensor]:
    """Turn a gradient by the dense weight into those by the weights of the row."""
    with torch.enable_grad():
        kernels = [kinds.kernel(part).detach().clone().requires_grad_() for part in row]
        grad = grad.transpose(0, 1) if turned else grad
        whole = forms.compose(kernels, form).reshape(grad.shape)
    found = torch.autograd.grad(whole, kernels, grad.to(whole.dtype))
    pairs = zip(row, found, strict=True)
    return [kinds.kernel(part, each).contiguous() for part, each in pairs]
