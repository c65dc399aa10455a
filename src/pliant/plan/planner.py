"""Plans for one network and one budget: what is allowed, what it costs now, what fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import nn

from pliant.budget import Budget, Limits, Option, shown
from pliant.cost import Cost, Example, LayerCost, count
from pliant.edits import Edit
from pliant.latency.clock import Clock
from pliant.observe.readers import readers
from pliant.plan.allocate import allocate

Rule = Literal["max", "sum"]


@dataclass
class Planner:
    """Spends the budget of a run, and says what the network costs as it is.

    Args:
        model: the network, as it is now.
        example: inputs of one forward call, for counting.
        budget: what the result may cost, or None.
        dense: the cost of the dense network, to which fractions of a budget refer.
        layers: the dense cost of every layer.
        edits: what has been done to the model.
        clock: measures on the target, or None where none was named.
        counted: what the network cost when it was last counted, by the shapes it had then.
        read: which weights other modules read, by the shapes too.
    """

    model: nn.Module
    example: Example
    budget: Budget | None
    dense: Cost
    layers: dict[str, LayerCost]
    edits: list[Edit] = field(default_factory=list)
    clock: Clock | None = None
    counted: dict[int, tuple[Cost, dict[str, LayerCost]]] = field(default_factory=dict)
    read: dict[int, dict[str, str]] = field(default_factory=dict)

    def now(self) -> Cost:
        """Return what the network costs now, milliseconds left out."""
        return self._count()[0]

    def rows(self) -> dict[str, LayerCost]:
        """Return what every layer costs now."""
        return dict(self._count()[1])

    def readers(self) -> dict[str, str]:
        """Return the layers whose weight another module reads: see `pliant.observe.readers`."""
        shapes = _shapes(self.model)
        if shapes not in self.read:
            self.read.clear()
            self.read[shapes] = readers(self.model, self.example)
        return self.read[shapes]

    def limits(self) -> dict[str, float]:
        """Return the budget in absolute numbers for the whole network; empty without one."""
        return self.budget.limits(self.dense) if self.budget else {}

    def allocate(
        self, options: Mapping[str, Sequence[Option]], *, rule: Rule = "max"
    ) -> list[Edit]:
        """Spend the budget over layers with options, all others staying as they are now.

        Raises:
            BudgetError: the budget cannot be met; the message names what is reachable.
        """
        return self.settle(lambda limits: self._within(options, limits, rule))

    def settle(self, make: Callable[[Limits], list[Edit]]) -> list[Edit]:
        """Plan edits for the budget; with a latency in it the plan is measured before it is made.

        Args:
            make: gives edits for limits, from options that `priced` has put milliseconds into.

        Raises:
            BudgetError: the budget cannot be met; the message names what is reachable.
        """
        limits = self.limits()
        if self.clock is None or "latency" not in limits:
            return make(limits)
        return self.clock.settle(self.model, self.rows(), limits, make)

    def check(self, options: Mapping[str, Sequence[Option]]) -> None:
        """Raise a BudgetError if no choice among the options meets the budget; build nothing."""
        self._within(options, self.limits(), "max")

    def priced(
        self, options: Mapping[str, Sequence[Option]]
    ) -> tuple[Mapping[str, Sequence[Option]], Cost]:
        """Return options with what the budget asks for, and the cost of everything else.

        Where the budget bounds latency, the options get milliseconds, and those that are not
        measured faster than their layer are left out.
        """
        now, rows = self._count()
        fixed = now.without(rows[layer] for layer in options)
        if self.clock is None or "latency" not in self.limits():
            return options, fixed
        options, rest = self.clock.priced(self.model, options, rows, edited=bool(self.edits))
        return options, replace(fixed, latency_ms=rest)

    def measured(self) -> Cost:
        """Return what the network costs now; milliseconds, where there is a clock, are final."""
        if self.clock is None:
            return self.now()
        return replace(self.now(), latency_ms=self.clock.sides(self.model)[1].median_ms)

    def misses(self, after: Cost) -> list[str]:
        """Say which axes of the budget a cost exceeds, and by how much.

        A latency exceeds its bound when even the fast end of its spread does.
        """
        slack = {}
        if self.clock is not None and self.clock.final is not None:
            slack["latency"] = after.latency - self.clock.least(self.model)
        return [
            f"{axis} is {shown(axis, getattr(after, axis))} where {shown(axis, bound)} was allowed"
            for axis, bound in self.limits().items()
            if getattr(after, axis) - slack.get(axis, 0.0) > bound
        ]

    def _within(
        self, options: Mapping[str, Sequence[Option]], limits: Limits, rule: Rule
    ) -> list[Edit]:
        priced, fixed = self.priced(options)
        return allocate(priced, limits, fixed=fixed, rule=rule)

    def _count(self) -> tuple[Cost, dict[str, LayerCost]]:
        """Count anew when a shape has changed: a forward pass that is needed only then."""
        shapes = _shapes(self.model)
        if shapes not in self.counted:
            self.counted.clear()
            self.counted[shapes] = count(self.model, self.example)
        return self.counted[shapes]


def _shapes(model: nn.Module) -> int:
    """Sum up all that decides what a network costs: its modules, the shapes it holds, its ties."""
    modules = tuple((name, type(module)) for name, module in model.named_modules())
    parameters = model.named_parameters(remove_duplicate=False)
    tensors = [*parameters, *model.named_buffers(remove_duplicate=False)]
    known: dict[int, int] = {}  # each tensor by the place where it came first
    rows = [
        (name, tuple(t.shape), t.dtype, known.setdefault(id(t), len(known))) for name, t in tensors
    ]
    return hash((modules, tuple(rows)))
