"""By how much the loss rises without a unit: each is zeroed in turn, and the rest runs again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pliant.cost import Example, call, twin
from pliant.data import batch_of
from pliant.data.sources import moved
from pliant.edits.sides import CONVS
from pliant.families.prune.gates import Gates
from pliant.families.prune.ranking import Scope, Unit, ranking
from pliant.families.prune.scores import Groups, Scores
from pliant.observe.watch import samples

LARGE = 1e300  # behind all that may leave


class Replay:
    """Runs a network again from some layer on: what comes before gives what it gave.

    A block that is over by then is not entered: it gives at once what it gave.

    Args:
        model: a copy to be thrown away; the forward of its modules is replaced.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.kept: dict[str, Tensor] = {}
        self._begun: dict[str, int] = {}  # how many layers were called before the first call
        self._over: dict[str, int] = {}  # and until the last call was over
        self._calls, self._first = 0, -1
        for name, module in model.named_modules():
            inner = not any(True for _ in module.children())
            module.forward = self._forward(name, module.forward, inner=inner)

    def run(self, example: Example) -> Any:
        """Run all of it, and keep what modules gave that were called once."""
        self.kept, self._begun, self._over = {}, {}, {}
        self._calls, self._first = 0, -1
        return call(self.model, example)

    def again(self, example: Example, layers: Iterable[str]) -> Any:
        """Run what comes from the first of some layers on; the input is that of before."""
        self._first = min((self._begun.get(name, 0) for name in layers), default=0)
        return call(self.model, example)

    def _forward(
        self, name: str, compute: Callable[..., Any], *, inner: bool
    ) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._first >= 0:
                early = self._over.get(name, math.inf) <= self._first
                known = self.kept.get(name) if early else None
                return compute(*args, **kwargs) if known is None else known.clone()
            again = name in self._begun
            self._begun.setdefault(name, self._calls)
            output = compute(*args, **kwargs)
            self._calls += inner
            self._over[name] = self._calls
            if isinstance(output, Tensor) and not again:
                self.kept[name] = output.clone()  # others may work in place
            else:
                self.kept.pop(name, None)
            return output

        return forward


@torch.no_grad()
def increases(
    model: nn.Module,
    groups: Groups,
    batches: Iterable[tuple[Example, Any]],
    loss: Callable[[Any, Any], Tensor],
    gone: Sequence[Unit] = (),
) -> dict[str, Tensor]:
    """Return by how much the loss rises without each unit, (units,) float64 by group.

    Nothing reads the unit then, in eval mode, and batch norms stay as they are. It takes a forward
    pass for every unit and batch, from the first layer on that reads it. Where the loss falls the
    number is negative; for units that have left already it is 0.

    Args:
        model: not touched.
        groups: of channels.
        batches: inputs of forward calls, and labels.
        loss: the mean loss of a batch, from its output and the batch.
        gone: units that nothing reads in any case.
    """
    model = twin(model).eval()
    replay = Replay(model)
    gates = Gates(model, groups)
    values = gates.split(gates.values)  # views: what is set in them holds for the gates
    for unit in gone:
        values[unit.group][unit.index] = 0
    totals = {name: torch.zeros(size).double() for name, size in gates.sizes.items()}
    count = 0
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for inputs, given in batches:
        batch = batch_of(inputs, moved(given, device))
        base = float(loss(replay.run(inputs), batch))
        size = samples(inputs)
        for group in groups:
            readers = [layer for layer, side in group.slots if side == "in"]
            for unit in values[group.name].nonzero().flatten().tolist():
                values[group.name][unit] = 0
                risen = float(loss(replay.again(inputs, readers), batch))
                values[group.name][unit] = 1
                totals[group.name][unit] += size * (risen - base)
        count += size
    return {name: total / max(1, count) for name, total in totals.items()}


def by_increase(
    scores: Scores,
    gone: Sequence[Unit],
    scope: Scope,
    floors: Mapping[str, int],
    most: float | None = None,
) -> list[Unit]:
    """Rank units by how much the loss rises without them.

    Args:
        scores: see `increases`; changed in place.
        gone: units that come first, in their order.
        scope: of the comparison.
        floors: how many units of each group stay in any case.
        most: rise from which a unit stays.
    """
    if most is not None:
        for values in scores.values():
            values[values > most] = torch.inf
    low = min(float(values.min()) for values in scores.values())
    for place, unit in enumerate(gone):
        scores[unit.group][unit.index] = low - len(gone) + place
    kept = {name: int(values.isposinf().sum()) for name, values in scores.items()}
    least = {name: max(floor, kept[name]) for name, floor in floors.items()}
    finite = {name: v.where(~v.isposinf(), LARGE) for name, v in scores.items()}
    return ranking(finite, scope, least)


def convolves(layer: Any) -> bool:
    """Say whether a layer is a convolution that does more than shrink a shortcut."""
    pointwise = isinstance(layer, CONVS) and {*layer.kernel_size} == {1} != {*layer.stride}
    return isinstance(layer, CONVS) and layer.groups == 1 and not pointwise
