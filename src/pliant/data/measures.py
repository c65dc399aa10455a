"""What outputs are worth, as rows that can be added up: shares, errors, PSNR, SSIM, unions.

A measure gives rows: one for each sample or answer. A value is made of their sum over a whole
split, so that it does not depend on batches, and of sums without one row each, which say how sure
it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pliant.errors import DataError, MethodError

LUMA = (65.481, 128.553, 24.966)  # ITU-R BT.601, of RGB in 0..1; 16 is added
WINDOW, SIGMA = 11, 1.5  # of SSIM (Wang et al. 2004)
SAME = 1e-10  # of the squared peak: equal images count as 100 dB
POOLED = 64  # outputs beyond which variances are pooled
TINY = 1e-12

Total = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Metric:
    """Says how good outputs are.

    Args:
        of: function of (output, batch): a number for the batch, which is a mean over its samples,
            or a tensor with a number for each of them; with ``total``, rows (samples, sums).
        better: which way is better.
        unit: "share" for shares in 0..1, of which points of a percent are lost; of anything else,
            such as "dB", a percentage of itself is.
        total: makes values of sums, (..., sums) to (...,); without it the mean counts.

    Raises:
        MethodError: a function or a direction is missing.

    >>> Metric(lambda output, batch: output.abs().mean(), "lower").better
    'lower'
    """

    of: Callable[[Any, Any], Any]
    better: Literal["higher", "lower"]
    unit: str = ""
    total: Total | None = None

    def __post_init__(self) -> None:
        if not callable(self.of) or self.better not in ("higher", "lower"):
            raise MethodError(
                "A metric needs a function of (output, batch) and which way is better, such as "
                f'Metric(function, "higher"), not ({self.of!r}, {self.better!r}).'
            )

    def rows(self, output: Any, batch: Any, size: int) -> Tensor:
        """Return the rows of a batch of so many samples, on the CPU.

        Raises:
            MethodError: the function gives no numbers.
        """
        found = self.of(output, batch)
        found = torch.as_tensor(found).detach().cpu()
        if found.is_complex() or found.dim() > 2 or (found.dim() == 2 and self.total is None):
            raise MethodError(
                "A metric must give a number for the batch, or a tensor with a number for each "
                f"sample, but one of shape {tuple(found.shape)} came."
            )
        if found.dim() == 0:
            return torch.tensor([[float(found) * size, float(size)]], dtype=torch.float64)
        return found if found.dtype == torch.bool else found.double()

    def value(self, rows: Tensor) -> float:
        """Make the value of a split of its rows."""
        if not len(rows):
            return float("nan")
        return float(self.valued(rows.double().sum(0), len(rows)))

    def valued(self, sums: Tensor, count: float | Tensor) -> Tensor:
        """Make values of sums over ``count`` rows each."""
        if self.total is not None:
            return self.total(sums)
        single = sums.dim() == 0 or sums.shape[-1:] != (2,)
        return sums / count if single else sums[..., 0] / sums[..., 1]

    def without_one(self, rows: Tensor) -> Tensor:
        """Make the value of the split without each of its rows: (rows,)."""
        precise = rows.double()
        left = precise.sum(0) - precise
        if self.total is None and rows.dim() == 1:
            return left / (len(rows) - 1)
        return self.valued(left, len(rows) - 1)


# ---------------------------------------------------------------- numbers


def mean_error(given: Tensor, wanted: Tensor) -> Tensor:
    """Return the sums of squares, sums, squares of sums and counts of outputs: (samples, 4 K).

    K is the number of outputs of a sample, those on axis 1; they are pooled if there are many.
    """
    given, wanted = given.double(), wanted.double()
    known = wanted.isfinite()
    error = torch.where(known, given - wanted, 0.0).square()
    wanted = torch.where(known, wanted, 0.0)
    parts = []
    for part in (error, wanted, wanted.square(), known.double()):
        part = part.reshape(len(part), *(part.shape[1:] or (1,)))
        kept = 2 if part.shape[1] <= POOLED else 1
        parts.append(part.flatten(kept).sum(kept) if part.dim() > kept else part)
    parts = [part.reshape(len(part), -1) for part in parts]
    return torch.stack(parts, -1).flatten(1)


def explained(sums: Tensor) -> Tensor:
    """Return R^2, the share of the variance of the targets that outputs explain."""
    error, total, squares, count = sums.unflatten(-1, (-1, 4)).unbind(-1)
    spread = (squares - total.square() / count.clamp(min=1)).clamp(min=0)
    exact = TINY * squares.sum(-1)
    whole = spread.sum(-1)
    return torch.where(whole > exact, 1 - error.sum(-1) / whole.clamp(min=TINY), torch.nan)


def root_mean(sums: Tensor) -> Tensor:
    """Return the root of the mean squared error."""
    error, _, _, count = sums.unflatten(-1, (-1, 4)).unbind(-1)
    return (error.sum(-1) / count.sum(-1).clamp(min=1)).sqrt()


def perplexity(sums: Tensor) -> Tensor:
    """Return the exponential of the mean loss: rows hold its sum and its count."""
    return (sums[..., 0] / sums[..., 1].clamp(min=1)).exp()


def f1(sums: Tensor) -> Tensor:
    """Return the F1 score: rows hold true positives, false positives and false negatives."""
    right, false, missed = sums.unbind(-1)
    return torch.where(
        right + false + missed > 0, 2 * right / (2 * right + false + missed).clamp(min=TINY), 1.0
    )


# ---------------------------------------------------------------- classes of positions


def overlaps(found: Tensor, wanted: Tensor, classes: int, ignored: int) -> Tensor:
    """Count, for each image and class, the positions in both and those in either: (N, 2 C).

    Args:
        found: classes (N, ...).
        wanted: classes (N, ...); positions of ``ignored`` count nowhere.
        classes: how many there are.
        ignored: no class.
    """
    rows = []
    for mine, other in zip(found.flatten(1).cpu(), wanted.flatten(1).cpu(), strict=True):
        known = other != ignored
        mine, other = mine[known], other[known]
        both = torch.bincount(mine[mine == other], minlength=classes)
        either = torch.bincount(mine, minlength=classes) + torch.bincount(other, minlength=classes)
        rows.append(torch.cat([both, either - both]))
    return torch.stack(rows).double() if rows else torch.zeros(0, 2 * classes).double()


def mean_iou(sums: Tensor) -> Tensor:
    """Return the mean, over classes that occur at all, of intersection over union."""
    both, either = sums.unflatten(-1, (2, -1)).unbind(-2)
    there = either > 0
    share = both / either.clamp(min=1)
    return (share * there).sum(-1) / there.sum(-1).clamp(min=1)


# ---------------------------------------------------------------- images


def luma(images: Tensor, peak: float) -> Tensor:
    """Return the brightness Y of RGB images (N, 3, H, W) by ITU-R BT.601: (N, 1, H, W)."""
    weights = torch.tensor(LUMA, dtype=images.dtype, device=images.device).view(1, 3, 1, 1)
    return ((images * weights).sum(1, keepdim=True) + 16 * peak) / 255


def prepared(images: Tensor, peak: float, border: int, bright: bool) -> Tensor:
    """Return images as they are compared: within 0..peak, without borders, of Y if asked.

    Raises:
        DataError: nothing is left within the borders.
    """
    images = images.double().clamp(0, peak)
    if min(images.shape[-2:]) <= 2 * border:
        raise DataError(
            f"Images of {tuple(images.shape[-2:])} have nothing within borders of {border}: name "
            "a smaller border."
        )
    images = images[..., border : images.shape[-2] - border, border : images.shape[-1] - border]
    return luma(images, peak) if bright and images.shape[1] == 3 else images


def psnr(given: Tensor, wanted: Tensor, peak: float) -> Tensor:
    """Return the peak signal-to-noise ratio of every image in dB, at most 100: (N,)."""
    error = (given.double() - wanted.double()).square().flatten(1).mean(1) / peak**2
    return -10 * error.clamp(min=SAME).log10()


def ssim(given: Tensor, wanted: Tensor, peak: float) -> Tensor:
    """Return the structural similarity of every image (Wang et al. 2004): (N,).

    Windows of 11 x 11 are weighted by a Gaussian of 1.5, and only whole ones count.

    Args:
        given: (N, C, H, W), of at least 11 x 11.
        wanted: the same.
        peak: largest value.

    Raises:
        DataError: images are smaller than a window.
    """
    if min(given.shape[-2:]) < WINDOW:
        raise DataError(
            f"SSIM needs images of at least {WINDOW} x {WINDOW}, not {tuple(given.shape[-2:])}."
        )
    place = torch.arange(WINDOW, dtype=torch.float64, device=given.device) - WINDOW // 2
    line = (-place.square() / (2 * SIGMA**2)).exp()
    line = line / line.sum()

    def blurred(maps: Tensor) -> Tensor:
        flat = maps.double().flatten(0, 1).unsqueeze(1)
        flat = F.conv2d(F.conv2d(flat, line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1))
        return flat.unflatten(0, maps.shape[:2]).squeeze(2)

    x, y = given.double(), wanted.double()
    mean_x, mean_y = blurred(x), blurred(y)
    var_x, var_y = blurred(x * x) - mean_x**2, blurred(y * y) - mean_y**2
    both = blurred(x * y) - mean_x * mean_y
    small, large = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    alike = (2 * mean_x * mean_y + small) / (mean_x**2 + mean_y**2 + small)
    alike = alike * (2 * both + large) / (var_x + var_y + large)
    return alike.flatten(1).mean(1)
