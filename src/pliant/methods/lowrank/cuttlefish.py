"""Cuttlefish: train dense until ranks have settled, then factorize once and train on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pliant.families.lowrank.estimates import stable_estimates, stable_ranks
from pliant.families.lowrank.factorize import factorize, named, note_spectra, subjects
from pliant.families.lowrank.times import due
from pliant.families.lowrank.weaken import weakened
from pliant.method import Method
from pliant.registry import In, Paper, register
from pliant.run import Run


@register(
    "cuttlefish",
    paper=Paper(
        "Cuttlefish: Low-Rank Model Training without All the Tuning",
        "H. Wang, S. Agarwal, P. U-chupala, Y. Tanaka, E. Xing, D. Papailiopoulos",
        "MLSys",
        2023,
        "https://arxiv.org/abs/2305.02538",
    ),
    saves="params macs bytes latency",
)
@dataclass(frozen=True)
class Cuttlefish(Method):
    """Trains the dense network until the stable ranks of its layers settle, then splits them.

    The stable rank is the sum of the squared singular values over the largest of them. Each layer
    gets its own, in units of what it was at first, times full rank; every convolution becomes two
    (DxD, 1x1), and training goes on in the factors. Looked at ``looks`` times in the ``warmup``,
    ranks have settled once none has changed by more than the share ``settled`` since the last
    look; at the end of the warm-up the layers are split in any case. With ``settled=0`` that is
    Pufferfish (Wang, Agarwal and Papailiopoulos, MLSys 2021): a warm-up of a fixed length.

    With a budget all ranks are weakened towards full rank, or tightened towards one, by the same
    share. The rivals that it stands for choose no layers and no forms by data.

    *Departs from the paper*: the looks are spread over the warm-up, not over epochs, and their
    threshold is relative; which of the first layers stay dense is not timed but left to
    ``exclude``; no batch norm is put between the factors, and momentum follows them.

    >>> Cuttlefish(warmup=0.3, settled=0).warmup
    0.3
    """

    # share of the training after which layers are split at the latest
    warmup: Annotated[float, In(0, 1)] = 0.25
    # epsilon, largest relative change between two looks; 0 for no looks
    settled: Annotated[float, In(0)] = 0.02
    looks: Annotated[int, In(1)] = 10  # times in the warm-up that ranks are looked at
    form: Literal["output", "input", "tucker2", "spatial"] = "output"  # of the factors
    only: tuple[str, ...] = ()  # name patterns of the layers to consider
    exclude: tuple[str, ...] = ()  # name patterns of the layers to leave alone

    def prepare(self, run: Run) -> None:
        """Choose the layers, and measure their stable ranks."""
        layers = subjects(run, self.only, self.exclude, every=True)
        ranks = stable_ranks(layers)
        run.state.update(layers=list(layers), first=ranks, before=ranks, split=False)
        note_spectra(run, layers, 0.95)
        if run.steps and not self._warmup(run):
            self._split(run)

    def after_step(self, run: Run) -> None:
        """Look whether the ranks have settled; split the layers then, or when it is time."""
        if (state := run.state)["split"]:
            return
        if run.step >= self._warmup(run):
            self._split(run)
        elif self.settled and due(run.step, 1, self._warmup(run), self.looks):
            before, now = state["before"], stable_ranks(named(run, state["layers"]))
            state["before"] = now
            if max(abs(now[name] / before[name] - 1) for name in now) <= self.settled:
                self._split(run)

    def finalize(self, run: Run) -> None:
        """Split, if the training has not come to it."""
        if not run.state["split"]:
            self._split(run)

    def _warmup(self, run: Run) -> int:
        return round(self.warmup * run.steps)

    def _split(self, run: Run) -> None:
        run.state["split"] = True
        layers, first = named(run, run.state["layers"]), run.state["first"]
        estimates = stable_estimates(layers, first, self.form)
        run.note(stable={name: list(ranks) for name, ranks in estimates.items()})
        note_spectra(run, layers, 0.95)
        factorize(run, weakened(run, layers, estimates, self.form), layers, {})
