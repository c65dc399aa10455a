"""SRFP and ASRFP, softer filter pruning: weak filters fade epoch by epoch, and may recover."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from pliant.errors import MethodError
from pliant.families.prune.channels import filters_of
from pliant.families.prune.cut import cut, subjects, uniform_shares
from pliant.families.prune.masks import fade, fade_small, unit_norms, weakest
from pliant.method import Method
from pliant.registry import In, Paper, register
from pliant.run import Run
from pliant.surgery.prove import edits_of
from pliant.surgery.select import readable

Decay = Literal["exponential", "linear", "constant"]

FULL_FROM = 0.95  # share of the epochs from which the whole rate is pruned
VANISHED = 1e-4  # factors below this are 0


@register(
    "asrfp",
    paper=Paper(
        "Softer Pruning, Incremental Regularization",
        "L. Cai, Z. An, C. Yang, Y. Xu",
        "ICPR",
        2020,
        "https://arxiv.org/abs/2010.09498",
    ),
    saves="params macs bytes latency",
)
@dataclass(frozen=True)
class ASRFP(Method):
    """Multiplies the weakest filters after every epoch by a factor that falls to 0.

    The filters are chosen anew each time, and all of them train between. The share that fades
    rises to its end value (``ramp``), or is constant (``ramp=0``: SRFP). With ``alpha=0`` weak
    filters are zeroed at once: ASFP, and SFP with ``ramp=0``. At the end the weakest filters
    leave the network.

    *Departs from the paper*: by default only filters that can leave fade (those of channels that
    meet in a sum together), since zeros that stay cost accuracy and save nothing; ``every=True``
    lets every convolution fade by itself as in the paper. A hidden linear layer is treated as a
    convolution. The cut at the end is inferred, and mends the batch norms where there is data.

    >>> ASRFP(alpha=0.0, ramp=0.0).rate  # SFP
    0.4
    """

    # P, share of the filters that leaves, if there is no budget
    rate: Annotated[float, In(0, 1, "high")] = 0.4
    alpha: Annotated[float, In(0, 1)] = 1.0  # alpha_0, factor at the beginning
    # factor wanted at the end of an exponential decay
    sigma: Annotated[float, In(0, open="low")] = 1e-5
    # D, share of the training in which the rate reaches three quarters
    ramp: Annotated[float, In(0)] = 0.125
    decay: Decay = "exponential"  # of the factor
    zero_from: Annotated[float, In(0)] = 0.9  # share of the epochs from which the factor is 0
    interval: Annotated[int, In(1)] = 1  # epochs between two maskings
    # T, parts of the training after which filters fade; 0: the epochs themselves
    epochs: Annotated[int, In(0)] = 0
    search: Annotated[float, In(0, 1)] = 1.0  # share of the training before the filters leave
    norm: Literal["l1", "l2"] = "l2"  # of a filter
    unit: Literal["filter", "weight"] = "filter"  # what fades; single weights never leave
    norms: bool = False  # fade the batch norms of these channels too
    every: bool = False  # fade filters that cannot leave too, as in the paper
    # share of the filters of a layer that stays in any case
    least: Annotated[float, In(0, 1)] = 0.1
    only: tuple[str, ...] = ()  # name patterns of the layers to consider
    exclude: tuple[str, ...] = ()  # name patterns of the layers to leave alone

    def prepare(self, run: Run) -> None:
        self._check(run)
        run.state.update(rates={}, filters={}, norms={}, weights=[], removed=False)
        if self.unit == "weight":
            chosen, _ = readable(run.model, only=self.only, exclude=self.exclude)
            run.state["weights"] = list(chosen)
        else:
            self._choose(run)
        if run.steps:
            self._fade(run, 0, math.inf)

    def after_step(self, run: Run) -> None:
        if run.state["removed"]:
            return
        end = self._end(run)
        if self.epochs and run.step * self.epochs // end > (run.step - 1) * self.epochs // end:
            self._fade_at(run, run.step * self.epochs // end - 1, self.epochs)
        if self.search < 1 and run.step >= end:
            self._remove(run)

    def after_epoch(self, run: Run) -> None:
        if not self.epochs and not run.state["removed"]:
            self._fade_at(run, run.epoch - 1, self._end(run) * run.epoch / run.step)

    def finalize(self, run: Run) -> None:
        if not run.state["removed"]:
            self._remove(run)

    def _check(self, run: Run) -> None:
        for name, value, most in (
            *(("rate", self.rate, math.nextafter(1, 0)), ("alpha", self.alpha, 1)),
            *(("least", self.least, 1), ("search", self.search, 1)),
        ):
            if not 0 <= value <= most:
                raise MethodError(f"asrfp: {name} is a share between 0 and 1, not {value}.")
        if not 0 < self.sigma < math.inf or self.ramp < 0 or self.zero_from < 0:
            raise MethodError(
                "asrfp: sigma must be positive, ramp and zero_from must not be negative, not "
                f"{self.sigma}, {self.ramp} and {self.zero_from}."
            )
        if self.interval < 1 or self.epochs < 0:
            raise MethodError(
                f"asrfp: interval must be at least 1 and epochs at least 0, not {self.interval} "
                f"and {self.epochs}."
            )
        if self.unit == "weight" and run.limits():
            raise MethodError(
                "asrfp: single weights that are zero save nothing that a budget counts; leave the "
                'budget out, or use unit="filter".'
            )

    def _choose(self, run: Run) -> None:
        """Note which filters fade together, and at which rate."""
        groups = subjects(run, self.only, self.exclude)
        if self.every:
            groups = [group for group in groups if len(group.makers) == 1]
        filters = {group.name: filters_of(group) for group in groups}
        rates = uniform_shares(run, groups, self.rate, least=self.least)
        if self.every:
            own = {layer for rows in filters.values() for layer in rows}
            filters |= _others(run, own, self.only, self.exclude)
        rate = max(rates.values())
        run.state["rates"] = {name: rates.get(name, rate) for name in filters}
        run.state["filters"] = filters
        run.state["norms"] = {
            g.name: {s[0]: g.rows(s) for s in g.slots if s[1] == "channels"} for g in groups
        }

    def _end(self, run: Run) -> int:
        return max(1, round(self.search * run.steps))

    def _fade_at(self, run: Run, epoch: int, epochs: float) -> None:
        if epoch % self.interval == 0 or epoch + 1 >= epochs:
            self._fade(run, epoch, epochs)

    def _fade(self, run: Run, epoch: int, epochs: float) -> None:
        """One masking: choose the weakest anew and multiply them."""
        part = ramp_at(epoch, epochs, self.ramp)
        factor = alpha_at(epoch, epochs, self.alpha, self.sigma, self.decay, self.zero_from)
        self._multiply(run, part, factor)
        run.note(alpha=factor, rate=part * max(run.state["rates"].values(), default=self.rate))

    def _multiply(self, run: Run, part: float, factor: float) -> dict[str, Tensor]:
        """Multiply the weakest units of every kind, a part of its rate; return which they are."""
        if factor == 1:
            return {}
        for layer in run.state["weights"]:
            weight: Any = run.model.get_submodule(layer).weight
            fade_small(weight, math.floor(weight.numel() * part * self.rate + 1e-9), factor)
        chosen = {}
        for name, rows in run.state["filters"].items():
            scores = unit_norms(run.model, rows, order=1.0 if self.norm == "l1" else 2.0)
            most = len(scores) - max(1, math.ceil(self.least * len(scores) - 1e-9))
            count = math.floor(len(scores) * part * run.state["rates"][name] + 1e-9)
            chosen[name] = weakest(scores, min(most, count))
            _fade_units(run, rows, chosen[name], factor, ("weight",))
            if self.norms:
                norms = run.state["norms"].get(name, {})
                _fade_units(run, norms, chosen[name], factor, ("weight", "bias"))
        return chosen

    def _remove(self, run: Run) -> None:
        """Zero the weakest units for good and take out those that can leave."""
        chosen = self._multiply(run, 1.0, 0.0)
        run.state["removed"] = True
        if self.unit == "filter":
            groups = [g for g in subjects(run, self.only, self.exclude) if g.name in chosen]
            gone = {group.name: chosen[group.name].tolist() for group in groups}
            cut(run, edits_of(run.model, groups, gone))


def ramp_at(epoch: int, epochs: float, ramp: float) -> float:
    """Return the part of the rate that fades after an epoch (P_t / P)."""
    if not ramp or epoch >= FULL_FROM * epochs:
        return 1.0
    return 1 - math.exp(-math.log(4) * epoch / (ramp * epochs))


def alpha_at(
    epoch: int, epochs: float, alpha: float, sigma: float, decay: Decay, zero_from: float
) -> float:
    """Return the factor by which filters fade after an epoch (alpha_t)."""
    if epoch >= zero_from * epochs:
        return 0.0
    if decay == "exponential" and alpha:
        alpha *= math.exp(math.log(sigma / (alpha + 0.01 * sigma)) * epoch / epochs)
    elif decay == "linear":
        alpha *= max(0.0, 1 - epoch / max(1.0, epochs - 1))
    return min(alpha, 1.0) if alpha >= VANISHED else 0.0


def _others(
    run: Run, own: set[str], only: tuple[str, ...], exclude: tuple[str, ...]
) -> dict[str, dict[str, Tensor]]:
    """The filters of convolutions that cannot leave: each of them for itself."""
    chosen, _ = readable(run.model, only=only, exclude=exclude)
    return {
        f"{name} alone": {name: torch.arange(len(layer.weight))[:, None]}
        for name, layer in chosen.items()
        if name not in own and layer.weight.dim() > 2
    }


def _fade_units(
    run: Run,
    filters: Mapping[str, Tensor],
    units: Tensor,
    factor: float,
    names: tuple[str, ...],
) -> None:
    for layer, rows in filters.items():
        for name in names:
            tensor = getattr(run.model.get_submodule(layer), name)
            if tensor is not None:
                fade(tensor, rows[units.to(rows.device)], factor)
