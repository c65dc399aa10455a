"""What a network costs: parameters, multiply-accumulates and bytes, layer by layer.

One multiply-accumulate (MAC) is one product added to a sum, as the field counts them: half of
what `torch.utils.flop_counter` calls flops. Convolutions, linear layers, attention and recurrent
layers have MACs. Normalisation, activation, pooling, dropout, reshaping and embedding look-ups
are *known* to be zero. Biases count as parameters and not as MACs. Products outside of these layers
(attention written by hand, a weight that its parent reads, a class of one's own) are counted as
they run. Operators that are not PyTorch's own cannot be counted: `Cost.uncounted` names the layers
where they run, so that nobody takes a number that is missing for 0.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from pliant.cost.call import (
    Example,
    as_example,
    bare,
    call,
    call_alike,
    device_of,
    evaluating,
    fitted,
    mapped,
    tensors,
)
from pliant.cost.macs import OWN, Formula, formula_of, is_packed, products
from pliant.cost.owned import FLOAT, itemsize, numbers, own, stored_bytes, subtree
from pliant.cost.refused import check_model, check_open
from pliant.cost.sample import Samples, counted, one_sample, repeated, samples_of
from pliant.cost.twin import twin
from pliant.errors import ModelError
from pliant.math.alone import forked

__all__ = [
    "Cost",
    "Example",
    "LayerCost",
    "Samples",
    "as_example",
    "bare",
    "call",
    "call_alike",
    "check_model",
    "cost",
    "count",
    "counted",
    "device_of",
    "evaluating",
    "fitted",
    "layer_costs",
    "mapped",
    "module_cost",
    "one_sample",
    "repeated",
    "samples_of",
    "tensors",
    "twin",
]


@dataclass(frozen=True)
class LayerCost:
    """What one layer costs for one sample.

    Attributes:
        kind: name of the layer's class, parametrizations taken off.
        params: numbers in its parameters, frozen and packed ones included.
        macs: multiply-accumulates for one sample, all calls together.
        bytes: its parameters and saved buffers at their own dtype.
        weight: shape of its weight, () if it has none or several.
        input: shape of the first input without the batch axis.
        output: shape of the first output without the batch axis.
        calls: how often one forward pass calls it; 0 means never.
        latency: milliseconds of all calls on a target; 0 where nothing was measured.
        itemsize: bytes of one of its numbers, of the network's where it has none.
        parts: of a block, its children by name; only `module_cost` knows them.
    """

    kind: str
    params: int
    macs: int
    bytes: int
    weight: tuple[int, ...] = ()
    input: tuple[int, ...] = ()
    output: tuple[int, ...] = ()
    calls: int = 1
    latency: float = 0.0
    itemsize: int = FLOAT
    parts: tuple[tuple[str, "LayerCost"], ...] = ()


@dataclass(frozen=True)
class Cost:
    """What a whole network costs for one sample.

    Attributes:
        params: numbers in all parameters; a shared one counts once.
        macs: multiply-accumulates, those outside of layers included.
        bytes: parameters and saved buffers, what a state dict takes.
        latency_ms: milliseconds on a target, None where not measured.
        uncounted: modules that run operators whose multiply-accumulates are not known.
        sample: which part of the example was taken for one sample; "" where it has one row.
    """

    params: int
    macs: int
    bytes: int
    latency_ms: float | None = None
    uncounted: tuple[str, ...] = ()
    sample: str = field(default="", compare=False)

    @property
    def latency(self) -> float:
        """Milliseconds as a number to add to: 0 where nothing was measured."""
        return self.latency_ms or 0.0

    def without(self, layers: Iterable[LayerCost]) -> "Cost":
        """Return the counts of everything but these layers."""
        rows = list(layers)
        return Cost(
            params=self.params - sum(row.params for row in rows),
            macs=self.macs - sum(row.macs for row in rows),
            bytes=self.bytes - sum(row.bytes for row in rows),
        )


def cost(model: nn.Module, example: Example) -> Cost:
    """Measure parameters, multiply-accumulates and bytes of a network, on one sample.

    The model is run in eval mode without gradients on the first sample of `example`; its flags,
    statistics, hooks and the random state are left as they were. What a sample is, is asked of
    the model where the example has several rows: the first of the axis (or list) along which the
    model answers for a part as it does for all; `Cost.sample` says which. Where there is none, as
    for a graph, the example is one sample.

    Args:
        model: any module; it is called with one sample on its own device.
        example: the inputs of a forward call: a tuple, or a mapping of keyword arguments.

    Raises:
        ModelError: the model fails on the example, or has parameters without a shape.
    """
    return count(model, example)[0]


def count(model: nn.Module, example: Example) -> tuple[Cost, dict[str, LayerCost]]:
    """Measure a network and its layers in one forward pass: see `cost` and `layer_costs`."""
    layers, outside, uncounted = _measure(model, example)
    whole = Cost(
        params=numbers(model.modules()),
        macs=outside + sum(layer.macs for layer in layers.values()),
        bytes=stored_bytes(model.modules()),
        uncounted=uncounted,
        sample="" if (where := samples_of(model, example)) == Samples() else str(where),
    )
    return whole, layers


def layer_costs(model: nn.Module, example: Example) -> dict[str, LayerCost]:
    """Measure every layer that owns parameters, by module name, in order of definition.

    A layer called several times has the MACs of all its calls and its parameters once. A
    parameter shared by two layers is in the row of each; `cost` counts it once.

    Raises:
        ModelError: the model fails on the example, or has parameters without a shape.
    """
    return _measure(model, example)[0]


def module_cost(model: nn.Module, example: Example, name: str) -> LayerCost:
    """Measure any module with all that is in it: a layer, a block, a stage.

    Args:
        model: holds the module.
        example: the inputs of a forward call of the model.
        name: of the module; "" for the whole model.

    Raises:
        ModelError: the model fails on the example, or has no such module.
    """
    layers, watch = _watched(model, example)
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise ModelError(f"The model has no module {name!r}: see model.named_modules().") from None
    return _whole(model, name, module, _rows(layers, watch), watch)


@dataclass
class _Seen:
    """What one forward pass showed of a layer."""

    macs: int = 0
    calls: int = 0
    input: tuple[int, ...] = ()
    output: tuple[int, ...] = ()


@dataclass
class _Watch:
    """Hooks of one measurement: which module runs now, and what each layer did."""

    seen: dict[str, _Seen] = field(default_factory=dict)
    stack: list[str] = field(default_factory=list)
    inside: int = 0  # how many layers with a formula are running
    outside: Counter[str] = field(default_factory=Counter)  # products outside of such layers
    foreign: set[str] = field(default_factory=set)

    def enter(self, name: str, *, known: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            self.stack.append(name)
            self.inside += known

        return hook

    def leave(self, name: str, formula: Formula | None) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            self.stack.pop()
            self.inside -= formula is not None
            inputs, outputs = list(tensors((args, kwargs))), list(tensors(result))
            seen = self.seen.setdefault(name, _Seen())
            seen.calls += 1
            if inputs and outputs:
                seen.input, seen.output = tuple(inputs[0].shape[1:]), tuple(outputs[0].shape[1:])
                seen.macs += formula(module, inputs, outputs) if formula else 0

        return hook

    @property
    def here(self) -> str:
        """The module that runs now."""
        return self.stack[-1] if self.stack else ""


class _Operations(TorchDispatchMode):
    """Counts products that no layer with a formula accounts for."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # skipping it means importing it: two seconds for nothing

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if not self.watch.inside:
            self.watch.outside[self.watch.here] += products(func, args, kwargs or {}, output)
            if func.namespace not in OWN:
                self.watch.foreign.add(self.watch.here)
        return output


