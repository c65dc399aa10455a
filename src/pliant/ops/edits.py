"""Changes to a model as data: they can be applied, predicted, written to JSON and replayed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from pliant.cost import LayerCost
from pliant.errors import EditError
from pliant.math import forms
from pliant.ops import layers


@dataclass(frozen=True)
class Replaced:
    """What an edit did to the parameters, for whoever keeps state about them.

    Args:
        removed: parameters that are no longer part of the model.
        added: parameters that take their place.
        project: carries a quantity linear in the gradient of ``removed[0]`` (momentum) over to
            ``added``, by the chain rule; None where nothing can be carried.
    """

    removed: tuple[nn.Parameter, ...] = ()
    added: tuple[nn.Parameter, ...] = ()
    project: Callable[[Tensor], list[Tensor]] | None = None


@runtime_checkable
class Edit(Protocol):
    """One change to one layer."""

    @property
    def layer(self) -> str:
        """The name of the layer to change."""

    def apply(self, model: nn.Module, *, weights: bool = True) -> Replaced:
        """Change the model in place; ``weights=False`` gives the shapes only, for loading."""

    def predict(self, before: LayerCost) -> LayerCost:
        """Return what the layer will cost, without touching the model."""


@dataclass(frozen=True)
class Factor:
    """Replaces one layer by two or three smaller ones in a row.

    Args:
        layer: name of a Conv1d/2d/3d (groups=1) or Linear.
        form: ``tucker2`` (1x1, DxD, 1x1), ``input`` (1x1, DxD), ``output`` (DxD, 1x1),
            ``spatial`` (Dx1, 1xD) or ``svd`` (Linear and pointwise).
        ranks: ``(r_in, r_out)`` for ``tucker2``, one rank for the others.
        kernels: weights of the new layers; computed from the dense weight if None. They are
            tensors, not part of the plan: not compared and not written to JSON.

    Raises:
        EditError: the layer cannot be read, or form or ranks do not fit it.
    """

    layer: str
    form: str
    ranks: tuple[int, ...]
    kernels: tuple[Tensor, ...] | None = field(default=None, compare=False, repr=False)

    def apply(self, model: nn.Module, *, weights: bool = True) -> Replaced:
        """Put the smaller layers in the place of the dense one."""
        module = self._read(model)
        kernels = None
        if weights:
            kernels = self.kernels or forms.decompose(module.weight.detach(), self.form, self.ranks)
        dense: Any = module.weight
        new = layers.factorized(module, self.form, self.ranks, kernels)
        layers.replace(model, self.layer, new)
        added: tuple[Any, ...] = tuple(child.weight for child in new)
        return Replaced((dense,), added, lambda grad: _pull_back(grad, added, self.form))

    def predict(self, before: LayerCost) -> LayerCost:
        """Return the cost of the smaller layers together."""
        self._check(before.weight)
        shapes = forms.kernel_shapes(before.weight, self.form, self.ranks)
        positions = _positions(before, self.form)
        weights = [math.prod(shape) for shape in shapes]
        first = sum(w * p for w, p in zip(weights, positions, strict=True))
        dense = math.prod(before.weight) * positions[-1]
        bias = before.params - math.prod(before.weight)
        params = sum(weights) + bias
        return LayerCost(
            kind=self.form,
            params=params,
            macs=before.macs * first // dense if dense else 0,  # calls may differ in size
            bytes=params * before.bytes // max(before.params, 1),
            input=before.input,
            output=before.output,
            calls=before.calls,
        )

    def _read(self, model: nn.Module) -> layers.Factorizable:
        try:
            module = model.get_submodule(self.layer)
        except AttributeError:
            raise EditError(
                f"The model has no layer {self.layer!r}: was it built as the one that was edited?"
            ) from None
        if reason := layers.obstacle(model, self.layer):
            raise EditError(f"{self.layer or 'The model'} cannot be factorized: {reason}.")
        self._check(tuple(module.weight.shape))  # type: ignore[arg-type]
        return module  # type: ignore[return-value]

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


def _positions(before: LayerCost, form: str) -> list[int]:
    """How often each new kernel is applied to one sample."""
    if len(before.weight) == 2:
        return [math.prod(before.output[:-1])] * 2
    into, out = math.prod(before.input[1:]), math.prod(before.output[1:])
    if form == "spatial":
        return [before.output[1] * math.prod(before.input[2:]), out]
    return {"tucker2": [into, out, out], "input": [into, out]}.get(form, [out, out])


def _pull_back(grad: Tensor, added: Sequence[nn.Parameter], form: str) -> list[Tensor]:
    with torch.enable_grad():
        kernels = [weight.detach().clone().requires_grad_() for weight in added]
        dense = forms.compose(kernels, form).reshape(grad.shape)
    return list(torch.autograd.grad(dense, kernels, grad.to(dense.dtype)))


EDITS: dict[str, type] = {"factor": Factor}
"""The closed set of edits that a file may name."""


def replay(model: nn.Module, edits: Iterable[Edit], *, weights: bool = True) -> None:
    """Apply edits in order; with ``weights=False`` only the shapes change.

    Raises:
        EditError: an edit does not fit the model.
    """
    for edit in edits:
        edit.apply(model, weights=weights)


def to_json(edits: Iterable[Edit]) -> list[dict[str, Any]]:
    """Return the edits as plain data: names, strings and numbers, no tensors."""
    names = {kind: name for name, kind in EDITS.items()}
    return [
        {"edit": names[type(edit)]}
        | {f.name: getattr(edit, f.name) for f in fields(edit) if f.compare}  # type: ignore[arg-type]
        for edit in edits
    ]


def from_json(rows: Any) -> list[Edit]:
    """Read edits from plain data, accepting only known names with the fields they have.

    Raises:
        EditError: the data is not a list of known edits.
    """
    if not isinstance(rows, list):
        raise EditError(f"Edits must be a list, not {type(rows).__name__}.")
    return [_edit(row) for row in rows]


def _edit(row: Any) -> Edit:
    name = row.get("edit") if isinstance(row, dict) else row
    if not isinstance(row, dict) or not isinstance(name, str) or name not in EDITS:
        raise EditError(f"Unknown edit {str(name)[:80]!r}: this version knows {', '.join(EDITS)}.")
    kind = EDITS[name]
    values = {key: value for key, value in row.items() if key != "edit"}
    expected = {f.name: str(f.type) for f in fields(kind) if f.compare}
    if set(values) != set(expected):
        raise EditError(
            f"The edit {name} takes {', '.join(sorted(expected))}, "
            f"not {', '.join(sorted(map(str, values)))[:200]}."
        )
    for key, value in values.items():
        if not _FITS[expected[key]](value):
            raise EditError(
                f"{key} of the edit {name} must be of type {expected[key]}, "
                f"not {str(value)[:80]!r}."
            )
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


_FITS: dict[str, Callable[[Any], bool]] = {
    "str": lambda value: isinstance(value, str),
    "int": lambda value: type(value) is int,
    "tuple[int, ...]": lambda value: (
        isinstance(value, list | tuple) and all(type(item) is int for item in value)
    ),
}
"""What a field of an edit may hold in a file, by its annotation; a bool is not a number."""
