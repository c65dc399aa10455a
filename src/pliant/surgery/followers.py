"""All that follows a network through its edits: optimizers, copies, and who sees that they do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn
from torch.optim import Optimizer

from pliant.edits import Edit, Replaced, apply
from pliant.surgery.copies import follow, marks
from pliant.surgery.optim import Optimizers, carry, several
from pliant.surgery.pace import Pace
from pliant.surgery.stale import Stale


@dataclass
class Followers:
    """What knows the parameters of a network, and goes along when these are replaced.

    Args:
        optimizers: their state follows.
        copies: networks of the same layers, such as an average of the weights.
        stale: finds optimizers that nobody handed over.
        paces: what multiplies the learning rates.
    """

    optimizers: list[Optimizer] = field(default_factory=list)
    copies: tuple[nn.Module, ...] = ()
    stale: Stale = field(default_factory=Stale)
    paces: list[Pace] = field(default_factory=list)

    def hand_over(
        self, model: nn.Module, given: Optimizers, factor: Callable[[], float] | None = None
    ) -> None:
        """Take optimizers in the place of all before, and carry them over all earlier edits.

        Args:
            model: whose parameters they hold.
            given: one, several or none.
            factor: asked before every step for a factor of the learning rates; None for 1.
        """
        self.optimizers[:] = several(given)
        for optimizer in self.optimizers:
            for replaced in self.stale.missed(optimizer):
                carry(optimizer, replaced, self._names(model))
        self.stale.settle(self.optimizers)
        for pace in self.paces:
            pace.remove()
        self.paces[:] = [Pace(each, factor) for each in self.optimizers if factor is not None]

    def edit(self, model: nn.Module, edit: Edit, *, weights: bool) -> None:
        """Edit a network, and let all follow."""
        before = marks(model) if self.copies else {}
        replaced = apply(model, edit, weights=weights)
        self.carry(model, edit.layer, replaced)
        if self.copies:
            follow(self.copies, model, edit, before, replaced)

    def carry(self, model: nn.Module, layer: str, replaced: Replaced) -> None:
        """Tell the optimizers which parameters of a layer took the place of which."""
        carry(self.optimizers, replaced, self._names(model))
        self.stale.note(layer, replaced)
        self.stale.settle(self.optimizers)

    @property
    def stepping(self) -> bool:
        """Whether an optimizer is within a step, its learning rates already multiplied."""
        return any(pace.at_work for pace in self.paces)

    def close(self) -> None:
        """Let go of the optimizers' steps."""
        self.stale.stop()
        for pace in self.paces:
            pace.remove()
        self.paces.clear()

    def _names(self, model: nn.Module) -> dict[int, str]:
        """Name parameters, where an optimizer was made with names."""
        groups = [group for each in self.optimizers for group in each.param_groups]
        named = any("param_names" in group for group in groups)
        return {id(p): name for name, p in model.named_parameters()} if named else {}
