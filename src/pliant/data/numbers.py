"""Numbers and images as labels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pliant.data import measures
from pliant.data.task import labels_of, main_output, refuse, squeezed
from pliant.errors import DataError


def number_view(output: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """Return outputs and targets of the same shape; targets that are NaN have no label.

    Raises:
        DataError: shapes differ.
    """
    given, wanted = main_output(output), labels_of(batch)
    wanted = squeezed(wanted, tuple(given.shape))
    if wanted.shape != given.shape or wanted.is_complex():
        raise refuse("Regression needs targets in the shape of the outputs", given, wanted)
    return given, wanted.to(given.dtype)


def number_loss(output: Any, batch: Any, reduction: str = "mean") -> Tensor:
    """Return the squared error."""
    given, wanted = number_view(output, batch)
    known = ~wanted.isnan()
    if bool(known.all()):
        return F.mse_loss(given, wanted, reduction=reduction)
    found = torch.where(known, given - torch.where(known, wanted, 0.0), 0.0).square()
    return found if reduction == "none" else found.sum() / known.sum().clamp(min=1)


def number_rows(output: Any, batch: Any) -> Tensor:
    """Return the sums that `measures.explained` and `measures.root_mean` read."""
    return measures.mean_error(*(each.detach() for each in number_view(output, batch)))


def image_view(
    output: Any, batch: Any, peak: float, border: int, luma: bool
) -> tuple[Tensor, Tensor]:
    """Return images as they are compared.

    Raises:
        DataError: shapes differ, or targets lie outside of 0..peak.
    """
    given, wanted = number_view(output, batch)
    if given.dim() != 4:
        raise refuse("Super-resolution needs images (N, C, H, W)", given, wanted)
    low, high = float(wanted.min()), float(wanted.max())
    if low < -1e-3 * peak or high > (1 + 1e-3) * peak:
        raise DataError(
            f"Target images must lie in 0..{peak:g}, but {low:.3g} to {high:.3g} came: name the "
            "largest value, such as task='super-resolution(peak=255)', or undo a normalization."
        )
    one, other = (measures.prepared(each.detach(), peak, border, luma) for each in (given, wanted))
    return one, other


def image_loss(output: Any, batch: Any, reduction: str = "mean") -> Tensor:
    """Return the absolute error."""
    given, wanted = number_view(output, batch)
    return F.l1_loss(given, wanted, reduction=reduction)


def image_psnr(output: Any, batch: Any, *, peak: float, border: int, luma: bool) -> Tensor:
    """Return the PSNR of every image in dB."""
    given, wanted = image_view(output, batch, peak, border, luma)
    return measures.psnr(given, wanted, peak)


def image_ssim(output: Any, batch: Any, *, peak: float, border: int, luma: bool) -> Tensor:
    """Return the structural similarity of every image."""
    given, wanted = image_view(output, batch, peak, border, luma)
    return measures.ssim(given, wanted, peak)
