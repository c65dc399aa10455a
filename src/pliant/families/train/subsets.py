"""Parts of a data set that hold one another, each with the classes of the whole."""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from pliant.data import Data, unpack
from pliant.data.sources import Columns, Items, Tensors

_LAST: list[tuple[weakref.ref[Data], Tensor | None]] = []  # of the data asked for last


def nested(labels: Tensor | None, size: int, share: float, seed: int) -> Tensor:
    """Return rows of a part: of every class the first of its shuffle.

    Larger shares hold smaller ones, and every class is in all of them.

    Args:
        labels: class numbers (size,); None for a shuffle of all.
        size: rows of the whole.
        share: above 0, at most 1.
        seed: of the shuffles.

    Returns:
        Numbers of rows, in rising order.
    """
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(size, generator=random)
    kinds = torch.zeros(size, dtype=torch.long) if labels is None else labels
    chosen = []
    for kind in kinds.unique():
        mine = order[kinds[order] == kind]
        chosen.append(mine[: math.ceil(share * len(mine) - 1e-9)])
    return torch.cat(chosen).sort().values


def class_numbers(data: Data) -> Tensor | None:
    """Return the class of every training sample, (n,); None where labels are no class numbers.

    Taken from where data sets usually keep them, else every sample is looked at once.

    Raises:
        DataError: the training split has no index.
    """
    if not _LAST or _LAST[0][0]() is not data:
        found = _labels(data.indexed("train"))
        whole = found is not None and found.dim() == 1 and not found.is_floating_point()
        _LAST[:] = [(weakref.ref(data), found.long() if found is not None and whole else None)]
    return _LAST[0][1]


def _labels(source: Any) -> Tensor | None:
    if isinstance(source, Tensors | Columns):
        labels = source.labels if isinstance(source, Tensors) else unpack(source.whole)[1]
        return labels.cpu() if isinstance(labels, Tensor) else None
    if not isinstance(source, Items):
        return None
    known = _stored(source.items)
    if known is not None and len(known) == len(source):
        return known
    each = [unpack(source.batch(torch.tensor([row])))[1] for row in range(len(source))]
    return torch.cat(each) if all(isinstance(part, Tensor) for part in each) else None


def _stored(items: Any) -> Tensor | None:
    """Return the labels that a data set keeps beside its samples."""
    if isinstance(items, Subset):
        inner = _stored(items.dataset)
        return None if inner is None else inner[torch.as_tensor(list(items.indices))]
    if isinstance(items, TensorDataset):
        return items.tensors[-1].cpu()
    kept = getattr(items, "targets", None)
    return torch.as_tensor(kept).cpu() if isinstance(kept, Tensor | list | tuple) else None
