"""Calls a network: with an example as it takes it, on its own device, in eval mode."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from pliant.errors import ModelError, PliantError, must_be
from pliant.math.alone import forked

A_MODEL = "a torch.nn.Module (pliant.zoo.build makes one from a name)"
_WRAPPED = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "_FabricModule": "module",
}
"""Classes of wrappers, and where each keeps the network; by name, to load neither."""

_SHOWN = 6  # inputs whose shapes a refusal names

Example = tuple[Any, ...] | Mapping[str, Any]


def call(model: nn.Module, example: Example) -> Any:
    """Call a model with an example: a mapping as keyword arguments, a tuple as positions.

    Its tensors go to the device of the model, which may have moved since the example was made.
    They are copied, since a model may write into what it reads. How the model takes them is asked
    of its `forward`: see `fitted`.

    Raises:
        ModelError: the model fails on these inputs.
    """
    held = next(chain(model.parameters(), model.buffers()), None)
    device = None if held is None else held.device  # without tensors it reads any

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device, copy=True)

    given = mapped(move, fitted(model, example), lambda thing: _moved_copy(thing, device))
    try:
        return model(**given) if isinstance(given, Mapping) else model(*given)
    except PliantError:
        raise
    except Exception as error:  # a model may object in any way
        raise ModelError(
            f"{type(bare(model)).__name__} must take inputs of shape {shapes(given)}, but its "
            f"forward fails with {type(error).__name__}: {error}; {lacking(error)}check that model "
            "and data fit."
        ) from error


def call_alike(model: nn.Module, example: Example, seed: int = 0) -> Any:
    """Call a model so that what it draws at random is the same whenever and in whichever network.

    A network that masks at random is so compared with itself, and not with another mask. The
    caller's random states stay untouched.
    """
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    with forked(devices, seed):
        return call(model, example)


def shapes(inputs: Any) -> str:
    """Write down the shapes of a forward call's inputs, and the kind of what is no tensor."""
    named = isinstance(inputs, Mapping)
    values = inputs.items() if named else (("", value) for value in inputs)
    found = [
        (f"{name}=" if named else "") + (str(tuple(v.shape)) if isinstance(v, Tensor) else _kind(v))
        for name, v in values
    ]
    return ", ".join(found[:_SHOWN]) + (f" and {len(found) - _SHOWN} more" * (len(found) > _SHOWN))


def device_of(model: nn.Module) -> torch.device:
    """Say where a model's tensors are; on the CPU if it has none.

    Raises:
        ModelError: it is no network.
    """
    must_be(nn.Module, "The model", model, ModelError, A_MODEL)
    held = chain(model.parameters(), model.buffers())
    return next((tensor.device for tensor in held), torch.device("cpu"))


def lacking(error: Exception) -> str:
    """Say what to change, where that can be told from how a call failed; else nothing."""
    if "nference tensor" in str(error):
        return "it runs in torch.inference_mode: use torch.no_grad in forward instead; "
    if "more than 1 value per channel" in str(error):
        return "norms take a variance of several numbers: train on batches of two samples or more; "
    if not isinstance(error, TypeError):
        return ""
    if "required positional argument" in str(error):
        return (
            "a pair (a, b) is read as inputs and labels, so write two inputs of one call as "
            "((a, b),) or by name; "
        )
    if "positional argument" in str(error) and "given" in str(error):
        return (
            "of a tuple the last is read as labels and all before it as inputs, so leave out "
            "what is neither, and write several labels as (inputs, (labels, lengths)); "
        )
    return ""


def mapped(
    change: Callable[[Tensor], Tensor], value: Any, other: Callable[[Any], Any] | None = None
) -> Any:
    """Rebuild a nested value with every tensor changed; what holds tensors keeps its kind.

    Mappings, named tuples, lists, tuples, dataclasses and packed sequences are gone into.

    Args:
        change: of a tensor.
        value: what holds tensors.
        other: change of anything else, which stays as it is if this is not given.
    """
    if isinstance(value, Tensor):
        return change(value)
    parts = {name: mapped(change, part, other) for name, part in _parts(value).items()}
    if isinstance(value, PackedSequence):
        return PackedSequence(**{**parts, "batch_sizes": value.batch_sizes.clone()})
    if isinstance(value, dict):
        return _refilled(value, parts)
    if isinstance(value, Mapping):
        return _refilled(value, parts) if hasattr(value, "__setitem__") else parts
    if isinstance(value, list):
        return list(parts.values())
    if isinstance(value, tuple):
        return type(value)(**parts) if is_named(value) else tuple(parts.values())
    if is_dataclass(value) and not isinstance(value, type):
        return _with_fields(value, parts)
    return value if other is None else other(value)


def tensors(value: Any) -> Iterator[Tensor]:
    """Go through the tensors of a nested value, in order; of a packed sequence its data."""
    return _tensors(value, set())


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, PackedSequence):
        yield value.data
    elif parts := _parts(value):
        for part in parts.values():
            yield from _tensors(part, seen)
    elif id(value) not in seen and (parts := _inner(value)):
        seen.add(id(value))
        for part in parts.values():
            yield from _tensors(part, seen)


def is_named(value: Any) -> bool:
    """Say whether something is a named tuple; a packed sequence is a value of its own."""
    named = isinstance(value, tuple) and hasattr(value, "_fields")
    return named and not isinstance(value, PackedSequence)


