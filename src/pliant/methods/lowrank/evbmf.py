"""EVBMF ranks: variational Bayes estimates, from each unfolding, how much is not noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pliant.budget import Limits, Option
from pliant.cost import LayerCost, layer_costs
from pliant.edits import Factor
from pliant.errors import BudgetError
from pliant.families.lowrank.factorize import check_reachable, factorize, subjects
from pliant.math.forms import max_ranks
from pliant.math.rank import evbmf_rank
from pliant.math.svd import unfold
from pliant.method import Method
from pliant.nn.layers import Factorizable
from pliant.observe.spectra import spectra
from pliant.registry import Paper, register
from pliant.run import Run

STEPS = 200  # of the scale that weakens or tightens the estimate towards a budget


@register(
    "evbmf",
    paper=Paper(
        "Compression of Deep Convolutional Neural Networks for Fast and Low Power Mobile "
        "Applications",
        "Y.-D. Kim, E. Park, S. Yoo, T. Choi, L. Yang, D. Shin",
        "ICLR",
        2016,
        "https://arxiv.org/abs/1511.06530",
    ),
    saves="params macs bytes latency",
)
@dataclass(frozen=True)
class EVBMF(Method):
    """Factorizes by Tucker-2 at the ranks that empirical variational Bayes finds, layer by layer.

    Ranks are the analytic solution of Nakajima et al. (JMLR 2013). With a budget all of them are
    weakened towards full rank, or tightened towards one, by the same share (the "weakening
    factor" that users of the method set by hand).

    *Departs from the paper*: Linear layers and 1x1 convolutions use one rank, that of the matrix.

    >>> EVBMF(exclude=("conv1",)).exclude
    ('conv1',)
    """

    only: tuple[str, ...] = ()  # name patterns of the layers to consider
    exclude: tuple[str, ...] = ()  # name patterns of the layers to leave alone

    def refuse(self, run: Run) -> None:
        """Refuse a budget that is out of reach."""
        check_reachable(run, only=self.only, exclude=self.exclude)

    def prepare(self, run: Run) -> None:
        """Factorize at once."""
        layers = subjects(run, self.only, self.exclude)
        estimates = {name: _estimate(module) for name, module in layers.items()}
        run.note(evbmf={name: list(ranks) for name, ranks in estimates.items()})
        costs = layer_costs(run.model, run.example)
        factorize(run, _scaled(run, layers, costs, estimates), layers, {})


def _estimate(module: Factorizable) -> tuple[int, ...]:
    """Ranks in the order of the form: (in, out) for Tucker-2, one for a matrix."""
    weight = module.weight.detach()
    found = [
        max(1, evbmf_rank(sigma, tuple(unfold(weight, mode).shape)))
        for mode, sigma in zip((1, 0), spectra(weight).values(), strict=True)
    ]
    return (found[1],) if _form(module) == "svd" else tuple(found)


def _form(module: Factorizable) -> str:
    return "svd" if module.weight[0, 0].numel() == 1 else "tucker2"


def _scaled(
    run: Run,
    layers: Mapping[str, Factorizable],
    costs: Mapping[str, LayerCost],
    estimates: Mapping[str, tuple[int, ...]],
) -> list[Factor]:
    """The estimate itself, or the highest scale of it that fits the budget."""
    if not run.limits():
        return _at(0.0, layers, costs, estimates)

    def best(limits: Limits) -> list[Factor]:
        low, high = 0, STEPS
        while low < high:
            middle = (low + high + 1) // 2
            edits, fits = _tried(run, _at(2 * middle / STEPS - 1, layers, costs, estimates), limits)
            low, high = (middle, high) if fits else (low, middle - 1)
        edits, fits = _tried(run, _at(2 * low / STEPS - 1, layers, costs, estimates), limits)
        if not fits:
            raise BudgetError(
                "The budget cannot be met by factorizing at rank one: ask for more, or let the "
                "method touch more layers."
            )
        return edits

    return run.planner.settle(best)  # type: ignore[arg-type,return-value]


def _at(
    scale: float,
    layers: Mapping[str, Factorizable],
    costs: Mapping[str, LayerCost],
    estimates: Mapping[str, tuple[int, ...]],
) -> list[Factor]:
    """Ranks between one (scale -1), the estimate (0) and full (1); only where it is smaller."""
    edits = []
    for name, module in layers.items():
        form = _form(module)
        most = max_ranks(module.weight.shape, form)
        ranks = tuple(
            round(rank + scale * (top - rank)) if scale > 0 else max(1, round(rank * (1 + scale)))
            for rank, top in zip(estimates[name], most, strict=True)
        )
        edit = Factor(name, form, ranks)
        if edit.predict(costs[name]).params < costs[name].params:
            edits.append(edit)
    return edits


def _tried(run: Run, edits: list[Factor], limits: Limits) -> tuple[list[Factor], bool]:
    """The edits that are worth it on the target, if there is one, and whether they fit."""
    costs = layer_costs(run.model, run.example)
    options = {
        edit.layer: [
            Option(0.0, costs[edit.layer]),
            Option(1.0, edit.predict(costs[edit.layer]), edit),
        ]
        for edit in edits
    }
    priced, fixed = run.planner.priced(options)
    taken = [rows[-1] for rows in priced.values()]
    fits = all(
        getattr(fixed, axis) + sum(getattr(row.cost, axis) for row in taken) <= bound
        for axis, bound in limits.items()
    )
    return [row.edit for row in taken if row.edit is not None], fits
