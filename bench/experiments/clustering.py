"""Clustering sets of vectors: real sets at rising levels of damage, beside what else there is."""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

import pliant
from bench import sets
from bench.claim import judged
from bench.experiments import Cell, Cells, Table, by_seed, paired, values
from bench.stats import mean, plus_minus, spread
from pliant.errors import require
from pliant.families.solve.grassmann import centred, points, product_gram
from pliant.registry import construct

Settings = Mapping[str, Any]
LIBRARIES = ("scikit-learn",)
SCORES = {"accuracy": "accuracy, %", "nmi": "NMI, %", "ari": "ARI, %"}
RESTARTS = 20  # of k-means, also within spectral clustering
SPARSE = 0.5  # of SSC: share of the penalty that leaves nothing


def cells(settings: Settings) -> list[Cell]:
    """List every rival on the same sets: task by task, level by level, seed by seed."""
    return [
        Cell(
            {"task": task, "level": level, "rival": name, "seed": seed},
            {**plan["draw"], **damage, "groups": plan["groups"], "size": plan["size"], **rival},
        )
        for seed in settings["seeds"]
        for task, plan in settings["tasks"].items()
        for level, damage in plan["levels"].items()
        for name, rival in settings["rivals"].items()
        if rival.get("view", 0) < plan["views"] and task not in rival.get("not", ())
    ]


