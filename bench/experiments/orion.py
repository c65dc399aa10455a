"""Labelling pixels of a hyperspectral scene: features of a tensor model beside spectra and places.

Three ways to hide pixels: at random, which leaves neighbours of every hidden pixel among those to
learn from; in small blocks; in large ones.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np

from bench.claim import judged
from bench.experiments import Cell, Cells, Table, by_seed, paired, values
from bench.stats import mean, plus_minus, spread
from pliant.api.estimator import CubeFeatures
from pliant.errors import require

Settings = Mapping[str, Any]
LIBRARIES = ("tensorly", "scikit-learn")
LEAST = 3  # labelled pixels of a class


def cells(settings: Settings) -> list[Cell]:
    """List every rival, seed by seed."""
    return [
        Cell({"rival": name, "seed": seed}, {**rival, "splits": settings["splits"]})
        for seed in settings["seeds"]
        for name, rival in settings["rivals"].items()
    ]


def measure(cell: Cell, watch: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Learn from some pixels and label the others, for every way of hiding them."""
    plan, seed = cell.plan, cell.key["seed"]
    cube, truth = scene()
    rows, found = _inputs(plan, cube, seed)
    for name, how in plan["splits"].items():
        known, hidden = split(truth, how, seed)
        model = _classifier(plan["classifier"], seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of solvers stopped by their number of iterations
            model.fit(rows[known], truth.ravel()[known])
        labels = truth.ravel()[hidden]
        found[name] = float((model.predict(rows[hidden]) == labels).mean())
        found[f"{name}, largest class"] = float(np.bincount(labels).max() / len(labels))
    return found


def claims(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Say what features of a tensor model add to spectra, and what of it is place alone."""
    asked, names = settings["claims"], list(settings["ranks"].values())
    rows = []
    for rank, name in settings["ranks"].items():
        leads = _leads(cells, name, asked["linear"], "random")
        text = f"Rank {rank} over a linear SVM on spectra, hidden at random"
        rows.append(judged(text, leads, ">=", asked["least"], "points"))
    for low, high in pairwise(names):
        text = f"Fall of accuracy from {low} to {high}, hidden at random"
        rows.append(judged(text, _leads(cells, low, high, "random"), "<=", asked["fall"], "points"))
    for rival in asked["beaten"]:
        for way in settings["splits"]:
            text = f"{names[-1]} over {rival}, hidden {_hidden(way)}"
            rows.append(judged(text, _leads(cells, names[-1], rival, way), ">", 0, "points"))
    for way in [way for way in settings["splits"] if way != "random"]:
        own, chance = (
            by_seed(cells, name, rival=asked["noise"]) for name in (way, f"{way}, largest class")
        )
        text = f"Features of noise over the largest class, hidden {_hidden(way)}"
        rows.append(judged(text, paired(own, chance, 100), "<=", asked["chance"], "points"))
    return rows


def summary(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Give means and spreads, a row per rival."""
    rows = []
    for rival in settings["rivals"]:
        row: dict[str, Any] = {"rival": rival}
        for way in settings["splits"]:
            found = values(cells, way, rival=rival)
            row[way] = {"mean": mean(found), "sd": spread(found), "seeds": len(found)}
        rows.append(row)
    return rows


def tables(settings: Settings, cells: Cells) -> list[Table]:
    """Give one table: rivals by ways of hiding."""
    ways = list(settings["splits"])
    rows = []
    for rival in settings["rivals"]:
        errors = values(cells, "error", rival=rival)
        found = [plus_minus([100 * v for v in values(cells, way, rival=rival)], 1) for way in ways]
        rows.append([rival, *found, plus_minus(errors, 3)])
    chance = [
        plus_minus([100 * v for v in values(cells, f"{way}, largest class")], 1) for way in ways
    ]
    rows.append(["the largest class everywhere", *chance, "–"])
    head = ["features and classifier", *(f"hidden {_hidden(way)}" for way in ways)]
    return [Table("Accuracy on hidden pixels, %", [*head, "relative error of the model"], rows)]


@cache
def scene() -> tuple[np.ndarray, np.ndarray]:
    """Return Indian Pines, (145, 145, 200), and its labels, 0 where there is none."""
    found = require("tensorly.datasets", "bench").load_indian_pines()
    return np.asarray(found["tensor"], dtype=np.float64), np.asarray(found["ticks"][0]).astype(int)


def split(truth: np.ndarray, how: Mapping[str, Any], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the pixels to learn from and those that are hidden, as flat masks.

    Args:
        truth: the labels; hidden pixels are those of classes that can be learnt.
        how: "share" of every class at random, or of square blocks of "block" pixels.
        seed: of the choice.
    """
    random, labels = np.random.default_rng(seed), truth.ravel()
    known = np.zeros(len(labels), dtype=bool)
    if "block" in how:
        numbers = np.add.outer(
            np.arange(truth.shape[0]) // how["block"] * 1000,
            np.arange(truth.shape[1]) // how["block"],
        ).ravel()
        blocks = random.permutation(np.unique(numbers))
        known = np.isin(numbers, blocks[: math.ceil(how["share"] * len(blocks))]) & (labels > 0)
    else:
        for label in np.unique(labels[labels > 0]):
            rows = random.permutation(np.flatnonzero(labels == label))
            known[rows[: max(LEAST, round(how["share"] * len(rows)))]] = True
    return known, ~known & np.isin(labels, np.unique(labels[known])) & (labels > 0)


def _inputs(
    plan: Mapping[str, Any], cube: np.ndarray, seed: int
) -> tuple[np.ndarray, dict[str, Any]]:
    """What a classifier sees of every pixel, and the error of the model behind it."""
    if plan["sees"] == "spectra":
        return cube.reshape(-1, cube.shape[2]), {}
    if plan["sees"] == "places":
        return np.indices(cube.shape[:2]).reshape(2, -1).T.astype(float), {}
    if plan["sees"] == "features of noise":
        cube = np.random.default_rng(seed).random(cube.shape)
    features = CubeFeatures(plan["method"], random_state=seed).fit(cube)
    return features.transform(), {"error": features.fit_error_}


def _classifier(name: str, seed: int) -> Any:
    """One of the classifiers, with settings chosen on pixels of other seeds."""
    svm = require("sklearn.svm", "cluster")
    made = {
        "linear": lambda: svm.LinearSVC(C=0.1, dual=False),
        "linear on features": lambda: svm.LinearSVC(
            C=0.03, dual=True, tol=1e-3, max_iter=1000, random_state=seed
        ),
        "polynomial": lambda: svm.SVC(C=10, kernel="poly", degree=3, coef0=1),
        "rbf": lambda: svm.SVC(C=100),
        "mlp": lambda: require("sklearn.neural_network", "cluster").MLPClassifier(
            (100,), max_iter=200, random_state=seed
        ),
        "neighbours": lambda: require("sklearn.neighbors", "cluster").KNeighborsClassifier(3),
    }[name]()
    scale = require("sklearn.preprocessing", "cluster").StandardScaler()
    return require("sklearn.pipeline", "cluster").make_pipeline(scale, made)


def _leads(cells: Cells, own: str, rival: str, way: str) -> list[float]:
    """Points by which one rival is ahead of another, seed by seed."""
    return paired(*(by_seed(cells, way, rival=name) for name in (own, rival)), scale=100)


def _hidden(way: str) -> str:
    return "at random" if way == "random" else f"in {way}"
