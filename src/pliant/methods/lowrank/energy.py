"""Energy ranks: one energy threshold for the whole network, read off a finished network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pliant.families.lowrank.factorize import Form, check_reachable, factorize, look, plan, subjects
from pliant.method import Method
from pliant.registry import In, Paper, register
from pliant.run import Run


@register(
    "energy",
    paper=Paper(
        "Exploiting Elasticity in Tensor Ranks for Compressing Neural Networks (its ranks, "
        "without its penalty)",
        "J. Ran, R. Lin, H. K.-H. So, G. Chesi, N. Wong",
        "ICPR",
        2020,
        "https://arxiv.org/abs/2105.04218",
    ),
    saves="params macs bytes latency",
)
@dataclass(frozen=True)
class Energy(Method):
    """Keeps in every layer the directions that hold the share p of its energy, before training.

    The baseline of NRMF: the same ranks and factors without any search. With ``samples`` it
    becomes data-aware: energy is what a direction is worth to the loss, estimated from inputs
    alone. All training that follows is fine-tuning.

    >>> Energy(p=0.9).p
    0.9
    """

    p: Annotated[float, In(0, 1)] = 0.95  # energy kept, if there is no budget
    form: Form = "tucker2"  # of the factors; "auto" takes the best per layer
    samples: Annotated[int, In(0)] = 0  # training inputs to look at; 0 looks at weights only
    recalibrate: bool = True  # re-estimate batch norms afterwards
    # training inputs from which the layers are refitted in turn
    reconstruct: Annotated[int, In(0)] = 0
    only: tuple[str, ...] = ()  # name patterns of the layers to consider
    exclude: tuple[str, ...] = ()  # name patterns of the layers to leave alone

    def refuse(self, run: Run) -> None:
        """Refuse a budget that is out of reach."""
        check_reachable(run, self.form, only=self.only, exclude=self.exclude, every=True)

    def prepare(self, run: Run) -> None:
        """Factorize at once."""
        layers = subjects(run, self.only, self.exclude, every=True)
        seen = look(run, layers, self.samples)
        factorize(
            run,
            plan(run, layers, self.form, seen, self.p),
            layers,
            seen,
            recalibrate=self.recalibrate,
            reconstruct=self.reconstruct,
        )