def measure(cell: Cell, watch: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Cluster the sets of one seed and compare the groups with the classes."""
    plan, seed = cell.plan, cell.key["seed"]
    views, truth = sets.draw(plan["data"], plan, seed)
    if "view" in plan:
        views = [views[plan["view"]]]
    return scored(_labels(plan, views, seed), truth)


def claims(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Say how accuracies compare: over all levels of a task, or at some of them."""
    rows = []
    for asked in settings["claims"]:
        own = _accuracies(settings, cells, asked, "own")
        if "rival" not in asked:
            text = f"{_where(asked)}: accuracy of {asked['own']}"
            rows.append(judged(text, list(own.values()), ">=", asked["least"], "%"))
            continue
        leads = paired(own, _accuracies(settings, cells, asked, "rival"))
        text = f"{_where(asked)}: accuracy of {asked['own']} over that of {asked['rival']}"
        if "most" in asked:
            apart = [abs(lead) for lead in leads]
            rows.append(judged(f"{text}, either way", apart, "<=", asked["most"], "points"))
        else:
            rows.append(judged(text, leads, ">", asked.get("least", 0), "points"))
    return rows


def summary(settings: Settings, cells: Cells) -> list[dict[str, Any]]:
    """Give mean and standard deviation over seeds, a row per task, level and rival."""
    rows = []
    for task, plan in settings["tasks"].items():
        for level in plan["levels"]:
            for rival in settings["rivals"]:
                key = {"task": task, "level": level, "rival": rival}
                found = {name: values(cells, name, **key) for name in SCORES}
                if found["accuracy"]:
                    rows.append(
                        key
                        | {
                            name: {"mean": mean(v), "sd": spread(v), "seeds": len(v)}
                            for name, v in found.items()
                        }
                    )
    return rows


def tables(settings: Settings, cells: Cells) -> list[Table]:
    """Give for each task a table of accuracies and one of NMI: rivals by levels, best first."""
    return [
        _table(settings, cells, task, name)
        for task in settings["tasks"]
        for name in ("accuracy", "nmi")
    ]


def _table(settings: Settings, cells: Cells, task: str, score: str) -> Table:
    plan = settings["tasks"][task]
    found = {
        rival: [
            values(cells, score, task=task, level=level, rival=rival) for level in plan["levels"]
        ]
        for rival in settings["rivals"]
    }
    kept = {rival: rows for rival, rows in found.items() if all(rows)}
    best = sorted(kept, key=lambda rival: -sum(mean(row) or 0 for row in kept[rival]))
    rows = [
        [rival, *(plus_minus([100 * v for v in row], 1) for row in kept[rival])] for rival in best
    ]
    return Table(f"{task}, {SCORES[score]}", ["rival", *plan["levels"]], rows)


def scored(labels: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    """Accuracy at the best matching of groups with classes, NMI and ARI."""
    metrics = require("sklearn.metrics", "cluster")
    table = metrics.cluster.contingency_matrix(truth, labels)
    rows, columns = require("scipy.optimize", "cluster").linear_sum_assignment(-table)
    return {
        "accuracy": float(table[rows, columns].sum() / len(truth)),
        "nmi": float(metrics.normalized_mutual_info_score(truth, labels)),
        "ari": float(metrics.adjusted_rand_score(truth, labels)),
    }


# ---------------------------------------------------------------- rivals


def _labels(plan: Mapping[str, Any], views: Sequence[sets.Sets], seed: int) -> np.ndarray:
    """Divide the sets by the rival's own means."""
    groups, how = plan["groups"], plan.get("how", "method")
    if how == "method":
        tensors = [[torch.as_tensor(one) for one in view] for view in views]
        options = {"size": plan["size"], **plan["options"]}
        if options.get("rank") == "groups":
            options["rank"] = groups
        method = construct(plan["method"], options)
        x = tensors if len(tensors) > 1 else tensors[0]
        return np.asarray(pliant.cluster(x, groups, method, seed=seed).value)
    if how == "moments":
        gram = sum(_moments(view) for view in views)
        method = construct("product_grassmann_lrr", {"precomputed": True})
        return np.asarray(pliant.cluster(gram, groups, method, seed=seed).value)
    if how == "means":
        return _k_means(sets.means(views[0]), groups, seed)
    if how == "sparse":
        affinity = sets.sparse_representation(sets.means(views[0]), SPARSE)
        return _spectral(affinity, groups, seed)
    bases = [_bases(view, plan["size"]) for view in views]
    if how == "spectral":
        return _spectral(product_gram(bases).numpy(), groups, seed)
    # Projectors, whose distances are those of the manifold.
    projectors = torch.cat([(basis @ basis.mT).flatten(1) for basis in bases], 1)
    return _k_means(projectors.numpy(), groups, seed)


def _bases(view: sets.Sets, size: int) -> Tensor:
    tensors = [torch.as_tensor(one) for one in view]
    return points(centred(tensors), min(size, min(one.shape[1] for one in tensors)))


def _moments(view: sets.Sets) -> Tensor:
    """Cosines between second moments: like projectors, but every direction by its energy."""
    tensors = centred([torch.as_tensor(one) for one in view])
    rows = torch.stack([(one @ one.T / one.shape[1]).flatten() for one in tensors])
    unit = torch.nn.functional.normalize(rows, dim=1)
    return unit @ unit.T


def _k_means(rows: np.ndarray, groups: int, seed: int) -> np.ndarray:
    library = require("sklearn.cluster", "cluster")
    return np.asarray(library.KMeans(groups, n_init=RESTARTS, random_state=seed).fit_predict(rows))


def _spectral(affinity: np.ndarray, groups: int, seed: int) -> np.ndarray:
    model = require("sklearn.cluster", "cluster").SpectralClustering(
        groups, affinity="precomputed", n_init=RESTARTS, random_state=seed
    )
    return np.asarray(model.fit_predict(affinity))


# ---------------------------------------------------------------- what is compared


def _accuracies(
    settings: Settings, cells: Cells, asked: Mapping[str, Any], who: str
) -> dict[int, float]:
    """Accuracies in % by seed, each the mean over levels; none where a level is missing."""
    task = asked["task"]
    levels = asked.get("levels") or settings["tasks"][task]["levels"]
    rows = [
        by_seed(cells, "accuracy", task=task, level=level, rival=asked[who]) for level in levels
    ]
    whole = [seed for seed in settings["seeds"] if all(seed in row for row in rows)]
    return {seed: 100 * fmean(row[seed] for row in rows) for seed in whole}


def _where(asked: Mapping[str, Any]) -> str:
    levels = asked.get("levels")
    return f"{asked['task']}, {' and '.join(levels)}" if levels else asked["task"]
