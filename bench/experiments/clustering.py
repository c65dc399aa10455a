"""Clustering sets of images: subspaces of two views beside what else there is."""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

import pliant
from bench.claim import judged
from bench.experiments import Cell, Cells, Table, by_seed, paired, values
from bench.stats import mean, plus_minus, spread
from pliant.errors import require
from pliant.families.solve.grassmann import points, product_gram
from pliant.registry import construct

Settings = Mapping[str, Any]
LIBRARIES = ("scikit-learn",)
SCORES = {"accuracy": "accuracy, %", "nmi": "NMI, %", "ari": "ARI, %"}


def cells(settings: Settings) -> list[Cell]:
    """List every rival on the same sets, case by case and seed by seed."""
    shared = {name: settings[name] for name in ("classes", "sets")}
    return [
        Cell({"case": case, "rival": name, "seed": seed}, {**shared, **drawn, **plan})
        for seed in settings["seeds"]
        for case, drawn in settings["cases"].items()
        for name, plan in settings["rivals"].items()
    ]


def measure(cell: Cell, watch: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Cluster the sets of one seed and compare the groups with the classes."""
    plan, seed = cell.plan, cell.key["seed"]
    views, truth = sets(plan, seed)
    chosen = [views[number] for number in plan["views"]]
    means = chosen[0].mean(2) if plan.get("means") else None
    means = None if means is None else means - means.mean(0)
    if "sklearn" in plan:
        return _scored(_sklearn(plan, chosen, means, seed), truth)
    x = chosen if means is None else means @ means.T
    method = construct("product_grassmann_lrr", {"size": plan["size"], **plan["options"]})
    found = pliant.cluster(x, plan["classes"], method, seed=seed)
    facts = {"seconds": found.seconds, "iterations": found.iterations}
    return _scored(found.value.numpy(), truth) | facts


def claims(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Say how mean accuracies compare, and that both solvers do the same."""
    asked, own, rows = settings["claims"], settings["claims"]["champion"], []
    for case in settings["cases"]:
        for rivals, how in ((asked["at_least"], ">="), (asked["beaten"], ">")):
            for rival in rivals:
                text = f"{case} sets: accuracy of {own} over that of {rival}"
                rows.append(judged(text, _leads(cells, case, own, rival), how, 0, "points"))
        apart = [abs(lead) for lead in _leads(cells, case, own, asked["same"])]
        text = f"{case} sets: accuracies of the closed form and of ADMM differ by"
        rows.append(judged(text, apart, "<=", 1.0, "points"))
    return rows


def summary(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Give mean and standard deviation over seeds, a row per case and rival."""
    rows = []
    for case in settings["cases"]:
        for rival in settings["rivals"]:
            row: dict[str, Any] = {"case": case, "rival": rival}
            for name in SCORES:
                found = values(cells, name, case=case, rival=rival)
                if found:
                    row[name] = {"mean": mean(found), "sd": spread(found), "seeds": len(found)}
            rows.append(row)
    return rows


def tables(settings: Settings, cells: Cells) -> list[Table]:
    """Give a table per case, one row per rival."""
    return [_table(settings, cells, case) for case in settings["cases"]]


def _table(settings: Settings, cells: Cells, case: str) -> Table:
    rows = []
    for rival in settings["rivals"]:
        found = [values(cells, name, case=case, rival=rival) for name in SCORES]
        rows.append([rival, *(plus_minus([100 * v for v in column], 1) for column in found)])
    drawn, count = settings["cases"][case], settings["classes"] * settings["sets"]
    title = f"{case}: {count} sets of {drawn['images']} images, {drawn['intruders']} of any class"
    return Table(title, ["rival", *SCORES.values()], rows)


def sets(plan: Mapping[str, Any], seed: int) -> tuple[list[Tensor], np.ndarray]:
    """Draw sets (N, 64, images) in two views, and the class of each; no image is in two sets.

    Intruders take the places of the first images of a set; they may be of any class.
    """
    pictures, labels = _digits()
    random, images, count = np.random.default_rng(seed), plan["images"], plan["sets"]
    chosen = [
        random.permutation(np.flatnonzero(labels == label))[: count * images].reshape(count, images)
        for label in range(plan["classes"])
    ]
    rows = np.concatenate(chosen)
    intruders = plan["intruders"]
    rows[:, :intruders] = random.integers(len(labels), size=(len(rows), intruders))
    steps = np.gradient(pictures, axis=(1, 2))
    views = (pictures, np.hypot(*steps))
    tensors = [torch.as_tensor(view.reshape(len(view), -1)[rows].swapaxes(1, 2)) for view in views]
    return tensors, np.repeat(np.arange(plan["classes"]), count)


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    found = require("sklearn.datasets", "cluster").load_digits()
    return found.images / 16.0, found.target


def _sklearn(
    plan: Mapping[str, Any], views: list[Tensor], means: Tensor | None, seed: int
) -> np.ndarray:
    library = require("sklearn.cluster", "cluster")
    bases = [points(list(view), plan["size"]) for view in views]
    if plan["sklearn"] == "spectral":
        gram = product_gram(bases).numpy()
        model = library.SpectralClustering(
            plan["classes"], affinity="precomputed", n_init=20, random_state=seed
        )
        return np.asarray(model.fit_predict(gram))
    features = means
    if features is None:  # projectors, whose distances are those of the manifold
        features = torch.cat([(basis @ basis.mT).flatten(1) for basis in bases], 1)
    model = library.KMeans(plan["classes"], n_init=20, random_state=seed)
    return np.asarray(model.fit_predict(features.numpy()))


def _scored(labels: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    """Accuracy at the best matching of groups with classes, NMI and ARI."""
    metrics = require("sklearn.metrics", "cluster")
    table = metrics.cluster.contingency_matrix(truth, labels)
    rows, columns = require("scipy.optimize", "cluster").linear_sum_assignment(-table)
    return {
        "accuracy": float(table[rows, columns].sum() / len(truth)),
        "nmi": float(metrics.normalized_mutual_info_score(truth, labels)),
        "ari": float(metrics.adjusted_rand_score(truth, labels)),
    }


def _leads(cells: Cells, case: str, own: str, rival: str) -> list[float]:
    """Points by which one rival is ahead of another, on the sets of each seed."""
    pair = (by_seed(cells, "accuracy", case=case, rival=name) for name in (own, rival))
    return paired(*pair, scale=100)
