"""Methods that cluster and recover as estimators of scikit-learn; needs the extra ``cluster``.

`CubeFeatures` and `CubeClassifier` need the extra ``recover`` as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from pliant.api.solve import cluster, randomness, recover
from pliant.errors import DataError, MethodError, require
from pliant.families.solve.cp import CP, Weight, pixel_features
from pliant.registry import of_verb

require("sklearn", "cluster")  # says what to install

from sklearn.base import (  # noqa: E402
    BaseEstimator,
    ClassifierMixin,
    ClassNamePrefixFeaturesOutMixin,
    ClusterMixin,
    TransformerMixin,
    clone,
)
from sklearn.pipeline import make_pipeline  # noqa: E402
from sklearn.preprocessing import StandardScaler  # noqa: E402
from sklearn.svm import LinearSVC  # noqa: E402
from sklearn.utils import check_random_state  # noqa: E402
from sklearn.utils.validation import validate_data  # noqa: E402


class Clusterer(ClusterMixin, BaseEstimator):
    """Clusters by any method of Pliant, for pipelines and searches of scikit-learn.

    >>> from sklearn.base import clone
    >>> clone(Clusterer(3, method="product_grassmann_lrr(size=2)")).n_clusters
    3
    """

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        method: Any = "product_grassmann_lrr",
        random_state: Any = None,
    ) -> None:
        """Keep the options as they are.

        Args:
            n_clusters: how many groups.
            method: a name, a spec such as ``"product_grassmann_lrr(rank=5)"``, or an instance.
            random_state: a seed, a numpy RandomState, or None for a seed that varies.
        """
        self.n_clusters = n_clusters
        self.method = method
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> Clusterer:
        """Divide samples into groups.

        Args:
            X: (samples, features) as in scikit-learn, or anything that `pliant.cluster` takes:
                sets of vectors, views of them.
            y: ignored.

        Returns:
            Itself, with solution_, n_iter_, objective_path_ (the objective in every row of the
            history) and every value of the solution: labels_, representation_, affinity_.
        """
        if _axes(X) < 3:
            X = validate_data(self, X, dtype=[np.float64, np.float32])
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        self.solution_ = cluster(X, self.n_clusters, self.method, seed=seed)
        for name, value in self.solution_.values.items():
            setattr(self, f"{name}_", np.asarray(value))
        rows = self.solution_.history
        self.objective_path_ = [row["objective"] for row in rows if "objective" in row]
        self.n_iter_ = self.solution_.iterations
        return self


class CubeFeatures(  # type: ignore[call-arg]
    ClassNamePrefixFeaturesOutMixin,
    TransformerMixin,
    BaseEstimator,
    auto_wrap_output_keys=None,  # it would ask for an X to transform
):
    """Turns the pixels of a hyperspectral cube into features by a tensor decomposition.

    It is transductive: features are those of the pixels that it was fitted to. Another cube with
    the same bands gets codes in the same components, by factors of its own.

    >>> cube = np.random.default_rng(0).random((6, 5, 8))
    >>> CubeFeatures("orion(rank=10, iterations=2)", random_state=0).fit_transform(cube).shape
    (30, 10)
    """

    def __init__(
        self, method: Any = "orion", *, weight: Weight = "none", random_state: Any = None
    ) -> None:
        """Keep the options as they are.

        Args:
            method: a name, a spec such as ``"orion(rank=500)"``, or an instance.
            weight: "w" multiplies each feature by the weight of its component, "sqrt" by its root,
                for what comes after and does not standardize.
            random_state: a seed, a numpy RandomState, or None for a seed that varies.
        """
        self.method = method
        self.weight = weight
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> CubeFeatures:
        """Decompose a cube.

        Args:
            X: (rows, columns, bands), or as the method's axis says.
            y: ignored.

        Returns:
            Itself, with weights_, factors_ (of rows, columns and bands), fit_error_, n_iter_ and
            solution_.

        Raises:
            MethodError: the method has no factors.
        """
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        self.solution_ = recover(np.asarray(X, dtype=np.float64), None, self.method, seed=seed)
        values = self.solution_.values
        if not {"weights", "rows", "columns", "bands"} <= values.keys():
            raise MethodError(
                f"{self.solution_.method['name']} gives no factors to make features of: use orion."
            )
        self.weights_ = values["weights"]
        self.factors_ = (values["rows"], values["columns"], values["bands"])
        self.fit_error_ = self.solution_.history[-1]["error"]
        self.n_iter_ = self.solution_.iterations
        self._n_features_out = len(self.weights_)
        return self

    def transform(self, X: Any = None) -> np.ndarray:
        """Return the features of all pixels, row by row: (rows * columns, components).

        Args:
            X: None for the cube that it was fitted to, or another cube with the same bands.
        """
        model = self._model(X)
        sides = [torch.arange(len(factor)) for factor in model.factors[:2]]
        places = torch.cartesian_prod(*sides)
        return pixel_features(model, places[:, 0], places[:, 1], self.weight).numpy()

    def fit_transform(self, X: Any, y: Any = None) -> np.ndarray:
        """Decompose a cube and return the features of its pixels."""
        return self.fit(X).transform()

    def pixel_features(self, rows: Any, columns: Any) -> np.ndarray:
        """Return the features of some pixels of the fitted cube, (n, components)."""
        first, second = (torch.as_tensor(np.asarray(one)) for one in (rows, columns))
        return pixel_features(self._model(None), first, second, self.weight).numpy()

    def _model(self, x: Any) -> CP:
        if x is None:
            rows, columns, bands = (torch.as_tensor(factor) for factor in self.factors_)
            return CP(torch.as_tensor(self.weights_), (rows, columns, bands))
        cube = torch.as_tensor(np.asarray(x, dtype=np.float64))
        method, draw = of_verb(self.method, "recover"), randomness(self.solution_.seed)
        return method.project(cube, self.solution_.values, draw)


class CubeClassifier(ClassifierMixin, BaseEstimator):
    """Labels the pixels of a hyperspectral cube by a linear model on `CubeFeatures`.

    >>> cube = np.random.default_rng(0).random((6, 5, 8))
    >>> labels = np.arange(30).reshape(6, 5) % 2 + 1
    >>> CubeClassifier("orion(rank=10, iterations=2)", random_state=0).fit(cube, labels).classes_
    array([1, 2])
    """

    def __init__(
        self, method: Any = "orion", *, estimator: Any = None, random_state: Any = None
    ) -> None:
        """Keep the options as they are.

        Args:
            method: a name, a spec such as ``"orion(rank=500)"``, or an instance.
            estimator: a classifier for the standardized features; a linear SVM if None.
            random_state: of the decomposition; a seed, a numpy RandomState, or None.
        """
        self.method = method
        self.estimator = estimator
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> CubeClassifier:
        """Decompose a cube, and learn from its labelled pixels.

        Args:
            X: (rows, columns, bands).
            y: (rows, columns), whole numbers; 0 where there is no label.

        Raises:
            DataError: the labels do not fit the cube, or there are fewer than two classes.
        """
        labels = _labels(y, np.shape(X)[:2])
        if len(np.unique(labels[labels > 0])) < 2:
            raise DataError("Labels of at least two classes are needed to learn from: label more.")
        self.features_ = CubeFeatures(self.method, random_state=self.random_state).fit(X)
        estimator = LinearSVC() if self.estimator is None else clone(self.estimator)
        self.model_ = make_pipeline(StandardScaler(), estimator)
        places = np.nonzero(labels)
        self.model_.fit(self.features_.pixel_features(*places), labels[places])
        self.classes_ = self.model_.classes_
        return self

    def predict(self, X: Any = None) -> np.ndarray:
        """Return a map of labels, (rows, columns), of the fitted cube or of another one."""
        shape = [len(factor) for factor in self.features_.factors_[:2]]
        if X is not None:
            return self.model_.predict(self.features_.transform(X)).reshape(np.shape(X)[:2])
        columns = np.arange(shape[1])
        rows = (
            self.features_.pixel_features(np.full_like(columns, n), columns)
            for n in range(shape[0])
        )
        return np.stack([self.model_.predict(row) for row in rows])

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Return the share of pixels with a label in y that the map of the fitted cube has right.

        Args:
            X: ignored; the map is that of the fitted cube.
            y: (rows, columns), 0 where there is no label.
            sample_weight: of the pixels, (rows, columns).
        """
        found = self.predict()
        labels = _labels(y, found.shape)
        known = labels > 0
        weights = None if sample_weight is None else np.asarray(sample_weight)[known]
        return float(np.average(found[known] == labels[known], weights=weights))

    def rank_path(self, X: Any, y: Any, truth: Any, ranks: Sequence[int]) -> dict[int, float]:
        """Return the accuracy at each rank, on pixels that have no label in y but one in truth."""
        hidden = np.where(_labels(y, np.shape(X)[:2]) > 0, 0, truth)
        method = of_verb(self.method, "recover")
        models = {rank: clone(self).set_params(method=replace(method, rank=rank)) for rank in ranks}
        return {rank: model.fit(X, y).score(X, hidden) for rank, model in models.items()}


def _labels(y: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Read a map of labels."""
    labels = np.asarray(y)
    if labels.shape != tuple(shape) or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"Labels must be whole numbers of shape {tuple(shape)}, 0 where there is none, but "
            f"their dtype is {labels.dtype} and their shape {labels.shape}."
        )
    if labels.min() < 0:
        raise DataError(f"Labels must be 0 or more, not {labels.min()}: write 0 for none.")
    return labels


def _axes(x: Any) -> int:
    """Count the axes of nested lists of arrays, by their first members."""
    axes = 0
    while isinstance(x, list | tuple) and x:
        axes, x = axes + 1, x[0]
    return axes + getattr(x, "ndim", 0)
