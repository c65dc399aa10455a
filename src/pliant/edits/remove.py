"""A block or a layer is taken out; its shortcut stays."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import nn

from pliant.cost import LayerCost
from pliant.edits.edit import OPTIONAL, Replaced, exchanged, layer_of
from pliant.errors import EditError
from pliant.nn import layers


@dataclass(frozen=True)
class Remove:
    """Lets a whole block or layer pass its input, or leaves the shortcut of a residual block.

    What reads and what gives it must fit each other then: where a block appends channels to what
    it reads, whatever reads them must have lost them before. ``pliant.surgery.remove`` finds the
    blocks for which that is so, and proves it.

    Args:
        layer: the name of the block or layer.
        shortcut: the name, within the block, of what stays; "" for an identity.
        relu: whether a rectifier follows, as behind the sum of a block.
        out: take it out of the row that it ends, so that the row is as if it had never been there.

    Raises:
        EditError: there is no such block or shortcut, or nothing to remove.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    >>> _ = Remove("0").apply(model)
    >>> model
    Sequential(
      (0): Identity()
      (1): Linear(in_features=2, out_features=1, bias=True)
    )
    """

    layer: str
    shortcut: str = field(default="", metadata=OPTIONAL)
    relu: bool = field(default=False, metadata=OPTIONAL)
    out: bool = field(default=False, metadata=OPTIONAL)

    @property
    def form(self) -> str:
        """What the layer becomes."""
        return "removed"

    def apply(self, model: nn.Module, *, weights: bool = True) -> Replaced:
        """Put the shortcut in the place of the block."""
        module = layer_of(model, self.layer)
        if not self.layer:
            raise EditError("The model itself cannot be removed: name a block of it.")
        if isinstance(module, nn.Identity):
            raise EditError(f"{self.layer} is an identity already: there is nothing to remove.")
        if self.out:
            return self._take_out(model)
        parts = [self._shortcut(module)] if self.shortcut else []
        parts += [nn.ReLU()] if self.relu else []
        new = parts[0] if len(parts) == 1 else nn.Sequential(*parts) if parts else nn.Identity()
        before = list(model.parameters())
        layers.replace(model, self.layer, new.train(module.training))
        return exchanged(model, before)

    def predict(self, before: LayerCost) -> LayerCost:
        """Return the cost of what stays: nothing, or that of the shortcut.

        Args:
            before: where a shortcut stays, as `pliant.cost.module_cost` gives it.
        """
        if self.shortcut and not self.out:
            found = before
            for name in self.shortcut.split("."):
                found = _part(found, name, self)
            return found
        if before.input != before.output and not _appends(before):
            raise EditError(
                f"{self.layer} makes {before.output} of {before.input}, so it cannot be removed: "
                "name a shortcut that does the same."
            )
        kind = nn.ReLU if self.relu else nn.Identity
        left = replace(before, params=0, macs=0, bytes=0, weight=(), parts=())
        return replace(left, kind=kind.__name__, output=before.input)

    def _take_out(self, model: nn.Module) -> Replaced:
        """Shorten the row that holds the block."""
        around, _, name = self.layer.rpartition(".")
        row = model.get_submodule(around)
        if type(row) is not nn.Sequential or next(reversed(row._modules)) != name:
            raise EditError(f"{self.layer} must be the last of a row to be taken out of it.")
        if self.shortcut or self.relu or len(row) == 1:
            raise EditError(
                f"{self.layer} leaves nothing behind where it is taken out, and not alone: name "
                "neither shortcut nor rectifier, and keep one block in the row."
            )
        before = list(model.parameters())
        del row._modules[name]
        return exchanged(model, before)

    def _shortcut(self, module: nn.Module) -> nn.Module:
        try:
            return module.get_submodule(self.shortcut)
        except AttributeError:
            raise _missing(self) from None


def _appends(before: LayerCost) -> bool:
    """Whether shapes differ as if channels were appended."""
    given, output = before.input, before.output
    return len(given) == len(output) > 0 and given[1:] == output[1:] and given[0] < output[0]


def _part(before: LayerCost, name: str, edit: Remove) -> LayerCost:
    for child, part in before.parts:
        if child == name:
            return part
    raise _missing(edit)


def _missing(edit: Remove) -> EditError:
    return EditError(f"{edit.layer} has no shortcut {edit.shortcut!r}: name one of its children.")
