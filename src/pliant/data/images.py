"""Pictures that may come from anybody: four formats, plain files of one folder, bounded sizes."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from pliant.codecs.disk import regular
from pliant.data.pixels import pixels_of, stacked, upright
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


def decode(named: Iterable[tuple[str, Any]], where: str, folder: Path, size: Any = None) -> Tensor:
    """Decode pictures to uint8 (N, C, H, W), in colour if any is; see `pliant.data.pixels`.

    Args:
        named: what each is called in messages, and its file, its bytes, or a cell of a parquet
            file: a mapping with ``bytes``, whose ``path`` is never opened.
        where: what all are called together.
        folder: in which the files must lie.
        size: what they are resized to, as `pixels_of` takes it; None leaves them.

    Raises:
        DataError: one is no picture, too large, or lies elsewhere, or they differ in size after
            resizing.
    """
    pixels: list[Any] = []
    packed, taken, colours = 0, 0, 1
    for name, source in named:
        data = _data(name, source, folder)
        pixels.append(_pixels(name, data, size, first=pixels[0] if pixels else None))
        colours = max(colours, 1 if pixels[-1].ndim == 2 else 3)
        height, width = pixels[-1].shape[:2]
        packed, taken = packed + len(data), len(pixels) * height * width * colours
        if taken > max(FREE, GROWTH * packed):
            raise DataError(
                f"{where} would take more than {taken:,} bytes in memory, {GROWTH} times those of "
                "the files: they are no photographs; make them smaller."
            )
    if not pixels:
        raise DataError(f"{where} must hold images, but there are none; check the path.")
    return stacked(pixels)


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


def _pixels(name: str, data: bytes, size: Any, *, first: Any) -> Any:
    """Decode one picture, and refuse one of another size than the first before it is decoded."""
    pil = require("PIL.Image", "data")
    try:
        with pil.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > PIXELS:
                raise DataError(
                    f"{name} has {width} x {height} pixels, and {PIXELS:,} are allowed; resize it."
                )
            if size is None:
                _check_size(name, upright(image), first)
            found = pixels_of(image, size)
            _check_size(name, found.shape[:2], first)
            return found
    except DataError:
        raise
    except Exception as error:  # Pillow has no class of its own for what is damaged
        kinds, why = ", ".join(FORMATS), str(error)
        why = "it is damaged, or something else" if "cannot identify" in why else why
        raise DataError(
            f"{name} must be an image ({kinds}), but cannot be decoded: {why}."
        ) from error


def _check_size(name: str, size: tuple[int, ...], first: Any) -> None:
    if first is not None and size != first.shape[:2]:
        raise DataError(
            f"All images must have one size, but {name} has {size} and the first "
            f"{first.shape[:2]} pixels; resize them, with load(..., size=...) or --size."
        )
