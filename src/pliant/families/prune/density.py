"""How dense activations are: which share of what rectifiers give is not zero, unit by unit.

A forward pass is followed function by function, so that a rectifier counts at every place where
it is called, be it a module, one module called twice, or a function; before any pooling or
dropout behind it. Where layers meet in a sum, the rectifier behind the sum counts for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from pliant.cost import Example, call, evaluating, tensors
from pliant.edits.sides import sides
from pliant.errors import ModelError
from pliant.families.prune.scores import Groups
from pliant.run import Run
from pliant.surgery.graph import Group
from pliant.surgery.passes import slow_attention

BATCH = 64  # samples whose activations are held at once
F = nn.functional
RECTIFIERS = {
    *(torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.relu),
    *(F.relu6, F.hardtanh, F.threshold, torch.threshold),
}


@dataclass
class Density:
    """Counts of one group, as integers that no number of activations overflows.

    Args:
        nonzero: entries above zero of each unit, (units,) int64.
        entries: all entries of one unit.
    """

    nonzero: Tensor
    entries: int = 0

    @property
    def units(self) -> Tensor:
        """The density of each unit, (units,) float64."""
        return self.nonzero.double() / self.entries

    @property
    def mean(self) -> float:
        """The density of the group."""
        return int(self.nonzero.sum()) / (self.entries * len(self.nonzero))


@dataclass(eq=False)
class Meter(TorchFunctionMode):
    """Counts, inside a ``with`` block, what the rectifiers of a network give.

    Args:
        model: any module; its mode, train or eval, is the caller's affair.
        groups: of channels; those without a rectifier behind them are not in ``found``.
        found: the counts by the name of the group.
    """

    model: nn.Module
    groups: Groups
    found: dict[str, Density] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()
        self.sources = WeakIdKeyDictionary()  # from which layers a tensor comes directly
        self.handles: list[Any] = []

    def __enter__(self) -> Meter:
        """Begin to count."""
        for name, module in self.model.named_modules():
            if sides(module):
                self.handles.append(module.register_forward_hook(self._leaves(name)))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Take all hooks off again."""
        super().__exit__(*error)
        for handle in self.handles:
            handle.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function, and note from where what it gives comes."""
        kwargs = kwargs or {}
        sources = {
            name for given in tensors((args, kwargs)) for name in self.sources.get(given, ())
        }
        result = func(*args, **kwargs)
        if not sources or not isinstance(result, Tensor):
            return result
        if func in RECTIFIERS:
            self._count(sources, result)
        self.sources[result] = sources
        return result

    def _leaves(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                self.sources[output] = {name}

        return hook

    def _count(self, sources: set[str], output: Tensor) -> None:
        for group in self.groups:
            for layer, side in group.slots:
                module = self.model.get_submodule(layer)
                axis = -1 if isinstance(module, nn.Linear) else 1
                if side != "in" and layer in sources and output.dim() > 1:
                    times = output.shape[axis] / sides(module)[side]  # of a depthwise convolution
                    if times == 1:
                        self._add(group, group.rows((layer, side)), output.movedim(axis, 0))
                        break

    @torch.no_grad()
    def _add(self, group: Group, rows: Tensor, output: Tensor) -> None:
        positive = (output.flatten(1) > 0).sum(1).cpu()
        known = self.found.setdefault(group.name, Density(torch.zeros(len(rows)).long()))
        known.nonzero += positive[rows].sum(1)
        known.entries += output[0].numel() * rows.shape[1]


def densities(model: nn.Module, groups: Groups, batches: Iterable[Example]) -> dict[str, Density]:
    """Return the density of every group that a rectifier follows, in eval mode."""
    with evaluating(model), torch.no_grad(), slow_attention(), Meter(model, groups) as meter:
        for batch in batches:
            call(model, batch)
    return meter.found


def measured(run: Run, groups: Groups, samples: int) -> dict[str, Density]:
    """Return the densities of the groups that have a rectifier, and note that others stay."""
    found = densities(run.model, groups, run.inputs(samples, batch=BATCH))
    for group in groups:
        for layer, _ in group.makers if group.name not in found else ():
            run.keep(layer, "no rectifier (ReLU) makes its channels zero")
    return found


def need_rectifiers(found: Mapping[str, Density]) -> None:
    """Refuse a network in which no density was measured.

    Raises:
        ModelError: there is none.
    """
    if not found:
        raise ModelError(
            "The model has no rectifier (ReLU, ReLU6) behind channels that can leave, so none of "
            "its activations are exactly zero: take a method that looks at weights."
        )


def saturated(history: Iterable[list[float]], window: int, tolerance: float) -> bool:
    """Say whether the last value of every series is near the mean of the ``window`` before it."""
    return all(
        len(values) > window
        and abs(values[-1] - sum(values[-1 - window : -1]) / window) < tolerance
        for values in history
    )
