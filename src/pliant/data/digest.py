"""A digest of a split: whether two trainings see the same samples and labels."""

import hashlib
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils._pytree import tree_leaves
from torch.utils.data import Subset, TensorDataset

from pliant.cost import tensors
from pliant.data.chance import generator, seeded
from pliant.data.sources import Batches, Columns, Items, Loose, Source, Tensors, unpack
from pliant.data.splits import Data, Split

WHOLE = 2**26  # numbers: tensors up to this size are read whole
ROWS, ITEMS, STREAMED = 4096, 32, 2  # of larger tensors, of data sets, batches of a stream
_SEED = 17
_PIECE = 2**24  # bytes hashed at once


def digest_of(*values: Any) -> str:
    """Return 16 hexadecimal digits of what values hold: tensors by type, shape and numbers."""
    found = hashlib.sha256()
    for value in values:
        found.update(b"|")
        for piece in _pieces(value):
            found.update(piece)
    return found.hexdigest()[:16]


def digests(data: Data, splits: tuple[Split, ...] = ("train", "val")) -> tuple[str, str]:
    """Return the digests of inputs and labels: of the train and the val split, and their lengths.

    Labels in tensors and lists are read whole, inputs whole up to 67 million numbers and by 4,096
    rows beyond; of a data set 32 samples are read, and all labels where it holds them, of a stream
    two batches. What differs between two looks at the same sample, such as noise of a generator of
    its own, is left out.
    """
    parts = [_split(data.source(split)) for split in splits if data.has(split)]
    return digest_of(*(part[0] for part in parts)), digest_of(*(part[1] for part in parts))


def _split(source: Source) -> tuple[Any, Any]:
    if isinstance(source, Tensors):
        every = source.inputs.numel() <= WHOLE
        inputs = source.inputs if every else source.inputs[_rows(len(source), ROWS)]
        return (len(source), source.mean, source.std, inputs), source.labels
    if isinstance(source, Columns):
        every = sum(tensor.numel() for tensor in tensors(source.whole)) <= WHOLE
        rows = torch.arange(len(source)) if every else _rows(len(source), ROWS)
        given, labels = unpack(source.batch(rows))
        return (len(source), given), labels
    if isinstance(source, Batches) and isinstance(source.loader, list | tuple | Loose):
        pairs = [unpack(batch) for batch in source]
        every = sum(tensor.numel() for tensor in tensors([pair[0] for pair in pairs])) <= WHOLE
        shown = [pair[0] for pair in (pairs if every else pairs[:STREAMED])]
        return (len(pairs), shown), [pair[1] for pair in pairs]
    indexed = source.indexed() if isinstance(source, Batches) else source
    length = source.samples if isinstance(source, Batches) else len(source)
    first, second = (list(_drawn(source, indexed)) for _ in range(2))
    steady = [_steady(*both) for both in zip(first, second, strict=True)]
    known = None if indexed is None else _labels_held(indexed.items)
    return [length, *(inputs for inputs, _ in steady)], [known, *(labels for _, labels in steady)]


def _labels_held(items: Any) -> Any:
    """All labels of a data set that holds them in memory, in its order; None where it does not."""
    if isinstance(items, Subset):
        held = _labels_held(items.dataset)
        return held[torch.as_tensor(list(items.indices))] if isinstance(held, Tensor) else None
    held = getattr(items, "targets", getattr(items, "labels", None))
    if isinstance(items, TensorDataset) and len(items.tensors) > 1:
        held = items.tensors[-1]
    if isinstance(held, list) and held and all(isinstance(label, int) for label in held):
        held = torch.tensor(held)
    fits = isinstance(held, Tensor) and held.dim() and len(held) == len(items)
    return held if fits else None


def _rows(size: int, count: int) -> Tensor:
    return torch.randperm(size, generator=generator(_SEED))[:count]


def _drawn(source: Source, indexed: Items | None) -> Iterator[Any]:
    """Some samples, or some batches of a stream, under a random state of their own."""
    if indexed is not None:
        rows = _rows(len(indexed), ITEMS).tolist()
        return seeded((indexed.items[row] for row in rows), _SEED)
    assert isinstance(source, Batches)
    return islice(source.epoch(_SEED, 0, 0, 1), STREAMED)


def _steady(first: Any, second: Any) -> tuple[Any, Any]:
    """Take a sample apart, and leave out what is another thing at the second look."""
    (inputs, labels), (inputs_again, labels_again) = unpack(first), unpack(second)
    both = list(zip(tree_leaves(inputs), tree_leaves(inputs_again), strict=False))
    same = [one for one, other in both if digest_of(one) == digest_of(other)]
    return same, labels if digest_of(labels) == digest_of(labels_again) else None


def _pieces(value: Any) -> Iterator[bytes]:
    """What there is to hash of plain data, arrays and tensors; of others their class."""
    if isinstance(value, Tensor):
        yield from _tensor(value)
    elif isinstance(value, np.ndarray) and value.dtype.kind == "O":
        yield from _pieces(value.tolist())
    elif isinstance(value, np.ndarray):
        yield f"{value.dtype}{value.shape}".encode()
        yield value.tobytes()
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield repr(key).encode()
            yield from _pieces(item)
    elif isinstance(value, list | tuple):
        yield f"{len(value)}:".encode()
        for item in value:
            yield from _pieces(item)
    elif isinstance(value, bool | int | float | str | bytes | None):
        yield repr(value).encode()
    elif hasattr(value, "tobytes"):  # an image, a number of NumPy
        yield value.tobytes()
    else:
        yield type(value).__qualname__.encode()


def _tensor(value: Tensor) -> Iterator[bytes]:
    if isinstance(value, UninitializedParameter | UninitializedBuffer) or value.is_meta:
        return
    yield f"{value.dtype}{tuple(value.shape)}".encode()
    dense = value.detach()
    dense = dense if dense.layout == torch.strided else dense.to_dense()
    flat = dense.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    for part in flat.split(_PIECE):
        yield part.cpu().numpy().tobytes()
