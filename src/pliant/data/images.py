"""Pictures that may come from anybody: four formats, plain files of one folder, bounded sizes."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pliant.codecs.disk import regular
from pliant.errors import DataError, require

FORMATS = ("BMP", "JPEG", "PNG", "WEBP")
"""What Pillow may open: others start programs (EPS Ghostscript) or have had more holes."""

PIXELS = 2**24  # of one picture
FREE, GROWTH = 2**30, 400  # bytes that all may take in memory, or as often what they take packed


def inside(file: Path, folder: Path) -> Path:
    """Return a file, after following links, if it lies in a folder.

    What links lead to within the cache of the Hugging Face hub, from ``snapshots`` to ``blobs``,
    lies in it too.

    Raises:
        DataError: a link leads elsewhere.
    """
    found, root = file.resolve(), folder.resolve()
    blobs = [one.parent / "blobs" for one in (root, *root.parents) if one.name == "snapshots"]
    if found.is_relative_to(root) or found.parent in blobs:
        return found
    raise DataError(
        f"{file} must lie in {folder}, but is a link that leads out of it: copy the file there, or "
        "name the folder that holds it."
    )


def decode(named: Iterable[tuple[str, Any]], where: str, folder: Path) -> Tensor:
    """Decode pictures of one size to uint8 (N, C, H, W); grey ones have one channel.

    Args:
        named: what each is called in messages, and its file, its bytes, or a cell of a parquet
            file: a mapping with ``bytes``, whose ``path`` is never opened.
        where: what all are called together.
        folder: in which the files must lie.

    Raises:
        DataError: one is no picture, too large, of another size than the first, or lies elsewhere.
    """
    pixels: list[Any] = []
    packed, taken, mode = 0, 0, ""
    for name, source in named:
        data = _data(name, source, folder)
        pixels.append(_pixels(name, data, mode, first=pixels[0] if pixels else None))
        mode = mode or ("L" if pixels[0].ndim == 2 else "RGB")
        packed, taken = packed + len(data), taken + pixels[-1].nbytes
        if taken > max(FREE, GROWTH * packed):
            raise DataError(
                f"{where} would take more than {taken:,} bytes in memory, {GROWTH} times those of "
                "the files: they are no photographs; make them smaller."
            )
    if not pixels:
        raise DataError(f"{where} must hold images, but there are none; check the path.")
    stacked = torch.from_numpy(require("numpy", "data").stack(pixels))
    return stacked.unsqueeze(1) if mode == "L" else stacked.permute(0, 3, 1, 2).contiguous()


def _data(name: str, source: Any, folder: Path) -> bytes:
    """Read the bytes of a picture."""
    if isinstance(source, Path):
        try:
            with regular(inside(source, folder)) as file:
                return file.read()
        except OSError as error:
            raise DataError(
                f"{name} must be an image, but cannot be read ({error.strerror or error})."
            ) from error
    found = source.get("bytes") if isinstance(source, dict) else source
    if not isinstance(found, bytes):
        raise DataError(
            f"{name} must hold the bytes of an image, but has none: a path in it is not followed; "
            "write the images into the file."
        )
    return found


def _pixels(name: str, data: bytes, mode: str, *, first: Any) -> Any:
    """Decode one picture: in grey, if the first one is."""
    pil, numpy = require("PIL.Image", "data"), require("numpy", "data")
    try:
        with pil.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > PIXELS:
                raise DataError(
                    f"{name} has {width} x {height} pixels, and {PIXELS:,} are allowed; resize it."
                )
            _check_size(name, (height, width), first)
            mode = mode or ("L" if image.mode in ("1", "L") else "RGB")
            return numpy.asarray(image.convert(mode))
    except DataError:
        raise
    except Exception as error:  # Pillow has no class of its own for what is damaged
        kinds = ", ".join(FORMATS)
        raise DataError(
            f"{name} must be an image ({kinds}), but cannot be decoded: {error}."
        ) from error


def _check_size(name: str, size: tuple[int, int], first: Any) -> None:
    if first is not None and size != first.shape[:2]:
        raise DataError(
            f"All images must have one size, but {name} has {size} and the first "
            f"{first.shape[:2]} pixels; resize them first."
        )
