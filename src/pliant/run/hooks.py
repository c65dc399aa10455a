"""What a run calls of a method."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from pliant.data import Data, Epoch
from pliant.edits import Edit

R = TypeVar("R", contravariant=True)  # the run itself, which knows these hooks


@runtime_checkable
class Hooks(Protocol[R]):
    """What a run calls: see `pliant.method.Method`, which does nothing at each of these moments."""

    def uses(self, hook: str, /) -> bool:
        """Whether it does something at one of them."""

    def refuse(self, run: R, /) -> None:
        """Before any work."""

    def epoch(self, epoch: Epoch, data: Data, /) -> Epoch:
        """Before an epoch, and before all of them."""

    def weigh(self, run: R, losses: Tensor, output: Any, batch: Any, /) -> Tensor | None:
        """When a batch has gone through the network, before its loss is one number."""

    def resume(self, run: R, state: Mapping[str, Any], edits: Sequence[Edit], /) -> None:
        """Before a saved state is loaded."""

    def prepare(self, run: R, /) -> None:
        """Before training."""

    def loss(self, run: R, loss: Tensor, output: Any, batch: Any, /) -> Tensor:
        """When a batch has gone through the network."""

    def penalty(self, run: R, /) -> Tensor | None:
        """Before the step."""

    def before_step(self, run: R, /) -> None:
        """When gradients are complete."""

    def after_step(self, run: R, /) -> None:
        """When weights have moved."""

    def after_epoch(self, run: R, /) -> None:
        """When one pass over the data is over."""

    def finalize(self, run: R, /) -> None:
        """At the end."""
