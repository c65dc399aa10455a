"""One layer becomes another, of a kind that is known by name.

How to write a layer that ships in files. A kind is a module in `pliant.nn` and a line in `SWAPS`
of `pliant.nn.catalogue`; nothing else knows it. The class has:

- ``spec``, a class attribute: the names of its settings and their types (``bool``, ``int``,
  ``float``, ``str``, or ``tuple`` for a row of these). All of them must be given, so that no
  default can change the meaning of an old file.
- ``build(layer, spec)``, a class method: makes the new layer from the *shapes* of the old one,
  never from its values. It also runs on tensors without data, when a file is read. Device, type
  of numbers, training mode and random state are taken care of. A parameter of the old layer that
  the new one holds too, as the same object, keeps its place and its state in the optimizer. Raise
  an `EditError` where the layer or a setting does not fit: its text goes on with a sentence that
  begins with the layer's name ("must be a convolution without groups ..."). Settings may come
  from a file of anybody's: refuse those that would build without bounds.
- ``fill(self, layer)``, only if the new layer begins with what the old one has learned: it sets
  the new weights, without gradients. It is left out when a file is read or a run is resumed.
- ``predict(before, spec)``, a class method: the cost of all that the new layer holds, from the
  cost of the old one. The conformance suite compares it with what is measured. A layer made of
  plain layers is counted by them, products of its own parameters are counted as they run; one
  that keeps its weight packed in buffers says so by `pliant.cost.macs.Packed`.

What a layer learns is a parameter or a buffer, so that it is in the file; what follows from the
settings is a buffer with ``persistent=False``. A layer that trains in one form and ships in
another is two kinds: the second swap reads what the first has learned. ``forward`` must hold for
any size of batch and branch on no values of tensors, or it does not export to ONNX.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn
from torch.nn.utils import parametrize

from pliant.cost import LayerCost
from pliant.edits.build import build, kind_of
from pliant.edits.edit import OPTIONAL, Replaced, exchanged, layer_of
from pliant.errors import EditError
from pliant.nn import layers
from pliant.nn.catalogue import SWAPS, Kind, Spec


@dataclass(frozen=True)
class Swap:
    """Puts a layer of a kind known by name in the place of another.

    Args:
        layer: the name of the layer to replace; it may be a whole block.
        form: the kind, of `SWAPS`: ``identity`` in the place of a batch norm, ``biased`` in that
            of a convolution or Linear without a bias, ``separable``, ``morphological``,
            ``shift_attention`` or ``quadratic`` in that of a convolution, ``orthogonal_basis`` in
            that of a last Linear, and forms that follow upon these.
        spec: what is set of the new layer, as its kind declares.
        seed: of the random numbers that the new layer begins with.

    Raises:
        EditError: the form is unknown, takes other settings, or does not fit the layer.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3))
    >>> Swap("0", "separable", {"multiplier": 1}).apply(model)  # doctest: +ELLIPSIS
    Replaced(...)
    >>> [tuple(weight.shape) for weight in model[0].parameters()]
    [(3, 1, 3, 3), (8, 3, 1, 1), (8,)]
    """

    layer: str
    form: str
    spec: Spec = field(default_factory=dict, hash=False, metadata=OPTIONAL)
    seed: int = field(default=0, metadata=OPTIONAL)

    def __post_init__(self) -> None:
        object.__setattr__(self, "spec", dict(self.spec))  # nobody else changes it

    def apply(self, model: nn.Module, *, weights: bool = True) -> Replaced:
        """Put the new layer in the place of the old one."""
        module, kind = layer_of(model, self.layer), self._kind()
        if not self.layer:
            raise EditError("The model is this single layer: wrap it in nn.Sequential.")
        if parametrize.is_parametrized(module):
            raise EditError(f"{self.layer} is parametrized: remove its parametrizations first.")
        before = list(model.parameters())
        new = build(kind, model, self.layer, self.spec, seed=self.seed, weights=weights)
        if new is not module:
            layers.replace(model, self.layer, new)
        return exchanged(model, before)

    def predict(self, before: LayerCost) -> LayerCost:
        """Return the cost of the new layer."""
        return self._kind().predict(before, self.spec)

    def _kind(self) -> type[Kind]:
        return kind_of(SWAPS, self.layer, self.form, self.spec)
