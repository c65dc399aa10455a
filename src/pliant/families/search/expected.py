"""The expected cost of an architecture that is not chosen yet: linear in the shares of candidates.

Where all shares are 0 or 1 it is the cost of the derived network, to the last digit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pliant.cost import LayerCost, cost, layer_costs, twin
from pliant.errors import MethodError
from pliant.families.search.bilevel import choices
from pliant.latency import LatencyTable
from pliant.latency.table import input_shape
from pliant.nn.mobile import MobileNetwork
from pliant.run import Run

Axis = Literal["params", "macs", "latency"]
By = Literal["auto", "params", "macs", "latency"]


@dataclass(frozen=True)
class Expected:
    """What a network costs in the mean over its architectures.

    Args:
        fixed: cost of all that is not chosen.
        prices: for every layer that has candidates, what each costs, (candidates,).
    """

    fixed: float
    prices: dict[str, Tensor]

    def of(self, model: nn.Module) -> Tensor:
        """Return the expected cost, a number that can be differentiated by the logits."""
        parts = choices(model)
        total = torch.tensor(self.fixed, dtype=torch.float64)
        for name, prices in self.prices.items():
            shares = parts[name].probabilities()
            total = total.to(shares.device) + shares.double() @ prices.to(shares.device)
        return total

    def at(self, chosen: dict[str, str], model: nn.Module) -> float:
        """Return the cost of one architecture, given the name of every chosen candidate."""
        parts = choices(model)
        rows = (float(p[parts[name].names.index(chosen[name])]) for name, p in self.prices.items())
        return self.fixed + sum(rows)

    def plain(self) -> dict[str, Any]:
        """Return it as tensors and plain values, for the state of a run."""
        return {"fixed": self.fixed, "prices": dict(self.prices)}

    @classmethod
    def from_plain(cls, value: Any) -> Expected:
        """Read it from what `plain` returned."""
        return cls(value["fixed"], dict(value["prices"]))


def axis_of(run: Run, by: By) -> Axis:
    """Return what is counted: if nothing is said, milliseconds where a target was named."""
    if by == "auto":
        return "latency" if run.clock is not None else "macs"
    return by


def check_bottlenecks(run: Run, by: By, method: str, network: str) -> None:
    """Refuse what a search of inverted bottlenecks cannot work on.

    Args:
        run: about to begin.
        by: what is counted.
        method: whose name the refusal gives.
        network: of the zoo, to begin with.

    Raises:
        MethodError: the network has no such blocks, or milliseconds have no target.
    """
    if not isinstance(run.model, MobileNetwork):
        raise MethodError(
            f"{method} searches networks of inverted bottlenecks, not a "
            f"{type(run.model).__name__}: begin with pliant.zoo.build('{network}')."
        )
    check_clock(run, by, method)


def check_clock(run: Run, by: By, method: str) -> None:
    """Refuse to count milliseconds where no target was named.

    Raises:
        MethodError: there is none.
    """
    if by == "latency" and run.clock is None:
        raise MethodError(f"{method} counts milliseconds on a target, but none was named.")


def expect(run: Run, axis: Axis) -> Expected:
    """Price all candidates of a run's network, and all that is fixed.

    Milliseconds come from the table of the run's target, where equal layers share one
    measurement; what is fixed is then the sum of its layers.

    Args:
        run: begun, with all layers that have candidates in place.
        axis: what is counted.
    """
    table = None if run.clock is None else run.clock.table
    return expected(run.model, run.example, axis, table)


def expected(
    model: nn.Module, example: Any, axis: Axis, table: LatencyTable | None = None
) -> Expected:
    """Price all candidates of a network: see `expect`.

    Args:
        model: with layers that have candidates; it stays as it is.
        example: inputs of one forward call.
        axis: what is counted.
        table: of the target, for milliseconds.
    """
    rows, parts = layer_costs(model, example), choices(model)
    shapes = {name: rows[name].input for name in parts}
    plain = twin(model)
    prices, first = {}, {}
    for name, part in parts.items():
        layers = part.candidates()
        calls = 1 if axis == "params" else rows[name].calls
        found = [_price(layer, shapes[name], axis, table) for layer in layers.values()]
        prices[name] = calls * torch.tensor(found, dtype=torch.float64)
        first[name] = next(iter(layers.values()))
    for name, layer in first.items():
        holder, _, child = name.rpartition(".")
        setattr(plain.get_submodule(holder), child, twin(layer))
    if axis != "latency":
        whole = getattr(cost(plain, example), axis)
        return Expected(float(whole - sum(float(p[0]) for p in prices.values())), prices)
    return Expected(_fixed(plain, example, set(first), table), prices)


def _price(
    layer: nn.Module, shape: tuple[int, ...], axis: Axis, table: LatencyTable | None
) -> float:
    if axis == "latency":
        assert table is not None
        if isinstance(layer, nn.Identity):
            return 0.0
        return table.time(layer, (table.target.batch, *shape))
    like = next(iter(layer.parameters()), torch.empty(0)).detach()
    whole = cost(nn.Sequential(layer), (like.new_zeros(1, *shape),))
    return float(getattr(whole, axis))


def _fixed(plain: nn.Module, example: Any, chosen: set[str], table: LatencyTable | None) -> float:
    """The milliseconds of all layers that are not chosen."""
    assert table is not None
    total = 0.0
    for name, row in layer_costs(plain, example).items():
        if not any(f"{name}.".startswith(f"{part}.") for part in chosen) and row.calls:
            total += _called(plain.get_submodule(name), row, table)
    return total


def _called(layer: nn.Module, row: LayerCost, table: LatencyTable) -> float:
    return row.calls * table.time(layer, input_shape(layer, row, table.target.batch))
