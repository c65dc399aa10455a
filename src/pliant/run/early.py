"""Watches the first losses of a training, where a learning rate may destroy what a network knew."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from pliant.data.guess import guess
from pliant.data.task import Task
from pliant.errors import PliantError
from pliant.observe.outputs import logits

STEPS = 20  # at the highest rate: what is not lost by then goes by more than the learning rate
WINDOW = 5  # losses whose mean counts, since one batch says little
CLASSES = "classification", "segmentation", "next-token"  # tasks that choose one of several
KNOWS = 0.5  # of the loss by chance: a network whose loss is above does not know much


@dataclass
class FirstSteps:
    """The losses of a training, one a step, as long as the learning rate may show in them.

    They are watched for 20 steps after the rate has risen for the last time. An edit changes the
    loss too, and so does a method that makes weights zero: the watch begins anew behind them.

    Args:
        phase: what the message calls the training.
        rate: what the message names; the highest that was seen if None.
        losses: each before the weights moved, so that the first is of the network as it came.
        guessing: the loss of guessing, None where it is not known.
        highest: learning rate so far.
        left: steps that are still watched.
        edits: how many had been made.
        heard: the loss of the last batch, None before the first one and after every step.
    """

    phase: str = "training"
    rate: float | None = None
    losses: list[float] = field(default_factory=list)
    guessing: float | None = None
    highest: float = 0.0
    left: int = STEPS
    edits: int = 0
    heard: float | None = None

    def hear(self, loss: Any, guessing: float | None = None) -> None:
        """Take the loss of a batch, and the loss of guessing if it is known.

        Args:
            loss: one number or tensor; of many numbers the mean counts.
            guessing: see `chance`.
        """
        if not self.left:
            return
        self.heard = float(loss.detach().mean() if isinstance(loss, Tensor) else loss)
        self.guessing = guessing if guessing is not None else self.guessing

    @property
    def asks(self) -> bool:
        """Whether it wants to know the loss of guessing."""
        return self.left > 0 and not self.losses and self.guessing is None

    def step(self, rate: float | None, edits: int) -> str | None:
        """Judge after a step; return what to say if the learning rate has destroyed the network.

        Args:
            rate: learning rate of the step, None if it is not known.
            edits: how many had been made to the network when the loss was taken.
        """
        loss, self.heard = self.heard, None
        if not self.left or loss is None:
            return None
        if edits != self.edits:
            self.anew()
        self.edits = edits
        self.losses.append(loss)
        if rate is not None and rate > self.highest:
            self.highest, self.left = rate, STEPS + 1
        self.left -= 1
        now = destroyed(self.losses, self.guessing)
        if now is None:
            return None
        self.left = 0
        return self._said(now)

    def anew(self) -> None:
        """Begin anew, where a method has changed weights by much."""
        self.losses.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to go on with the watch: plain values."""
        return vars(self) | {"losses": list(self.losses)}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on with a saved watch."""
        vars(self).update({**saved, "losses": list(saved.get("losses", ()))})

    def _said(self, now: float) -> str:
        rate = self.rate or self.highest
        named, tenth = (f" ({rate:g})", f" ({rate / 10:g})") if rate else ("", "")
        return (
            f"The learning rate{named} is too high for what the network knew: within the first "
            f"{len(self.losses)} steps of the {self.phase} the loss rose from {self.losses[0]:.2g} "
            f"to {now:.2g}; take a tenth of it{tenth}, or add a warmup or clip the gradient."
        )


def chance(task: Task | None, output: Any, batch: Any, model: nn.Module) -> float | None:
    """Return the loss of guessing, None where answers are no classes."""
    try:
        task = task or guess(output, batch, model)
        if task.name not in CLASSES:
            return None
        scores = logits(output) if task.scores is None else task.scores(output)
    except PliantError:
        return None
    return math.log(scores.shape[-1]) if scores.shape[-1] > 1 else None


def destroyed(losses: Sequence[float], guessing: float | None) -> float | None:
    """Return the loss to which a network has fallen that knew something; None if it has not.

    Args:
        losses: of the first steps, each before the weights move, so that the first is of the
            network as it came. One that is no number is the worst there is.
        guessing: the loss of guessing; where there is none, ten times the first loss counts.

    >>> destroyed([0.1, 0.2, 2.3, 2.4, 2.3, 2.2], math.log(10)) is not None
    True
    """
    if len(losses) < 3:
        return None
    first, now = losses[0], losses[1:][-WINDOW:]
    mean = sum(now) / len(now)
    if guessing is None:
        return mean if first > 0 and not mean <= 10 * first else None
    lost = first < KNOWS * guessing and not mean <= (first + guessing) / 2
    return mean if lost else None