def as_example(value: Any) -> Example:
    """Take what a user gives as the inputs of one call: one input alone is one position."""
    if isinstance(value, Mapping):
        return value
    whole = isinstance(value, PackedSequence) or not isinstance(value, list | tuple)
    return (value,) if whole else tuple(value)


def fitted(model: nn.Module, example: Example) -> Example:
    """Return an example as the `forward` of a model takes it.

    A mapping goes by name, and what `forward` has no name for is left out; where it has none of
    the names, the mapping is its one argument. A mapping, a dataclass or a tuple that stands alone
    is taken apart where `forward` cannot do with one argument.

    Args:
        model: whose signature is asked; one that takes anything gets the example as it is.
        example: a tuple, or a mapping.
    """
    values = tuple(example) if isinstance(example, tuple | list) else ()
    if len(values) > 1 or (values and isinstance(values[0], Tensor | PackedSequence)):
        return values  # at once: to ask for a signature takes as long as a small layer
    takes = _signature(model)
    if takes is None:
        return example
    if isinstance(example, Mapping):
        known = _known(takes, example)
        alone = not known and example and _binds(takes, example)
        return (example,) if alone else known
    words = "a tuple of inputs, or a mapping by name"
    must_be((tuple, list), "An example", example, ModelError, words)
    if not values:
        return values
    (inner,) = values
    if is_dataclass(inner):
        inner = _parts(inner)
    if isinstance(inner, Mapping):
        known = _known(takes, inner)
        return known if known and _binds(takes, **known) else values
    apart = isinstance(inner, list | tuple) and not _binds(takes, inner) and _binds(takes, *inner)
    return tuple(inner) if apart else values


def _known(takes: inspect.Signature, example: Mapping[str, Any]) -> Mapping[str, Any]:
    """Leave out what has no name in a signature, and text where any name is taken."""
    kinds = {name: parameter.kind for name, parameter in takes.parameters.items()}
    named = {name for name, kind in kinds.items() if kind in _BY_NAME}
    anything = inspect.Parameter.VAR_KEYWORD in kinds.values()
    kept = {
        name: value
        for name, value in example.items()
        if name in named or (anything and not _is_text(value))
    }
    return example if len(kept) == len(example) else kept


def _is_text(value: Any) -> bool:
    texts = isinstance(value, list | tuple) and all(isinstance(v, str | bytes) for v in value)
    return isinstance(value, str | bytes) or (texts and bool(value))


def _binds(takes: inspect.Signature, *args: Any, **kwargs: Any) -> bool:
    try:
        takes.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _signature(model: nn.Module) -> inspect.Signature | None:
    """Return what `forward` takes, looked up inside of wrappers; None where it cannot be told."""
    forward = getattr(model, "forward", None)
    if not callable(forward):
        return None
    try:
        takes = inspect.signature(forward)
    except (TypeError, ValueError):
        return None
    kinds = {parameter.kind for parameter in takes.parameters.values()}
    if kinds == {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
        inner = getattr(model, _inside(model) or "module", None)
        return _signature(inner) if isinstance(inner, nn.Module) else None
    return takes


def _kind(value: Any) -> str:
    """Name the kind of an input that is no tensor, with what it holds."""
    inside = next(tensors(value), None)
    many = f" of {len(value)}" if isinstance(value, list | tuple | Mapping) else ""
    first = "" if inside is None else f", the first {tuple(inside.shape)}"
    return f"{type(value).__name__}{many}{first}"


_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def _parts(value: Any) -> dict[Any, Any]:
    """What a container holds, by key, field or place; empty for anything else."""
    if isinstance(value, Mapping):
        return dict(value.items())
    if isinstance(value, list | tuple):
        names = value._fields if isinstance(value, tuple) and hasattr(value, "_fields") else None
        return dict(zip(names or range(len(value)), value, strict=True))
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return {}


def _inner(value: Any) -> dict[str, Any]:
    """The attributes of an object that moves as a tensor does: a graph, say."""
    moves = callable(getattr(value, "to", None)) and not isinstance(value, nn.Module | type)
    return dict(getattr(value, "__dict__", {})) if moves else {}


def _refilled(value: Any, parts: dict[Any, Any]) -> Any:
    """A mapping of the same kind with other values."""
    if type(value) is dict:
        return parts
    found = copy.copy(value)
    for name, part in parts.items():
        found[name] = part
    return found


def _with_fields(value: Any, parts: dict[str, Any]) -> Any:
    found = copy.copy(value)
    for name, part in parts.items():
        object.__setattr__(found, name, part)
    return found


def _moved_copy(thing: Any, device: Any) -> Any:
    """Copy an object that moves as a tensor does to a device; leave any other alone."""
    if not _inner(thing):
        return thing
    found = copy.deepcopy(thing)
    return found if device is None else found.to(device)


def bare(model: nn.Module) -> nn.Module:
    """Return the network itself, out of what torch.compile or data parallelism put around it.

    Raises:
        ModelError: it is no network.
    """
    must_be(nn.Module, "The model", model, ModelError, A_MODEL)
    while isinstance(inner := getattr(model, _inside(model), None), nn.Module):
        model = inner
    return model


def _inside(model: nn.Module) -> str:
    return _WRAPPED.get(type(model).__name__, "")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Keep a model in eval mode inside the block; every flag is put back, also on an error."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in flags:
            module.training = False  # not eval(), which a model may have made its own
        yield
    finally:
        for module, training in flags:
            module.training = training
