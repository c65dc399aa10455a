"""A method: frozen hyper-parameters and a few optional hooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from pliant import registry
from pliant.data import Data, Epoch
from pliant.edits import Edit
from pliant.run import Hooks, Run


@dataclass(frozen=True)
class Method:
    """A published way to make a network smaller.

    Fields are hyper-parameters; hooks do nothing unless overridden. A method keeps no state of
    its own: all that changes while compressing lives in the ``Run``.
    """

    replaces_loss: ClassVar[bool] = False  # `loss` drops the loss that it is given
    draws_batches: ClassVar[bool] = False  # it trains on batches of its own too, by the task's loss

    def refuse(self, run: Run) -> None:
        """Before any work: raise a `PliantError` if network, data or budget are not fit for it.

        Change nothing here, and look at nothing that takes longer than milliseconds.
        """

    def prepare(self, run: Run) -> None:
        """Before training: score, plan, insert masks, edit."""

    def epoch(self, epoch: Epoch, data: Data) -> Epoch:
        """Change what an epoch trains on: its samples, batch size and factor of the learning rate.

        The loop proposes every epoch and counts its steps beforehand, so this is a function of
        its arguments alone: ``replace(epoch, samples=0.5, batch=2 * epoch.batch, rate=2.0)``.
        """
        return epoch

    def weigh(self, run: Run, losses: Tensor, output: Any, batch: Any) -> Tensor | None:
        """Return weights of the losses, which are then summed and divided by how many there are.

        Args:
            run: of this method.
            losses: of the task, without gradient: one for each sample, or for each label where a
                sample has many; 0 where there is no label.
            output: of the network.
            batch: from which it came.

        Returns:
            One weight for each sample or for each loss; None for weights of one.
        """
        return None

    def loss(self, run: Run, loss: Tensor, output: Any, batch: Any) -> Tensor:
        """Change the loss where the outputs are needed (distillation).

        A method that wants a second batch takes it here by ``run.draw``, and its loss by
        ``run.task_loss(output, (*inputs, labels))``; ``loss``, ``output`` and ``batch`` are those
        of the loop's own batch.
        """
        return loss

    def penalty(self, run: Run) -> Tensor | None:
        """Return a penalty on the weights; its gradient is added before the step."""
        return None

    def before_step(self, run: Run) -> None:
        """Gradients are complete: change them here."""

    def after_step(self, run: Run) -> None:
        """Weights have moved: project, shrink, re-mask, count."""

    def after_epoch(self, run: Run) -> None:
        """One pass over the data is over."""

    def finalize(self, run: Run) -> None:
        """Make it permanent; leave plain modules only."""

    # What a method made of methods says about itself.

    @property
    def parts(self) -> tuple[Method, ...]:
        """The methods that this one is made of; none, unless it is composed."""
        return ()

    def uses(self, hook: str) -> bool:
        """Say whether this method, or any part of it, overrides a hook."""
        if self.parts:
            return any(part.uses(hook) for part in self.parts)
        return getattr(type(self), hook) is not getattr(Method, hook)

    def resume(self, run: Run, state: Mapping[str, Any], edits: Sequence[Edit]) -> None:
        """Bring a fresh run to the part that was at work, before its state is loaded."""

    def plain(self) -> dict[str, Any]:
        """Return the method as plain data, from which `registry.construct` builds an equal one."""
        return registry.options_of(self)


@registry.plain.register
def _plain(method: Method) -> dict[str, Any]:
    return method.plain()


@registry.check_options.register
def _check_options(method: Method) -> None:
    for part in method.parts:
        registry.check_options(part)
    registry.check_own(method)


HOOKS = (
    "refuse",
    "prepare",
    "epoch",
    "weigh",
    "loss",
    "penalty",
    "before_step",
    "after_step",
    "after_epoch",
    "finalize",
)
"""The names of the hooks, in the order in which a run calls them."""


def uses(method: Hooks[Run], hook: str) -> bool:
    """Say whether a method, or any part of a composed one, overrides a hook."""
    return method.uses(hook)
