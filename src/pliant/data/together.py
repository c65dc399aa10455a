"""Puts samples together into a batch: what they hold is stacked, listed, or refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from pliant.cost.call import is_named
from pliant.errors import DataError


class UnevenError(DataError):
    """Samples of different shapes, which cannot be stacked."""


def together(items: list[Any]) -> Any:
    """Stack samples into one batch: a new first axis in every tensor of what they hold.

    Tensors, arrays, numbers and lists of numbers are stacked; doubles that were no tensors become
    floats. Mappings, named tuples, dataclasses and tuples keep their kind; text, None and objects
    become lists.

    Args:
        items: at least one sample, all of one kind.

    Raises:
        DataError: they differ in shape, in their names or in kind, or are undecoded images.
    """
    first = items[0]
    if not all(isinstance(item, _kind(first)) for item in items):
        raise UnevenError(
            f"Samples must be of one kind to make a batch, but {type(first).__name__} and "
            f"{', '.join(sorted({type(item).__name__ for item in items}))} came: give all alike."
        )
    if isinstance(first, Tensor):
        return _stacked(items)
    if isinstance(first, np.ndarray | np.generic | bool | int | float):
        return _stacked([as_tensor(item) for item in items])
    if isinstance(first, list):
        return _listed(items)
    return _gathered(items)


def listed(items: list[Any]) -> Any:
    """Put samples into lists, as detectors take images of different sizes.

    A tuple of what a sample holds becomes a tuple of lists, a mapping one of lists.
    """
    first = items[0]
    if is_named(first):
        return type(first)(*map(list, zip(*items, strict=True)))
    if isinstance(first, tuple | list):
        return tuple(map(list, zip(*items, strict=True)))
    return (list(items),)


def as_tensor(value: Any) -> Tensor:
    """Make a tensor of an array or of numbers; their doubles become floats, as models expect.

    Raises:
        DataError: an array holds something else than numbers.
    """
    if isinstance(value, Tensor):
        return value.detach() if value.requires_grad else value
    if hasattr(value, "__array__"):
        value = _native(np.asarray(value))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        tensor = torch.as_tensor(value)
    return tensor.float() if tensor.dtype == torch.float64 else tensor


def _native(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Give an array the order of bytes and the strides that a tensor can have."""
    if array.dtype.kind not in "biufc":
        raise DataError(
            f"Arrays must hold numbers, but one of type {array.dtype} came: turn text into "
            "numbers, and give samples of different shapes as a list of arrays."
        )
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    backward = any(stride < 0 for stride in array.strides)
    return np.ascontiguousarray(array) if backward else array


def _kind(first: Any) -> Any:
    numbers = isinstance(first, bool | int | float | np.generic)
    if isinstance(first, Mapping):
        return Mapping
    return (bool, int, float, np.generic) if numbers else type(first)


def _stacked(tensors: list[Tensor]) -> Tensor:
    shapes = list(dict.fromkeys(tuple(tensor.shape) for tensor in tensors))
    if len(shapes) > 1:
        raise UnevenError(
            f"Samples must have one shape to make a batch, but {shapes[0]} and {shapes[1]} came: "
            "give a DataLoader whose collate_fn pads them, or makes lists where the network takes "
            "lists."
        )
    return torch.stack(tensors)


def _listed(items: list[list[Any]]) -> Any:
    if any(isinstance(part, Tensor | Mapping | str | tuple) for item in items for part in item):
        return [together(list(column)) for column in _columns(items)]
    try:
        return torch.stack([as_tensor(item) for item in items])
    except (RuntimeError, ValueError, TypeError) as error:
        raise UnevenError(
            "Lists of numbers must be equally long to make a batch, but "
            f"{sorted({len(item) for item in items})[:4]} numbers came: pad them, with "
            "tokenizer(..., padding=True), or give a DataLoader whose collate_fn does."
        ) from error


def _gathered(items: list[Any]) -> Any:
    first = items[0]
    if isinstance(first, Mapping):
        return _named(items)
    if is_named(first):
        return type(first)(*(together(list(column)) for column in zip(*items, strict=True)))
    if isinstance(first, tuple) and not hasattr(first, "_fields"):
        return tuple(together(list(column)) for column in _columns(items))
    if is_dataclass(first) and not isinstance(first, type):
        names = [field.name for field in fields(first)]
        return replace(first, **{n: together([getattr(i, n) for i in items]) for n in names})
    if type(first).__module__.startswith("PIL."):
        raise DataError(
            "Samples must hold numbers, but an image that is not decoded came (PIL): give the data "
            "set a transform that makes tensors, such as ToTensor."
        )
    return list(items) if first is None or isinstance(first, str | bytes) else _other(items)


def _other(items: list[Any]) -> Any:
    try:
        return default_collate(items)
    except TypeError:  # a kind that nobody said how to stack
        return items[0] if len(items) == 1 else list(items)


def _named(items: list[Any]) -> dict[str, Any]:
    names = list(items[0])
    odd = next((set(item) ^ set(names) for item in items if set(item) != set(names)), None)
    if odd:
        raise UnevenError(
            f"Samples must have the same names to make a batch, but {sorted(map(str, odd))[0]!r} "
            "is in some only: leave it out, or fill it in."
        )
    return {name: together([item[name] for item in items]) for name in names}


def _columns(items: list[Any]) -> list[Any]:
    lengths = {len(item) for item in items}
    if len(lengths) > 1:
        raise UnevenError(
            f"Samples must hold equally many things, but {sorted(lengths)[:4]} came: give all "
            "alike."
        )
    return list(zip(*items, strict=True))


Collate = Callable[[list[Any]], Any]
