"""Whether data can be trained on: each refusal says what is wrong and what to do."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from pliant.cost import tensors
from pliant.data.sources import IGNORED, unpack
from pliant.errors import DataError


def check_pair(split: str, inputs: Tensor, labels: Tensor | None) -> None:
    """Refuse samples in memory that are none, of another number than labels, or complex labels."""
    if not inputs.dim() or not len(inputs) or (labels is not None and not labels.dim()):
        raise DataError(
            f"The {split} split must hold at least one sample, but its inputs have shape "
            f"{tuple(inputs.shape)}; check how it is made."
        )
    if labels is not None and len(inputs) != len(labels):
        raise DataError(
            f"The {split} split needs one label per input, but has {len(inputs)} inputs and "
            f"{len(labels)} labels; make them equally long. Two inputs of one call without labels "
            "are written as ((a, b),) or by name, {'a': a, 'b': b}."
        )
    if labels is not None:
        check_real(split, labels)


def check_real(split: str, labels: Tensor) -> None:
    """Refuse complex labels."""
    if labels.is_complex():
        raise DataError(
            f"Labels of the {split} split must be real numbers, not {labels.dtype}; give real and "
            "imaginary parts as two numbers."
        )


def check_range(split: str, labels: Tensor, classes: int) -> None:
    """Refuse labels of samples outside the classes; those of positions are the task's."""
    if labels.is_floating_point() or labels.dtype == torch.bool or labels.dim() != 1:
        return
    labels = labels.long()
    counted = labels[labels != IGNORED]
    wrong = counted[(counted < 0) | (counted >= classes)] if classes else counted[counted < 0]
    if wrong.numel():
        raise DataError(
            f"Labels of the {split} split must lie in 0..{max(classes, 1) - 1}, one for each of "
            f"the {classes} outputs, but {int(wrong[0])} came; build the model with more classes "
            "or correct the labels."
        )


def check_finite(split: str, inputs: list[Tensor]) -> None:
    """Refuse inputs with NaN or infinity, naming the first sample."""
    for tensor in inputs:
        if not tensor.is_floating_point() or not tensor.dim() or torch.isfinite(tensor).all():
            continue
        rows = (~torch.isfinite(tensor)).reshape(len(tensor), -1).any(1)
        raise DataError(
            f"Inputs of the {split} split must be finite, but {int(rows.sum())} samples hold NaN "
            f"or infinity, the first is number {int(rows.nonzero()[0])}; remove or mend them."
        )


def first_batch(split: str, batches: Iterable[Any]) -> tuple[list[Tensor], Any]:
    """Return inputs and labels of the first batch; refuse a split that gives no tensors."""
    batch = next(iter(batches), None)
    example, labels = unpack(batch)
    inputs = list(tensors(example))
    if not inputs:
        raise DataError(
            f"The {split} split must give batches of tensors, but its first batch is "
            f"{'missing' if batch is None else type(batch).__name__}; check the loader."
        )
    return inputs, labels


def check_split(split: str, inputs: list[Tensor], labels: Any, classes: int | None) -> None:
    """Refuse what cannot be trained on; the range of classes is not looked at if they are None."""
    check_finite(split, inputs)
    if isinstance(labels, Tensor):
        check_real(split, labels)
        if classes is not None:
            check_range(split, labels, classes)
