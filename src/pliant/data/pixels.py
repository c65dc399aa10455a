"""Pixels of images of all kinds as 8-bit numbers, grey or in three colours, of one size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pliant.errors import DataError, require

GREY = ("1", "L", "LA", "La")  # Pillow's modes of 8 bits and less without colour
ORIENTATION = 0x0112  # of EXIF
DEEP = ("I;16", "I;16L", "I;16B", "I;16N")  # of 16 bits, all of them grey


def pixels_of(image: Any, size: int | Sequence[int] | None = None) -> Any:
    """Return an image as 8-bit numbers: (height, width) if it is grey, else with 3 colours.

    Numbers of 16 bits are divided by 257, so that white stays white; transparency is left out. An
    image whose EXIF data say that it lies on its side is turned upright. Of the several pictures
    that telephones put into one JPEG, the first counts.

    Args:
        image: opened by Pillow.
        size: (height, width) to resize to, or a number: the shorter side is resized to it, and
            the middle square cut out. Bilinear, smoothed where it shrinks. None for as it is.

    Raises:
        ValueError: it has several frames, or numbers of 32 bits whose range nobody knows.
    """
    pil, numpy = require("PIL.Image", "data"), require("numpy", "data")
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        raise ValueError(f"it has {image.n_frames} frames; save each as an image of its own")
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels have 32 bits (mode {image.mode}); save it with 8 or 16 bits")
    if image.mode in DEEP:
        deep = numpy.asarray(image).astype(numpy.uint32)
        image = pil.fromarray(((deep + 128) // 257).astype(numpy.uint8))
    grey = image.mode in GREY or (image.mode == "P" and _is_grey(image))
    image = require("PIL.ImageOps", "data").exif_transpose(image.convert("L" if grey else "RGB"))
    return numpy.asarray(image if size is None else _resized(image, size))


def upright(image: Any) -> tuple[int, int]:
    """Return height and width of an image as it is to be seen, before it is decoded."""
    width, height = image.size
    aside = image.getexif().get(ORIENTATION, 1) > 4  # these swap the axes
    return (width, height) if aside else (height, width)


def _is_grey(image: Any) -> bool:
    """Say whether all colours of a palette are grey."""
    numbers = image.getpalette("RGB") or [0, 1, 2]
    return numbers[0::3] == numbers[1::3] == numbers[2::3]


def stacked(pixels: list[Any]) -> Tensor:
    """Stack images of one size to (N, C, H, W): grey ones in colour too if any is in colour."""
    numpy = require("numpy", "data")
    colour = any(each.ndim == 3 for each in pixels)
    planes = [each[..., None] if each.ndim == 2 else each for each in pixels]
    if colour:
        shapes = [(*each.shape[:2], 3) for each in planes]
        planes = [numpy.broadcast_to(p, shape) for p, shape in zip(planes, shapes, strict=True)]
    return torch.from_numpy(numpy.stack(planes)).permute(0, 3, 1, 2).contiguous()


def alike(parts: dict[str, Any]) -> dict[str, Any]:
    """Give splits, (images, labels) each, the same colours: three where any has three."""
    channels = max(images.shape[1] for images, _ in parts.values())
    return {
        split: (images.expand(-1, channels, -1, -1).contiguous(), labels)
        for split, (images, labels) in parts.items()
    }


def check_size(size: Any) -> tuple[int, int] | int | None:
    """Read the size that images are resized to.

    Raises:
        DataError: it is no whole number above 0, and no two of them.
    """
    sizes = tuple(size) if isinstance(size, list | tuple) else (size,)
    whole = all(type(side) is int and side > 0 for side in sizes)
    if size is None:
        return None
    if not whole or len(sizes) > 2:
        raise DataError(
            f"size must be a number of pixels, or (height, width), not {size!r}: 224 cuts the "
            "middle square out of what was resized to it."
        )
    return sizes[0] if len(sizes) == 1 else (sizes[0], sizes[1])


def _resized(image: Any, size: int | Sequence[int]) -> Any:
    bilinear = require("PIL.Image", "data").Resampling.BILINEAR
    if not isinstance(size, int):
        height, width = size
        return image.resize((width, height), bilinear)
    shorter = min(image.size)
    width, height = (max(size, round(side * size / shorter)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    return image.resize((width, height), bilinear).crop((left, top, left + size, top + size))
