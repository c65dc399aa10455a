"""Which layers of a network can be packed, in the order of their calls, and why others cannot."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from pliant.cost import Example, call
from pliant.data.task import parameters
from pliant.edits.quantize import unpackable
from pliant.nn import kinds
from pliant.nn.layers import KERNELS
from pliant.nn.several import looks_up, weights_of
from pliant.observe.readers import readers
from pliant.observe.watch import capture
from pliant.surgery.select import UNCALLED, check_names, matches

SAME = 1e-4  # of the largest output: a subclass that changes nothing stays far below


@dataclass
class Layers:
    """The layers of a network that can be packed, in the order of their first calls.

    Args:
        single: those with one weight.
        several: those with several weights.
        tied: for layers that share the weight of one before them: which one.
        reasons: for every other module with parameters, why it stays.
        called: those with one weight that a forward pass calls, in order.
    """

    single: dict[str, Any] = field(default_factory=dict)
    several: dict[str, Any] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    called: tuple[str, ...] = ()

    @property
    def reading(self) -> list[str]:
        """Those whose input can be rounded: all with one weight but tables, in order."""
        return [n for n in self.called if kinds.kind_of(self.single[n]) not in kinds.TABLE]


def packable(
    model: nn.Module,
    example: Example,
    batches: Iterable[Example] = (),
    *,
    only: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Layers:
    """Split the layers with weights into those that can be packed, and the rest with reasons.

    A class derived from one that is known is taken if one forward pass shows that it computes the
    same. Layers with tied weights are packed if all of them are.

    Args:
        model: any module; it stays as it is.
        example: inputs of one forward call.
        batches: more inputs, looked at as far as needed: experts may see no token of the example.
        only: shell patterns of layer names to consider; none means all.
        exclude: shell patterns of layer names to leave alone.

    Raises:
        MethodError: a pattern matches no layer.
    """
    named = {n: m for n, m in model.named_modules() if _weighted(model, n, m)}
    check_names(named, (*only, *exclude))
    found, chosen = Layers(), {}
    for name, module in named.items():
        if only and not matches(name, only):
            found.reasons[name] = "not selected"
        elif matches(name, exclude):
            found.reasons[name] = "excluded by name"
        elif not weights_of(module) and (reason := unpackable(model, name)):
            found.reasons[name] = reason
        else:
            chosen[name] = module
    calls = _called(model, itertools.chain([example], batches), chosen)
    for name in [name for name in chosen if calls.get(name) and not weights_of(chosen[name])]:
        found.reasons[name] = calls[name]
        del chosen[name]
    many = {n for n, m in chosen.items() if weights_of(m) and (calls.get(n) or not looks_up(m))}
    _tie(model, chosen, calls.keys() | readers(model, example).keys(), found, many)
    places = {name: place for place, name in enumerate(calls)}
    for name in sorted(chosen, key=lambda name: places.get(name, -1)):
        (found.several if name in many else found.single)[name] = chosen[name]
    found.called = tuple(name for name in calls if name in found.single)
    _others(model, named, found)
    return found


def _others(model: nn.Module, named: Mapping[str, nn.Module], found: Layers) -> None:
    """Say of every module that holds parameters and is no known layer why it stays."""
    for name, module in model.named_modules():
        own = [p for p in module._parameters.values() if p is not None]
        part = isinstance(module, ParametrizationList) or name.rpartition(".")[0] in found.several
        if own and name not in named and not part:
            wide = any(p.dim() > 1 for p in own)
            found.reasons[name] = (
                f"its class {type(module).__name__} uses tensors of its own in a way of its own"
                if wide
                else "it holds no matrix: there is nothing to pack"
            )


def _weighted(model: nn.Module, name: str, module: nn.Module) -> bool:
    """Say whether a module is a layer that is known to have a weight, and no part of another."""
    known = isinstance(module, (*KERNELS, nn.RNNCellBase, nn.EmbeddingBag))
    if not known and kinds.kind_of(module) is None and not (name and weights_of(module)):
        return False
    around = model.get_submodule(name.rpartition(".")[0]) if name else None
    return not (isinstance(around, nn.MultiheadAttention) and weights_of(around))


def _called(
    model: nn.Module, batches: Iterable[Example], layers: Mapping[str, Any]
) -> dict[str, str]:
    """Name the layers in the order of their first calls, each with what speaks against it."""
    found: dict[str, str] = {}
    order: list[str] = []
    seen: list[str] = []

    def see(name: str, given: Any, output: Any) -> None:
        layer = layers[name]
        reason = ""
        single = looks_up(layer) or not weights_of(layer)
        if single and type(layer) is not kinds.kind_of(layer):
            reason = _differs(layer, given, output)
        found[name] = found.get(name) or reason
        seen.append(name)

    for inputs in batches:
        with capture(model, layers, see):
            call(model, inputs)
        _insert(order, seen)
        seen.clear()
        if len(order) == len(layers):
            break
    return {name: found[name] for name in order}


def _insert(order: list[str], seen: Sequence[str]) -> None:
    """Put names that were seen for the first time behind those that were seen before them."""
    place = 0
    for name in dict.fromkeys(seen):
        if name not in order:
            order.insert(place, name)
        place = order.index(name) + 1


def _differs(layer: Any, given: Any, output: Any) -> str:
    """Say that a subclass computes something of its own; nothing where it does not."""
    kind: Any = kinds.kind_of(layer)
    if len(parameters(type(layer).forward)) > len(parameters(kind.forward)):
        return f"its class {type(layer).__name__} is called with more than {kind.__name__} is"
    try:
        plain = kinds.applied(layer, given, layer.weight, getattr(layer, "bias", None))
        same = isinstance(output, Tensor) and plain.shape == output.shape
        most = SAME * float(plain.abs().max())
        if same and torch.allclose(plain, output, rtol=0, atol=most):
            return ""
    except Exception:  # whatever it reads, the plain operation cannot
        pass
    return f"its class {type(layer).__name__} computes something else than {kind.__name__} does"


def _tie(
    model: nn.Module, chosen: dict[str, Any], used: Set[str], found: Layers, many: set[str]
) -> None:
    """Find out which layers hold one weight, and drop those of which not all can be packed.

    A layer that is never called is packed only if its weight is used by another one, or read by
    the module around it.
    """
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for own in module._parameters.values():
            if own is not None:
                owners.setdefault(id(own), []).append(name)
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    for name, module in list(chosen.items()):
        weights = list(weights_of(module).values()) or [module.weight]
        owning = {other for weight in weights for other in owners[id(weight)]} - {name}
        others = {other for other in owning if not other.startswith(f"{name}.")}
        if not used & {name, *others}:
            found.reasons[name] = UNCALLED
            continue
        if not others:
            continue
        if reason := _apart(chosen, name, others, many):
            found.reasons[name] = reason
            continue
        first = min((name, *others), key=order.__getitem__)
        if name != first:
            found.tied[name] = first
    for name in found.reasons:
        chosen.pop(name, None)


def _apart(chosen: Mapping[str, Any], name: str, others: set[str], many: set[str]) -> str:
    """Say why a layer cannot share its packed weight with those that it is tied to."""
    for other in sorted(others):
        if other not in chosen:
            return (
                f"its weight is tied to {other or 'a parameter of the model'}, which is not packed"
            )
        if {name, other} & many or not _alike(chosen[name], chosen[other]):
            return f"its weight is tied to {other}, which reads it in another way"
    return ""


def _alike(one: Any, other: Any) -> bool:
    """Say whether two layers have the same rows: a table and a Linear do."""
    rows, others = (kinds.to_rows(layer, layer.weight) for layer in (one, other))
    return rows.shape == others.shape and rows.stride() == others.stride()