def _measure(
    model: nn.Module, example: Example
) -> tuple[dict[str, LayerCost], int, tuple[str, ...]]:
    """Costs of layers, products that belong to none of them, and where some are not known."""
    layers, watch = _watched(model, example)
    named = [name or type(model).__name__ for name, _ in _modules(model) if name in watch.foreign]
    outside = sum(macs for name, macs in watch.outside.items() if name not in layers)
    return _rows(layers, watch), outside, tuple(named)


def _watched(model: nn.Module, example: Example) -> tuple[dict[str, nn.Module], _Watch]:
    """Run a model, and see what each of its modules does."""
    check_open(model)
    layers = dict(_layers(model))
    watch = _Watch()
    with _measuring(model), ExitStack() as hooks:
        sample = one_sample(model, example)  # before there are hooks: it may run the network
        for name, module in _modules(model):
            formula = formula_of(module) if name in layers else None
            entered = watch.enter(name, known=formula is not None)
            enter = module.register_forward_pre_hook(entered)
            hooks.callback(enter.remove)
            leave = module.register_forward_hook(watch.leave(name, formula), with_kwargs=True)
            hooks.callback(leave.remove)
        with _Operations(watch):
            call(model, sample)
    return layers, watch


def _rows(layers: Mapping[str, nn.Module], watch: _Watch) -> dict[str, LayerCost]:
    return {
        name: _row(layer, watch.seen.get(name, _Seen()), watch.outside[name])
        for name, layer in layers.items()
    }


