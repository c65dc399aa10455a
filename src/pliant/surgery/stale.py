"""Sees whether layers that were put in are trained in the place of those that are gone."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from pliant.edits import Replaced
from pliant.errors import TrainingError


@dataclass
class _Gone:
    """Weights that an edit took out of a network, and those that stand for them now.

    Where an edit took none and put some in, the weights beside them, which stay.
    """

    layer: str
    removed: list[weakref.ref[nn.Parameter]]  # they live as long as somebody else holds them
    heirs: list[nn.Parameter]
    stays: bool = False

    def held(self, optimizer: Optimizer) -> list[nn.Parameter]:
        """Return those of the old weights that an optimizer still has."""
        known = _ids([optimizer])
        alive = [parameter for each in self.removed if (parameter := each()) is not None]
        return [parameter for parameter in alive if id(parameter) in known]


@dataclass
class Stale:
    """Compares what optimizers move with what is in the network, wherever they were made.

    An optimizer that steps and still holds the weights of a layer that is gone trains nothing of
    the layer in its place, and nobody would notice. It is looked for only while such weights are
    alive, between the two calls around a step.
    """

    gone: list[_Gone] = field(default_factory=list)
    stepped: list[Optimizer] = field(default_factory=list)
    handle: RemovableHandle | None = None

    def note(self, layer: str, replaced: Replaced) -> None:
        """Remember what took the place of what."""
        left = {id(parameter) for parameter in replaced.removed}
        stay = left & {id(parameter) for parameter in replaced.added}
        for earlier in self.gone:
            if any(id(heir) in left for heir in earlier.heirs):
                kept = [heir for heir in earlier.heirs if id(heir) not in left - stay]
                earlier.heirs = [*kept, *(new for new in replaced.added if id(new) not in stay)]
        heirs = [new for new in replaced.added if new.requires_grad and id(new) not in stay]
        old = [weakref.ref(p) for p in replaced.removed if p.requires_grad and id(p) not in stay]
        beside = [weakref.ref(p) for p in replaced.beside if p.requires_grad]
        if heirs and (old or beside):
            self.gone.append(_Gone(layer, old or beside, heirs, stays=not old))

    def settle(self, optimizers: Sequence[Optimizer]) -> None:
        """Forget weights that came beside others and that an optimizer holds now."""
        known = _ids(optimizers)
        self.gone = [
            each
            for each in self.gone
            if not each.stays or any(id(heir) not in known for heir in each.heirs)
        ]

    def missed(self, optimizer: Optimizer) -> Iterator[Replaced]:
        """Yield what an optimizer would have followed, had it been handed over earlier."""
        for each in self.gone:
            known = _ids([optimizer])
            heirs = tuple(heir for heir in each.heirs if id(heir) not in known)
            held = tuple(each.held(optimizer))
            yield Replaced(added=heirs, beside=held) if each.stays else Replaced(held, heirs)

    def listen(self) -> None:
        """Note every optimizer that steps from now on, if some old weight is still alive."""
        self.stop()
        self.gone = [each for each in self.gone if any(p() is not None for p in each.removed)]
        if self.gone:
            self.handle = register_optimizer_step_post_hook(self._see)

    def check(self) -> None:
        """Refuse to go on with an optimizer that has not followed.

        Raises:
            TrainingError: it stepped with the weights of a layer that is gone, and no optimizer
                that stepped has those in its place.
        """
        stepped = list(self.stepped)
        self.stop()
        known = _ids(stepped)
        for each in self.gone:
            lost = [heir for heir in each.heirs if heir.requires_grad and id(heir) not in known]
            stale = [type(optimizer).__name__ for optimizer in stepped if each.held(optimizer)]
            if lost and stale:
                old = "others of the network" if each.stays else "its old weights"
                raise TrainingError(
                    f"{each.layer} was replaced while the network trains, but the {stale[0]} that "
                    f"took the last step still holds {old}, and no optimizer that stepped "
                    "holds the new ones: they would never train. Hand every optimizer over, "
                    "pliant.start(..., optimizer=[...]) or run.optimizer = [...], and make none "
                    "anew behind the run's back."
                )
        self.settle(stepped)

    def stop(self) -> None:
        """Listen no longer."""
        self.stepped.clear()
        if self.handle is not None:
            self.handle.remove()
            self.handle = None

    def _see(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.stepped.append(optimizer)


def _ids(optimizers: Sequence[Optimizer]) -> set[int]:
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return {id(parameter) for group in groups for parameter in group["params"]}
