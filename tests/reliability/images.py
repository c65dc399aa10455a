"""Folders of images and parquet files that are made to do harm: each must be refused in words."""

from __future__ import annotations

import io
import os
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from pliant.data import load
from pliant.errors import DataError

EPS = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n"
    b"(%s) (w) file closefile\nshowpage\n%%%%EOF\n"
)
FOREIGN = ("GIF", "TIFF", "PPM", "ICO", "TGA", "PCX", "SGI", "IM", "PDF", "JPEG2000")


def png(seed: int = 0, size: int = 8) -> bytes:
    """A small picture, always the same one for a seed."""
    noise = random.Random(seed).randbytes(3 * size * size)
    return _saved(Image.frombytes("RGB", (size, size), noise), "PNG")


def _saved(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is large."""

    def chunk(name: bytes, data: bytes) -> bytes:
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(min(10**6, (width + 1) * height)))
    parts = chunk(b"IHDR", head), chunk(b"IDAT", rows), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def hostile(choose: random.Random, mark: Path) -> bytes:
    """Bytes that must not become an image: of another format, too large, cut off, damaged."""
    kind = choose.choice(("eps", "foreign", "bomb", "cut", "text", "empty"))
    if kind == "eps":
        return EPS.replace(b"%s", os.fsencode(mark), 1)
    if kind == "foreign":
        return _saved(Image.new("RGB", (8, 8)), choose.choice(FOREIGN))
    if kind == "bomb":
        return bomb(choose.choice((13_000, 60_000, 2**31 - 1)), choose.randint(13_000, 60_000))
    if kind == "cut":
        return png()[: choose.randint(1, 60)]
    return b"" if kind == "empty" else choose.randbytes(choose.randint(1, 300))


def folder(root: Path, choose: random.Random, mark: Path) -> Path:
    """An image folder with one hostile file among good ones."""
    place = root / "train" / "b"
    for name in "ab":
        (root / "train" / name).mkdir(parents=True)
        for number in range(3):
            (root / "train" / name / f"{number}.png").write_bytes(png(number))
    path = place / f"{choose.randint(0, 9)}x{choose.choice(('.png', '.jpg', '.bmp', '.webp'))}"
    way: Callable[[], Any] = choose.choice(
        (
            lambda: path.write_bytes(hostile(choose, mark)),
            lambda: path.write_bytes(hostile(choose, mark)),
            lambda: path.write_bytes(hostile(choose, mark)),
            lambda: os.mkfifo(path),
            lambda: path.symlink_to("/dev/zero"),
            lambda: path.symlink_to(mark.with_suffix(".png")),
            lambda: path.mkdir(),
        )
    )
    way()
    return root


def parquet(root: Path, choose: random.Random, mark: Path) -> Path:
    """A parquet file with one hostile row among good ones, or that is itself no file."""
    import pyarrow
    import pyarrow.parquet

    root.mkdir()
    cells: list[Any] = [{"bytes": png(n), "path": None} for n in range(4)]
    labels: list[Any] = [0, 1, 0, 1]
    bad: tuple[Any, ...] = (
        {"bytes": hostile(choose, mark), "path": None},
        {"bytes": hostile(choose, mark), "path": "a.png"},
        {"bytes": None, "path": str(mark.with_suffix(".png"))},
        {"bytes": None, "path": "/dev/zero"},
        {"bytes": None, "path": None},
        None,
    )
    cells[choose.randrange(4)] = choose.choice(bad)
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    table = pyarrow.table({"image": pyarrow.array(cells, kind), "label": labels})
    path = root / "train-0.parquet"
    way = choose.randrange(6)
    if way == 0:
        os.mkfifo(path)
    elif way == 1:
        whole = io.BytesIO()
        pyarrow.parquet.write_table(table, whole)
        data = bytearray(whole.getvalue())
        for _ in range(choose.randint(1, 20)):
            data[choose.randrange(len(data))] = choose.randrange(256)
        path.write_bytes(data[: choose.choice((len(data), len(data) // 2))])
    else:
        pyarrow.parquet.write_table(table, path)
    return root


def run(count: int, folder_of_all: Path, seed: int = 0) -> dict[str, int]:
    """Load hostile folders one after the other.

    Returns:
        How many were refused in words, and what else happened.
    """
    choose, found = random.Random(seed), {"refused": 0, "loaded": 0, "opened": 0, "raw": 0}
    mark = folder_of_all / "ghost"
    mark.with_suffix(".png").write_bytes(png(9))
    for number in range(count):
        root = folder_of_all / str(number)
        make = choose.choice((folder, parquet))
        make(root, choose, mark)
        try:
            load(str(root))
            found["loaded"] += 1
        except DataError:
            found["refused"] += 1
        except Exception as error:
            found["raw"] += 1
            print(f"case {number}: {type(error).__name__}: {error}")
        found["opened"] += mark.exists()
    return found
