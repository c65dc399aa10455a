"""Whether data can be trained on: each refusal says what is wrong and what to do."""

import torch
from torch import Tensor

from pliant.data.sources import IGNORED
from pliant.errors import DataError


def check_rows(split: str, inputs: Tensor, labels: Tensor | None) -> None:
    """Refuse a split in memory that is empty, or has another number of labels."""
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


def check_kind(split: str, labels: Tensor) -> None:
    """Refuse labels that are no class indices."""
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise DataError(
            f"Labels of the {split} split must be whole numbers (class indices), not "
            f"{labels.dtype}; convert them with labels.long(). If they are a second input, write "
            "((a, b),) or {'a': a, 'b': b}."
        )


def check_range(split: str, labels: Tensor, classes: int) -> None:
    """Refuse labels outside the classes."""
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
