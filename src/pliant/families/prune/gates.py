"""Gates on channels: a number for every unit, by which all that layers read of it is multiplied."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pliant.cost import evaluating
from pliant.families.prune.scores import Groups
from pliant.observe.gradients import differentiated
from pliant.observe.watch import with_first

T = TypeVar("T")


class Gates:
    """Multiplies what layers read of units, and notes what the loss makes of it, sample by sample.

    At zero a gate does what leaving will do: nothing reads the unit. Each forward pass has gates
    of its own for every sample, as leaves of its graph, so their gradients say what a unit means
    to one sample, over all layers and positions that read it.

    Args:
        model: has the hooks until `remove`.
        groups: of channels.
        behind: for some groups by name a module: all that it gives is multiplied, channel by
            channel, instead of what layers read.

    >>> from pliant.surgery.prove import cuttable
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> gates = Gates(net, cuttable(net, (torch.ones(1, 2),))[0])
    >>> gates.values.zero_()
    tensor([0., 0., 0.])
    >>> bool(net(torch.ones(1, 2)) == net[2].bias)
    True
    """

    def __init__(
        self, model: nn.Module, groups: Groups, behind: Mapping[str, str] | None = None
    ) -> None:
        self.groups = list(groups)
        self.sizes = {group.name: len(group.units) for group in groups}
        self.values = torch.ones(sum(self.sizes.values()))
        self._passes: list[dict[int, Tensor]] = []
        # Not a bound method, which a copy of the network would copy with its gates.
        self._handles = [model.register_forward_pre_hook(lambda model, args: self._begin())]
        places, blocks = _places(model, self.groups, behind or {})
        for layer, at in places.items():
            module = model.get_submodule(layer)
            gate = module.register_forward_pre_hook(self._gate(at), with_kwargs=True)
            self._handles.append(gate)
        for block, at in blocks.items():
            module = model.get_submodule(block)
            self._handles.append(module.register_forward_hook(self._gate_behind(at)))

    def split(self, values: Tensor) -> dict[str, Tensor]:
        """Divide numbers of all units among the groups, by their names."""
        return dict(zip(self.sizes, values.split(list(self.sizes.values())), strict=True))

    def take(self) -> list[Tensor]:
        """Return gate times gradient of all backward passes since the last call.

        Each (samples, units): to first order what the loss loses without a unit. Where layers
        read their inputs in other rows than samples, such as tokens, these come as one more.
        """
        leaves = [leaf for leaves in self._passes for leaf in leaves.values()]
        self._passes = []
        seen = [leaf.detach() * leaf.grad for leaf in leaves if leaf.grad is not None]
        return [effect[:, :-1].cpu() for effect in seen]

    def remove(self) -> None:
        """Take the hooks out of the network."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._passes = [], []

    def _begin(self) -> None:
        self._now: dict[int, Tensor] = {}
        self._wanted = torch.is_grad_enabled()
        if self._wanted:
            self._passes.append(self._now)

    def _gate(self, places: Tensor) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            last = isinstance(module, nn.Linear)
            return with_first(
                args, kwargs, lambda x: self._gated(x, x.dim() - 1 if last else 1, places)
            )

        return hook

    def _gate_behind(self, places: Tensor) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        return lambda module, args, output: self._gated(output, 1, places)

    def _gated(self, given: Tensor, axis: int, places: Tensor) -> Tensor:
        if not self._wanted and self._open(places):
            return given
        factors = self._leaf(len(given), given.device)[:, places.to(given.device)]
        shape = [size if dim in (0, axis) else 1 for dim, size in enumerate(given.shape)]
        return given * factors.to(given.dtype).view(shape)

    def _open(self, places: Tensor) -> bool:
        """Say whether gates are all one, which changes nothing; the last place always is."""
        used = places[places < len(self.values)]
        return bool((self.values[used] == 1).all())

    def _leaf(self, count: int, device: torch.device) -> Tensor:
        """The gates of one forward pass, a row for each sample; the last column is always one."""
        if count not in self._now:
            row = torch.cat([self.values, torch.ones(1)]).to(device)
            self._now[count] = row.expand(count, -1).clone().requires_grad_(self._wanted)
        return self._now[count]


def effects(
    model: nn.Module, gates: Gates, batches: Iterable[T], loss: Callable[[T], Tensor]
) -> Iterator[list[Tensor]]:
    """Yield for each batch what `Gates.take` returns, of the network as it is, in eval mode.

    Args:
        model: has the gates, which are taken out at the end.
        gates: of its units.
        batches: of any kind.
        loss: runs the network on one of them and gives its loss.
    """
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        for batch in batches:
            with evaluating(model), torch.enable_grad():
                given = loss(batch)
                with differentiated(model):
                    given.backward()
            yield gates.take()
    finally:
        gates.remove()
        for parameter in learning:
            parameter.requires_grad_(True)


def _places(
    model: nn.Module, groups: Groups, behind: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Say which gate each channel has: of what layers read, and of what blocks give."""
    found, given = dict[str, Tensor](), dict[str, Tensor]()
    total, first = sum(len(group.units) for group in groups), 0
    for group in groups:
        if group.name in behind:
            given[behind[group.name]] = torch.arange(first, first + len(group.units))
        for slot in group.slots if group.name not in behind else ():
            if slot[1] == "in":
                module: Any = model.get_submodule(slot[0])
                size = module.in_features if isinstance(module, nn.Linear) else module.in_channels
                places = found.setdefault(slot[0], torch.full((size,), total))
                rows = group.rows(slot)
                places[rows] = torch.arange(first, first + len(rows))[:, None]
        first += len(group.units)
    return found, given