def _whole(
    model: nn.Module, name: str, module: nn.Module, rows: Mapping[str, LayerCost], watch: _Watch
) -> LayerCost:
    """The cost of a module with all that is in it, and of each of its children."""
    prefix = f"{name}." if name else ""
    inside = [path for path, _ in _modules(model) if path == name or path.startswith(prefix)]
    if inside == [name] and name in rows:
        return rows[name]
    seen, parts = watch.seen.get(name, _Seen()), list(module.modules())
    return LayerCost(
        kind=parametrize.type_before_parametrizations(module).__name__,
        params=numbers(parts),
        macs=sum(rows[p].macs if p in rows else watch.outside[p] for p in inside),
        bytes=stored_bytes(parts),
        input=seen.input,
        output=seen.output,
        calls=seen.calls,
        itemsize=itemsize([*parts, *model.modules()]),
        parts=tuple(
            (child, _whole(model, f"{prefix}{child}", part, rows, watch))
            for child, part in module.named_children()
        ),
    )


def _row(layer: nn.Module, seen: _Seen, products: int) -> LayerCost:
    owned, weight = list(subtree(layer)), getattr(layer, "weight", None)
    return LayerCost(
        kind=parametrize.type_before_parametrizations(layer).__name__,
        params=numbers(owned),
        macs=seen.macs + products,
        bytes=stored_bytes(owned),
        weight=tuple(weight.shape) if isinstance(weight, Tensor) else (),
        input=seen.input,
        output=seen.output,
        calls=seen.calls,
        itemsize=itemsize(owned),
    )


@contextmanager
def _measuring(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, no compiled code or fused attention that would skip the hooks."""
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    with forked(devices):
        fused = torch.backends.mha.get_fastpath_enabled()
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            with evaluating(model), torch.no_grad(), _uncompiled():
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)


def _uncompiled() -> AbstractContextManager[Any]:
    """Run compiled models as they are written; without the compiler loaded there are none."""
    loaded = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if loaded else nullcontext()


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that own parameters; what belongs to a parametrized or fused layer is inside it."""
    for name, module in _modules(model):
        if is_packed(module) or any(True for _ in own(subtree(module))):
            yield name, module


def _modules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules with their names, each once, not looking into parts of a layer."""
    hidden: set[int] = set()
    for name, part in module.named_modules():
        if id(part) in hidden:
            continue
        yield name, part
        hidden.update(id(inner) for inner in subtree(part) if inner is not part)
