"""Where the images of a folder lie, and which class each has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pliant.errors import DataError

IMAGES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".webp")
BESIDE: tuple[str, ...] = (
    ".txt",
    ".md",
    ".json",
    ".csv",
    ".tsv",
    ".xml",
    ".yaml",
    ".yml",
    ".html",
    ".log",
)
BESIDE += (".db", ".ini", ".lnk", ".sh", ".py")
"""What lies beside images and is none; anything else with another suffix is refused."""
CLUTTER = ("__MACOSX", "__pycache__", "lost+found", "@eaDir")
"""Folders that systems leave; hidden ones, such as .ipynb_checkpoints, are left out too."""

Found = list[tuple[Path, int]]


@dataclass(frozen=True)
class Layout:
    """The images of a folder by split.

    Attributes:
        splits: of each the files and the numbers of their classes, -1 where there are none.
        classes: names, in the order of their numbers.
    """

    splits: dict[str, Found]
    classes: tuple[str, ...]


def layout(root: Path, names: dict[str, tuple[str, ...]]) -> Layout:
    """Find the images of a folder: train/CLASS/*, CLASS/* or, without classes, train/* or *.

    Classes are numbered in the order of their names. Hidden files and folders are left out.

    Args:
        root: the folder.
        names: what each split may be called.

    Raises:
        DataError: there are no images, a class of train is empty, another split has a class that
            train has not, or files of a class cannot be read.
    """
    folders = {split: next((root / n for n in known if (root / n).is_dir()), None)
               for split, known in names.items()}  # fmt: skip
    train = folders["train"]
    if train is not None and _folders(train):
        classes = _classes(train)
        found = {s: _labelled(f, classes) for s, f in folders.items() if f is not None}
        return Layout(found, classes)
    known = {name for kinds in names.values() for name in kinds}
    if train is not None and {each.name for each in _folders(root)} <= known:
        return Layout({s: _alone(f) for s, f in folders.items() if f is not None}, ())
    if any(_files(folder) for folder in _folders(root)):
        classes = _classes(root)
        return Layout({"train": _labelled(root, classes)}, classes)
    if alone := _alone(root):
        return Layout({"train": alone}, ())
    raise DataError(
        f"{root} must hold train*.parquet, train/CLASS/*.png, CLASS/*.png or *.png, but holds "
        f"{', '.join(sorted(p.name for p in root.iterdir())[:5]) or 'nothing'}; check the path."
    )


def _classes(folder: Path) -> tuple[str, ...]:
    classes = tuple(each.name for each in _folders(folder))
    empty = [name for name in classes if not _files(folder / name)]
    if len(empty) == len(classes):
        raise DataError(f"{folder} must hold images, but there are none; check the path.")
    if empty:
        raise DataError(
            f"Every class must have images, but {folder / empty[0]} has none, and leaving it out "
            "would change the numbers of the classes behind it: fill it, or remove the folder."
        )
    return classes


def _labelled(folder: Path, classes: Sequence[str]) -> Found:
    foreign = sorted({each.name for each in _folders(folder)} - set(classes))
    if foreign:
        raise DataError(
            f"{folder} must hold the classes of train ({', '.join(classes[:5])}...), but has "
            f"{foreign[0]!r}; rename it or add it to train."
        )
    found = [(file, n) for n, name in enumerate(classes) for file in _files(folder / name)]
    if not found and any(each.suffix.lower() in IMAGES for each in folder.iterdir()):
        raise DataError(
            f"{folder} holds images that lie in no folder of a class, while those of train do: put "
            "them into folders of their classes, or elsewhere."
        )
    return found


def _alone(folder: Path) -> Found:
    """The images of a folder that have no class."""
    return [(file, -1) for file in _files(folder)]


def _folders(folder: Path) -> list[Path]:
    """The folders within one that may be classes, by name."""
    within = sorted(each for each in folder.iterdir() if each.is_dir())
    named = [each for each in within if each.suffix.lower() in IMAGES]
    if named:
        raise DataError(f"{named[0]} is named as an image, but is a folder: rename or remove it.")
    return [each for each in within if not each.name.startswith(".") and each.name not in CLUTTER]


def _files(folder: Path) -> list[Path]:
    """The images of a folder; of a class those in folders of its own too."""
    if not folder.is_dir():
        return []
    files = sorted(each for each in folder.iterdir() if not each.is_dir())
    files = [each for each in files if not each.name.startswith(".")]
    strange = Counter(f.suffix.lower() for f in files if f.suffix.lower() not in (*IMAGES, *BESIDE))
    if strange:
        suffix, count = strange.most_common(1)[0]
        raise DataError(
            f"{folder} holds {count} files ending in {suffix or 'no suffix'!r}, which are not "
            f"read: convert them to one of {', '.join(IMAGES)}, or move them elsewhere."
        )
    found = [each for each in files if each.suffix.lower() in IMAGES]
    for inner in _folders(folder):
        if folder.resolve().is_relative_to(inner.resolve()):
            raise DataError(f"{inner} is a link to a folder that holds it: remove the link.")
    return found + [file for inner in _folders(folder) for file in _files(inner)]
