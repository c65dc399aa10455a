"""What the decoder of an encoder-decoder reads, where data hold only what it should say."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pliant.cost.call import bare
from pliant.data.asking import in_memory
from pliant.data.sources import IGNORED, Columns, Items, Loose, is_indexed, unpack
from pliant.data.task import is_whole, parameters

READ = ("decoder_input_ids", "decoder_inputs_embeds")


def completed(part: Any, model: nn.Module) -> Any:
    """Give batches by name the tokens that a decoder reads: labels, moved by one.

    Transformers does so within `forward`, where it gets the labels; calibration does without them.

    Args:
        part: a split, as `pliant.data.asking.read` leaves it.
        model: any network; what is no encoder-decoder of Transformers changes nothing.
    """
    model = bare(model)
    config = getattr(model, "config", None)
    known = parameters(model.forward)
    if not getattr(config, "is_encoder_decoder", False) or not {READ[0], "labels"} <= set(known):
        return part
    add = partial(_with_tokens, _shift_of(model))
    if isinstance(part, Loose):
        return Loose([add(item) for item in part], part.seed)
    if isinstance(part, Items):
        return replace(part, items=_Each(part.items, add))
    if isinstance(part, DataLoader):
        loader = copy.copy(part)
        loader.collate_fn = _Then(part.collate_fn, add)
        return loader
    source = part if part is None or isinstance(part, Columns) else in_memory(part)
    if isinstance(source, Columns):
        return Columns(add(source.whole))
    if part is None or source is not None:
        return part
    if isinstance(part, list | tuple):
        return [add(item) for item in part]
    return _Each(part, add) if is_indexed(part) else _Stream(part, add)


class _Then:
    """Collates, and changes the batch."""

    def __init__(self, collate: Callable[[Any], Any], change: Callable[[Any], Any]) -> None:
        self.collate, self.change = collate, change

    def __call__(self, items: Any) -> Any:
        return self.change(self.collate(items))


class _Stream:
    """Changes what comes."""

    def __init__(self, items: Any, change: Callable[[Any], Any]) -> None:
        self.items, self.change = items, change

    def __iter__(self) -> Iterator[Any]:
        return map(self.change, self.items)

    def __len__(self) -> int:
        return len(self.items)


class _Each(_Stream):
    """The same of a data set with index."""

    def __getitem__(self, index: int) -> Any:
        return self.change(self.items[index])


def _with_tokens(shift: Callable[[Tensor], Tensor], item: Any) -> Any:
    """Add what the decoder reads to a sample or batch that has labels and says nothing of it."""
    if not isinstance(item, Mapping) or any(name in item for name in READ):
        return item
    labels = unpack(item)[1]
    if isinstance(labels, list) and labels and isinstance(labels[0], int):
        labels = torch.tensor(labels)
    if not isinstance(labels, Tensor) or labels.dim() not in (1, 2) or not is_whole(labels):
        return item
    rows = labels.long().reshape(-1, labels.shape[-1])
    return {**item, READ[0]: shift(rows).reshape(labels.shape)}


def _shift_of(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return how a network makes the tokens that its decoder reads out of labels."""
    own = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    config: Any = model.config
    if callable(own):
        return lambda labels: own(labels=labels)

    def shift(labels: Tensor) -> Tensor:
        begin = torch.full_like(labels[:, :1], config.decoder_start_token_id)
        moved = torch.cat([begin, labels[:, :-1]], 1)
        return torch.where(moved == IGNORED, config.pad_token_id, moved)

    return shift
