"""Knowledge distillation: the network also learns what it said before, or what its teacher says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from torch import Tensor

from pliant.families.distill.teaching import refuse_fractions, taught
from pliant.method import Method
from pliant.observe.aside import Teacher
from pliant.registry import In, Paper, register
from pliant.run import Run


@register(
    "kd",
    paper=Paper(
        "Distilling the Knowledge in a Neural Network",
        "G. Hinton, O. Vinyals, J. Dean",
        "NIPS Deep Learning Workshop",
        2014,
        "https://arxiv.org/abs/1503.02531",
    ),
)
@dataclass(frozen=True)
class KD(Method):
    """Learns from the softened classes of a frozen copy of the network as it was at the beginning.

    It makes nothing smaller itself. Named before a method that does, as in
    ``together("kd", "energy")``, its teacher is the dense network; named after it, what the other
    has made of that. In a chain the teacher is the network as the stage found it.
    `Train(distill=...)` is the same loss with the dense network as teacher in every phase of a
    training, also in a fine-tuning afterwards. A student far from its teacher gets gradients up to
    T times those of the labels: clip them.

    It needs a teacher that is better than its student would be. In the bench ``distill-family`` (a
    small CNN, 1,500 images, the teacher its own checkpoint of 47 %) it trailed plain training of
    as many steps by 1.0 +- 0.1 points.

    >>> KD(temperature=2.0).weight
    0.5
    """

    weight: Annotated[float, In(0, 1)] = 0.5  # share of the loss that is the teacher's
    # T, by which scores are divided before they become probabilities
    temperature: Annotated[float, In(0, open="low")] = 4.0

    def refuse(self, run: Run) -> None:
        refuse_fractions(run, "kd")

    def prepare(self, run: Run) -> None:
        """Freeze a copy."""
        run.hook(Teacher(run.model))

    def loss(self, run: Run, loss: Tensor, output: Any, batch: Any) -> Tensor:
        """Mix the loss of the task with the divergence from the teacher."""
        return taught(run, loss, output, batch, self.weight, self.temperature)
