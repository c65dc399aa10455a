"""What data are: seen by their kind, or asked of the network that is to read them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import DataLoader

from pliant.cost import tensors
from pliant.cost.call import is_named
from pliant.data.chance import seeded
from pliant.data.sound import check_pair
from pliant.data.sources import (
    Batches,
    Columns,
    Grouped,
    Indexed,
    Items,
    Kept,
    Loose,
    Source,
    Tensors,
    has_samples,
    is_indexed,
    is_pair,
    is_text,
    unpack,
)
from pliant.data.streams import last_tenth
from pliant.data.together import UnevenError, as_tensor, listed, together
from pliant.data.trials import are_samples, trial_of
from pliant.errors import DataError

SPLITS = {"train": ("train",), "val": ("validation", "val", "valid", "dev"), "test": ("test",)}
LOOKED = 64  # samples of a data set whose shapes are compared


def is_array(part: Any) -> bool:
    """Say whether something is a tensor, an array, or a table that gives one."""
    table = hasattr(part, "__array__") and hasattr(part, "ndim")
    return isinstance(part, Tensor | np.ndarray) or (table and not isinstance(part, np.generic))


def once_only(part: Any) -> bool:
    """Say whether something can be gone through once: an iterator, or what hands one out again."""
    if isinstance(part, Iterator):
        return True
    known = isinstance(part, Kept | Loose | Grouped | list | tuple | Mapping | Tensor | Batches)
    if part is None or known or is_indexed(part) or not isinstance(part, Iterable):
        return False
    if isinstance(part, DataLoader):
        return not is_indexed(part.dataset) and once_only(part.dataset)
    return iter(part) is iter(part)


def in_memory(part: Any) -> Tensors | Columns | Items | None:
    """Return samples that lie in memory, None where something else came.

    A tensor, an array or a table is one input; a pair of them inputs and labels; a mapping, or a
    tuple that ends with labels, several inputs; two lists of one length a data set of pairs.

    Raises:
        DataError: an array holds something else than numbers, or a tensor is sparse.
    """
    if is_array(part):
        return Tensors(_dense(part), None)
    if is_pair(part) or _is_arrays(part):
        return Tensors(_dense(part[0]), _dense(part[1]))
    if isinstance(part, PackedSequence) or not isinstance(part, Mapping | tuple):
        return None
    if _is_unlabelled(part):
        return in_memory((part[0],))
    whole = _arrays(part)
    found, (inputs, labels) = list(tensors(whole)), unpack(whole)
    last = labels is None or isinstance(labels, Tensor) or _is_nested(part)
    rows = {len(tensor) if tensor.dim() else -1 for tensor in found}
    if found and last and len(rows) == 1 and min(rows) > 0 and _only(whole, Tensor):
        alone = isinstance(inputs, tuple) and len(inputs) == 1 and is_array(inputs[0])
        plain = alone and isinstance(labels, Tensor | None)
        return Tensors(found[0], labels) if plain else Columns(whole)
    return _pairs(part)


def read(part: Any, model: nn.Module) -> Any:
    """Return a split as a network reads it: see `Data.read_by`."""
    if isinstance(part, Items) or (is_indexed(part) and not isinstance(part, list | tuple | Loose)):
        items = part if isinstance(part, Items) else Items(part)
        return _samples(items, model) if items.collate is together and not items.most else part
    plain = isinstance(part, Iterable) and not isinstance(part, str | bytes | Mapping | Grouped)
    loader = isinstance(part, DataLoader) and part.batch_sampler is not None
    if not plain or loader or isinstance(part, Batches) or in_memory(part) is not None:
        return part
    first = next(filter(has_samples, seeded(part, 0)), None)
    if first is None or not are_samples(model, first):
        return part
    if isinstance(part, list | tuple | Loose):
        return _samples(Items(part.items if isinstance(part, Loose) else part), model)
    collate = together if trial_of(model, together, [first]) is not None else listed
    return Grouped(part, collate)


def _samples(items: Items, model: nn.Module) -> Items:
    """Stack samples, list them, or give them one by one."""
    if not len(items):
        return items
    few = items.read(islice(range(len(items)), LOOKED))
    try:
        together(few)
        if len(few) == 1 or trial_of(model, together, few[:1]) is not None:
            return items
        return _listing(items, few, model, items)
    except UnevenError:
        return _listing(items, few, model, Items(items.items, most=1))


def _listing(items: Items, few: list[Any], model: nn.Module, otherwise: Items) -> Items:
    takes = trial_of(model, listed, few[:2]) is not None
    return Items(items.items, listed) if takes else otherwise


def named_splits(data: Any) -> dict[str, Any]:
    """Return the splits of a mapping from their names to data; empty where it is none."""
    if not isinstance(data, Mapping) or "train" not in data:
        return {}
    parts = [part for part in data.values() if not is_array(part)]
    if len(parts) < len(data) or not all(isinstance(p, Iterable) or is_indexed(p) for p in parts):
        return {}
    found = {split: [n for n in known if n in data] for split, known in SPLITS.items()}
    return {split: data[known[0]] for split, known in found.items() if known}


def splits_of(data: Any, seed: int) -> dict[str, Any]:
    """Divide what users have into fields of `Data`: see `Data.of`.

    Raises:
        DataError: it is nothing that holds samples.
    """
    if data is None:
        return {}
    if parts := named_splits(data):
        return parts
    part = in_memory(data)
    if isinstance(part, Tensors):
        check_pair("train", part.inputs, part.labels)
        return {**_divided(part, seed), "classes": classes_of(part.labels)}
    if isinstance(part, Columns | Items):
        return _divided(part, seed)
    if isinstance(data, list | PackedSequence):
        return {"train": Loose(data if isinstance(data, list) else [data], seed)}
    if is_indexed(data) and not isinstance(data, tuple):
        return _divided(Items(data), seed)
    if isinstance(data, Iterable) and not isinstance(data, str | bytes | Tensor | Mapping):
        return {"train": data}
    raise DataError(
        "Data must be a Data, a tensor of inputs, a pair of tensors (inputs, labels), a mapping or "
        "tuple of tensors with a row for every sample, a list, a data set, a DataLoader or a "
        f"generator, not {type(data).__name__}; pliant.data.load makes one from a name or a folder."
    )


def source_of(
    part: Any, mean: tuple[float, ...] = (), std: tuple[float, ...] = (), *, crop_flip: bool = False
) -> Source:
    """Say what a split is: tensors, items with an index, or batches.

    Args:
        part: the split as the user gave it.
        mean: of images in memory, to normalise them by.
        std: likewise.
        crop_flip: whether images in memory can be moved and mirrored.
    """
    if isinstance(part, Tensors | Columns | Items | Batches):
        return part
    inside = in_memory(part)
    if isinstance(inside, Tensors):
        return Tensors(inside.inputs, inside.labels, mean, std, crop_flip)
    if inside is not None:
        return inside
    plain = isinstance(part, list | tuple | Loose | Grouped)
    return Items(part) if is_indexed(part) and not plain else Batches(part)


def _divided(source: Indexed, seed: int) -> dict[str, Any]:
    return dict(zip(("train", "val"), last_tenth(source, seed), strict=True))


def classes_of(labels: Tensor | None) -> int:
    """Count the classes that labels of samples name; 0 where they are no classes."""
    if labels is None or labels.is_floating_point() or labels.is_complex() or labels.dim() != 1:
        return 0
    return max(0, int(labels.long().max()) + 1)


def _is_arrays(part: Any) -> bool:
    pair = isinstance(part, list | tuple) and not is_named(part) and len(part) == 2
    return pair and all(hasattr(each, "__array__") for each in part)


def _is_nested(part: Any) -> bool:
    """Say whether something is (inputs, labels) with labels in a mapping or tuple.

    Two tuples, and two mappings of the same names, are two batches.
    """
    if type(part) is not tuple or len(part) != 2 or not isinstance(part[1], Mapping | tuple):
        return False
    if isinstance(part[0], Mapping) and isinstance(part[1], Mapping):
        return set(part[0]) != set(part[1])
    return is_array(part[0]) or isinstance(part[0], Mapping)


def _dense(part: Any) -> Tensor:
    """Make a tensor whose rows can be taken.

    Raises:
        DataError: it is sparse.
    """
    tensor = as_tensor(part)
    if tensor.layout != torch.strided:
        raise DataError(
            f"Samples in memory are taken by rows, but a sparse tensor ({tensor.layout}) came: "
            "give to_dense(), or a list of batches."
        )
    return tensor


def _is_unlabelled(part: Any) -> bool:
    """Say whether something is (inputs, None)."""
    return isinstance(part, tuple) and not is_named(part) and part[1:] == (None,)


def _arrays(value: Any) -> Any:
    """Make tensors of the arrays in mappings and tuples, and of lists of numbers."""
    if isinstance(value, Mapping):
        return {name: _arrays(part) for name, part in value.items() if not is_text(part)}
    if is_named(value):
        return type(value)(*map(_arrays, value))
    if type(value) is tuple:
        return tuple(map(_arrays, value))
    numbers = isinstance(value, list) and value and _only(value, int, float, bool, list)
    if isinstance(value, Tensor) or is_array(value) or numbers:
        try:
            return as_tensor(value)
        except (ValueError, TypeError, RuntimeError):
            return value
    return value


def _only(value: Any, *kinds: type) -> bool:
    """Say whether a nested value holds nothing but some kinds."""
    if isinstance(value, kinds) and not isinstance(value, list):
        return True
    if isinstance(value, Mapping | tuple | list):
        parts = value.values() if isinstance(value, Mapping) else value
        return all(_only(part, *kinds) for part in parts)
    return False


def _pairs(part: Any) -> Items | None:
    """A pair of lists of one length, or of inputs and labels, as a data set of pairs."""
    rows = list | Tensor | np.ndarray
    if type(part) is not tuple or len(part) != 2 or not all(isinstance(p, rows) for p in part):
        return None
    if isinstance(part[0], Tensor | np.ndarray) and not is_text(part[1]):
        return None
    fits = 0 < len(part[0]) == len(part[1]) and _only(list(part[0]), Tensor, np.ndarray)
    return Items(list(zip(*part, strict=True))) if fits else None
