"""Sets of vectors to cluster: real ones, spoilt on purpose, and planted subspaces.

A sample is a matrix (features, columns): the images of one object, the frames of one take.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from bench.data import part
from pliant.errors import DataError, require

Sets = list[np.ndarray]
ROOT_JOINT = 0  # the hip, to which the other joints are relative
SHORTEST = 6  # frames of a take that has velocities in five dimensions


def draw(name: str, plan: dict[str, Any], seed: int) -> tuple[list[Sets], np.ndarray]:
    """Return the views of all sets and the class of each.

    Args:
        name: "eth80", "digits", "skeletons" or "planted".
        plan: "noise", the standard deviation of what is added, in units of that of all numbers;
            "replaced", the share of each set's columns that come from any set instead; for planted
            subspaces "spread".
        seed: of noise, of what is replaced, and of which digits make a set.
    """
    random = np.random.default_rng(seed)
    if name == "planted":
        return _planted(plan, random)
    sets, labels = {"eth80": _eth80, "digits": _digits, "skeletons": _skeletons}[name](plan, random)
    spoilt = noisy(replaced(sets, plan.get("replaced", 0), random), plan.get("noise", 0), random)
    return {"eth80": lambda sets: [sets], "digits": _edges, "skeletons": _velocities}[name](
        spoilt
    ), labels


def replaced(sets: Sets, share: float, random: np.random.Generator) -> Sets:
    """Put columns of any set in the place of a share of each set's columns."""
    pool, found = np.concatenate(sets, 1), []
    for one in sets:
        count, one = round(share * one.shape[1]), one.copy()
        places = random.choice(one.shape[1], count, replace=False)
        one[:, places] = pool[:, random.integers(pool.shape[1], size=count)]
        found.append(one)
    return found


def noisy(sets: Sets, sd: float, random: np.random.Generator) -> Sets:
    """Add noise, in units of the standard deviation of all numbers about their means."""
    pool = np.concatenate(sets, 1)
    size = sd * float((pool - pool.mean(1, keepdims=True)).std())
    return [one + size * random.standard_normal(one.shape) for one in sets]


# ---------------------------------------------------------------- where they come from


def _eth80(plan: dict[str, Any], random: np.random.Generator) -> tuple[Sets, np.ndarray]:
    """Ten objects of each of eight kinds, 41 images each, in 37 features."""
    found = _eth80_file()
    return [np.array(one) for one in found.ravel()], np.repeat(np.arange(8), 10)


@cache
def _eth80_file() -> np.ndarray:
    read = require("scipy.io", "bench").loadmat
    return np.asarray(read(part("eth80") / "image-sets.mat")["Img_sets_eth80"])


def _digits(plan: dict[str, Any], random: np.random.Generator) -> tuple[Sets, np.ndarray]:
    """Sets of images of one class, 8 x 8 pixels; no image is in two of them."""
    images, labels = _digit_images()
    count, each = plan["sets"], plan["images"]
    rows = [
        random.permutation(np.flatnonzero(labels == label))[: count * each].reshape(count, each)
        for label in range(10)
    ]
    sets = [images[row].reshape(each, -1).T for row in np.concatenate(rows)]
    return sets, np.repeat(np.arange(10), count)


@cache
def _digit_images() -> tuple[np.ndarray, np.ndarray]:
    found = require("sklearn.datasets", "cluster").load_digits()
    return found.images / 16.0, found.target


def _skeletons(plan: dict[str, Any], random: np.random.Generator) -> tuple[Sets, np.ndarray]:
    """Takes of ten actions by ten people, 20 joints in metres from the hip."""
    takes = _takes()
    return [take.copy() for take, _ in takes], np.array([label for _, label in takes])


@cache
def _takes() -> tuple[tuple[np.ndarray, int], ...]:
    folder, found, names = part("skeletons"), [], list[str]()
    joints = np.load(folder / "utkinect.npz")
    take = ""
    for line in (folder / "labels.txt").read_text().split("\n"):
        action, _, span = line.partition(":")
        if not span:
            take = line.strip() or take
            continue
        names += [action] if action not in names else []
        words = span.split()
        if "NaN" in words:
            continue  # nobody did it
        frames = joints[f"{take}_frame"]
        inside = joints[take][(frames >= int(words[0])) & (frames <= int(words[1]))]
        if len(inside) < SHORTEST:
            continue
        relative = inside - inside[:, ROOT_JOINT : ROOT_JOINT + 1]
        found.append((relative.reshape(len(inside), -1).T, names.index(action)))
    return tuple(found)


def _planted(plan: dict[str, Any], random: np.random.Generator) -> tuple[list[Sets], np.ndarray]:
    """Four groups of 15 subspaces of R^30 around centres of three dimensions."""
    centres = np.linalg.qr(random.standard_normal((4, 30, 3)))[0]
    labels = np.repeat(np.arange(4), 15)
    moved = centres[labels] + plan["spread"] * random.standard_normal((60, 30, 3))
    return [list(np.linalg.qr(moved)[0])], labels


# ---------------------------------------------------------------- second views


def _edges(sets: Sets) -> list[Sets]:
    """Pixels, and how steep they are."""
    found = []
    for one in sets:
        images = one.T.reshape(-1, 8, 8)
        found.append(np.hypot(*np.gradient(images, axis=(1, 2))).reshape(len(images), -1).T)
    return [sets, found]


def _velocities(sets: Sets) -> list[Sets]:
    """Places of the joints, and how they move from frame to frame."""
    return [sets, [np.diff(one, axis=1) for one in sets]]


def sparse_representation(vectors: np.ndarray, share: float) -> np.ndarray:
    """Represent each vector by few of the others (sparse subspace clustering): affinities (N, N).

    Elhamifar and Vidal 2013: a lasso for every sample of length 1, with a penalty that is a share
    of the least one that leaves nothing.

    Raises:
        DataError: a vector is zero.
    """
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not lengths.all():
        raise DataError("A sparse representation needs vectors that are not zero: leave them out.")
    unit, found = vectors / lengths, np.zeros((len(vectors), len(vectors)))
    lasso = require("sklearn.linear_model", "cluster").Lasso
    for row, one in enumerate(unit):
        others = np.delete(np.arange(len(unit)), row)
        most = float(np.abs(unit[others] @ one).max()) / unit.shape[1]
        model = lasso(share * most, fit_intercept=False, max_iter=3000)
        found[row, others] = model.fit(unit[others].T, one).coef_
    return np.abs(found) + np.abs(found.T)


def means(sets: Sequence[np.ndarray]) -> np.ndarray:
    """Return the mean column of each set, less the mean of these: (N, features)."""
    found = np.stack([one.mean(1) for one in sets])
    return found - found.mean(0)
